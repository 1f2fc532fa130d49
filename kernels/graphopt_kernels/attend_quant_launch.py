"""How one row's attention over rounded keys and values is started on a GPU (``attend_launch``); several rows
are in ``attend_quant_prompts``."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_launch import (
    AttendLaunch,
    block_of,
    kernels_follow,
    kinds_taken,
    merge,
    on_device,
    parts_for,
    precision,
    processors_for,
)
from graphopt_kernels.attend_operator import Asked
from graphopt_kernels.attention_launch import rows_together
from graphopt_kernels.cache_codes import PLANES
from graphopt_kernels.instructions import has_half_pairs

__all__ = [
    "CHANNELS", "QuantBits", "QuantStores", "follows", "jitted", "kernels_for", "kernels_take", "launch_for",
    "limits_of", "packing", "pieces_of", "row_on_gpu", "row_scratch",
]  # fmt: skip

UNIT = 32
"""Positions whose codes of a key are whole words."""

_MOST_ROWS = 16
"""Heads of a program, whose results fit into registers: more that share keys are of several programs."""

_WARPS = 4
"""Of a program, each with keys of its own."""

_ALONE, _RESIDENT, _TURNS = 512, 8, 3
"""Keys of a part from which on a warp is a program, how many of these a processor has at a time, and how
often it has as many: the more, the more even is the end."""

_REGISTERS = 255
"""Of a thread where codes have eight bits: shared memory has room for two programs then, and registers so
many for each. Left to itself the assembler makes room for three, and spills."""

CHANNELS = 64
"""Of keys, that a program rounds or reads."""


class QuantStores(NamedTuple):
    """``key_codes`` int32 [.., Hkv, N, words, D], ``key_scales`` [.., Hkv, N, 2, D], ``value_codes`` int32
    [.., Hkv, N * block, words], ``value_scales`` [.., Hkv, N * block, 2, groups], ``key_ring`` [.., Hkv, R,
    D], ``value_ring`` [.., Hkv, R, Dv], R a multiple of ``block``, of at least B sequences."""

    key_codes: torch.Tensor
    key_scales: torch.Tensor
    value_codes: torch.Tensor
    value_scales: torch.Tensor
    key_ring: torch.Tensor
    value_ring: torch.Tensor

    @property
    def block(self) -> int:
        """Positions that are rounded together."""
        return self.value_codes.shape[2] // self.key_codes.shape[2]


class QuantBits(NamedTuple):
    """``group``: channels of values that have one scale. ``turn``: ``ALONE`` or ``FIRST``, ``MIDDLE``,
    ``LAST`` of sites that read one store."""

    key_bits: int
    value_bits: int
    group: int
    turn: int


def launch_for(
    batch: int, groups: int, heads: int, length: int, block: int, dtype: torch.dtype, bits: int,
    processors: int,
) -> AttendLaunch:  # fmt: skip
    """For a row of ``heads`` heads over at most ``length`` keys of ``bits`` bits, in tiles of ``block``
    elements. One part more than others have is for the exact rows."""
    rows = min(_MOST_ROWS, max(8, 1 << (heads // groups - 1).bit_length()))
    programs = batch * groups * -(-(heads // groups) // rows)
    # A warp's threads count words of keys by eight, or half-words, which take fewer registers.
    small = rows == 8 and block <= 128 and dtype is not torch.float32
    units = 2 if bits < 4 or (bits == 4 and small) else 1
    stages = 3 if block <= 128 and dtype is not torch.float32 else 2
    # A warp by itself waits for no other, and more of them have room, but each has its own part to merge.
    most = _TURNS * _RESIDENT * processors // programs
    if small and most > 1 and length >= _ALONE * most:
        return AttendLaunch(rows, units * UNIT, most + 1, 1, stages)
    columns = _WARPS * units * UNIT
    # Of a part with fewer keys some warps would have none.
    parts = min(parts_for(programs, length, processors), max(1, length // columns))
    return AttendLaunch(rows, columns, parts + (parts > 1), _WARPS, stages)


def pieces_of(stores: QuantStores, width: int) -> int:
    """Programs that round or read one block."""
    return -(-width // CHANNELS) + stores.block // UNIT


def limits_of(stores: QuantStores) -> tuple[float, float]:
    """The largest scale of keys and of values that there can be."""
    keys, values = (torch.finfo(scales.dtype).max for scales in (stores.key_scales, stores.value_scales))
    return keys, values


def kernels_for(query: torch.Tensor, stores: QuantStores, group: int) -> Any:
    """The kernels where they take these tensors, else ``None``."""
    if not query.is_cuda or kernels_take(query, stores, group) is not None:
        return None
    return jitted()


def kernels_take(query: torch.Tensor, stores: QuantStores, group: int) -> Reason | None:
    """``None``, or why the kernels do not take what the operator takes."""
    key_ring, value_ring = stores.key_ring, stores.value_ring
    if 0 in query.shape:
        return Reason("there are no rows")
    block = stores.block
    for name, size, most in (("positions", block, 128), ("channels", group, 128)):
        if size & (size - 1) or size > most:
            return Reason(f"{size} {name} are rounded together: expected a power of two up to {most}")
    if not all(store.is_contiguous() for store in stores):
        return Reason("stores are not contiguous")
    if key_ring.shape[2] % block:
        return Reason(f"rings have {key_ring.shape[2]} rows: expected a multiple of {block}")
    return kinds_taken(
        {"queries": query.dtype, "stored keys": key_ring.dtype, "stored values": value_ring.dtype},
        max(key_ring.shape[3], value_ring.shape[3]),
    )


def follows(
    device: torch.device, dtype: torch.dtype, width: int, value_width: int, block: int, group: int
) -> bool:
    """Whether steps of one row on ``device`` run kernels, which read what is there and no more."""
    powers = all(not size & (size - 1) and size <= 128 for size in (block, group))
    return powers and kernels_follow(device, dtype, width, value_width)


@functools.cache
def jitted() -> Any:
    """The jitted kernels by name, or ``None`` without triton."""
    try:
        from graphopt_kernels import (
            attend_quant_prompt_triton,
            attend_quant_triton,
            attend_triton,
            cache_rounding_triton,
        )
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return SimpleNamespace(
        attend_kernel=attend_quant_triton.attend_kernel,
        close_kernel=cache_rounding_triton.close_kernel,
        close_rows_kernel=cache_rounding_triton.close_rows_kernel,
        merge_kernel=attend_triton.merge_kernel,
        prompt_kernel=attend_quant_prompt_triton.prompt_kernel,
        read_kernel=cache_rounding_triton.read_kernel,
        write_kernel=attend_triton.write_kernel,
    )


def packing(stores: QuantStores, bits: QuantBits, width: int) -> tuple[dict[str, int], tuple[int, int, int]]:
    """What kernels over packed blocks go by, and words of a block's keys, of a value, and of the
    first plane of a value."""
    value_width = stores.value_ring.shape[3]
    first = -(-value_width * PLANES[bits.value_bits][0] // 32)
    packed = {
        "KEY_BITS": bits.key_bits, "VALUE_BITS": bits.value_bits, "LENGTH": stores.block, "GROUP": bits.group,
        "WIDTH": width, "VALUE_WIDTH": value_width,
        # Groups of channels and words of values are whole in a tile.
        "BLOCK_V": max(block_of(value_width), UNIT, bits.group),
    }  # fmt: skip
    return packed, (stores.key_codes.shape[3], stores.value_codes.shape[3], first)


def row_on_gpu(
    kernels: Any,
    asked: Asked,
    stores: QuantStores,
    bits: QuantBits,
    *,
    takes: bool,
    launch: AttendLaunch | None = None,
    processors: int | None = None,
) -> torch.Tensor:
    """``graphopt::attend_quant`` of one row by its kernels. ``takes``: the row is written; else another site
    did that. ``launch``: in place of the one for the problem."""
    assert asked.key is not None and asked.value is not None
    query, key, value = rows_together(asked.query), rows_together(asked.key), rows_together(asked.value)
    valid, slopes, sinks = asked.valid, asked.slopes, asked.sinks
    batch, heads, _, width = query.shape
    groups, slots, kept, value_width = *stores.key_codes.shape[1:3], *stores.value_ring.shape[2:]
    packed, words = packing(stores, bits, width)
    block_d = block_of(width)
    widest = max(block_d, packed["BLOCK_V"])
    launch = launch or launch_for(
        batch, groups, heads, min(asked.length, slots * stores.block), widest, query.dtype, bits.key_bits,
        processors or processors_for(query.device),
    )  # fmt: skip
    output = query.new_empty((batch, heads, 1, value_width))
    parts, shape = launch.parts, (batch, heads, 1, launch.parts)
    partial = sums = output
    if parts > 1:
        partial = query.new_empty((*shape, value_width), dtype=torch.float32)
        sums = query.new_empty(shape, dtype=torch.float32)
    counts = query
    if slopes is not None and valid is not None:
        counts = valid[:batch].cumsum(-1, dtype=torch.int32)
    shown = query if valid is None else rows_together(valid)
    positions, window, softcap = asked.positions, asked.window, asked.softcap
    eight = launch.warps > 1 and widest == 128 and 8 in bits[:2]
    room = {"maxnreg": _REGISTERS} if eight else {}
    with on_device(query):
        blocks_of_heads = -(-(heads // groups) // launch.rows)
        kernels.attend_kernel[(parts * batch * groups * blocks_of_heads,)](
            query, key, value, *stores, positions, shown, counts, query if slopes is None else slopes,
            query if sinks is None else sinks, output, partial, sums, *query.stride()[:3],
            *key.stride()[:3], *value.stride()[:3], shown.stride(0), counts.stride(0), *output.stride()[:3],
            heads, heads // groups, slots, kept, parts, window, asked.scale, softcap, **packed,
            TAKES=takes, FINAL=parts == 1, WINDOW=bool(window), VALID=valid is not None,
            SLOPES=slopes is not None, SINKS=sinks is not None, CAPPED=bool(softcap),
            APPROXIMATE=query.dtype is torch.bfloat16, BLOCK_D=block_d, ROWS=launch.rows,
            TEAM=launch.warps, COUNT=launch.columns // UNIT // launch.warps,
            FAST=has_half_pairs(stores.key_codes), PRECISION=precision(), num_warps=launch.warps,
            num_stages=launch.stages, **room,
        )  # fmt: skip
        if parts > 1:
            merge(kernels, output, partial, sums, sinks)
        if takes:
            kernels.close_kernel[(batch * groups * pieces_of(stores, width),)](
                *stores, positions, slots, kept, *limits_of(stores), *words, **packed, CHANNELS=CHANNELS,
                num_warps=4,
            )  # fmt: skip
    return output


def row_scratch(asked: Asked, stores: QuantStores, bits: QuantBits) -> int:
    """Bytes that a call of one row takes on a GPU beyond its output."""
    query, valid, group = asked.query, asked.valid, bits.group
    batch, heads, value_width = query.shape[0], query.shape[1], stores.value_ring.shape[3]
    widest = max(block_of(query.shape[3]), block_of(value_width), UNIT, group)
    held = min(asked.length, stores.value_codes.shape[2])
    processors = processors_for(query.device)
    groups, dtype = stores.key_ring.shape[1], query.dtype
    parts = launch_for(batch, groups, heads, held, widest, dtype, bits.key_bits, processors).parts
    taken = batch * heads * parts * (value_width + 1) * 4 if parts > 1 else 0
    if valid is not None and asked.slopes is not None:
        taken += batch * valid.shape[1] * 4
    return int(taken)
