"""How several rows' attention over rounded keys and values is started on a GPU.

::

    read_kernel         blocks that are packed      -> their numbers, in scratch
    close_rows_kernel   blocks that the rows fill   -> their numbers, and codes and scales in the stores
    prompt_kernel       the rows                       over numbers, and what is exact for each
    write_kernel        the newest rows             -> the rings, from which nobody reads any more

Numbers of a few sequences, or of a few heads of one, are there at a time: of all they would take what the
stores spare.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt_kernels.attend_launch import (
    AttendLaunch,
    AttendProblem,
    block_of,
    launch_for,
    merge,
    on_device,
    precision,
    processors_for,
)
from graphopt_kernels.attend_operator import Asked
from graphopt_kernels.attend_quant_launch import (
    CHANNELS,
    QuantBits,
    QuantStores,
    limits_of,
    packing,
    pieces_of,
)
from graphopt_kernels.attention_launch import rows_together

__all__ = ["prompt_scratch", "prompts_take", "rows_on_gpu"]

_MOST_BYTES = 256 << 20
"""Of numbers at a time, unless one head has more."""


class _Pass(NamedTuple):
    """How many ``sequences`` go at a time, all heads of keys of theirs or ``heads`` of one, and
    ``blocks`` of a head that any row reads rounded."""

    sequences: int
    heads: int
    blocks: int


def prompts_take(asked: Asked, stores: QuantStores) -> Reason | None:
    """``None``, or why the kernels do not take several rows that are asked for so, where they take one."""
    if asked.window:
        return Reason(
            f"rows read a window of {asked.window}: several of these at a time go by ATen operators"
        )
    if asked.query.shape[2] > asked.positions.shape[0]:
        return Reason("more rows ask than are new")
    return None


def rows_on_gpu(
    kernels: Any,
    asked: Asked,
    stores: QuantStores,
    bits: QuantBits,
    *,
    writes: bool,
    launch: AttendLaunch | None = None,
    processors: int | None = None,
    most_bytes: int = _MOST_BYTES,
) -> torch.Tensor:
    """``graphopt::attend_quant`` of several rows by its kernels. ``writes``: the stores take them; else
    another site does that. ``launch``: in place of the one for the problem. ``most_bytes``: of numbers at a
    time."""
    assert asked.key is not None and asked.value is not None
    query, positions = rows_together(asked.query), asked.positions.contiguous()
    key, value = rows_together(asked.key), rows_together(asked.value)
    batch, heads, rows, _ = query.shape
    groups, kept, value_width = stores.value_ring.shape[1:]
    new, each = positions.shape[0], heads // groups
    one = _pass_of(asked, stores, most_bytes)
    launch = launch or launch_for(_problem(asked, stores, one), processors or processors_for(query.device))
    output = query.new_empty((batch, heads, rows, value_width))
    with on_device(query):
        for begin in range(0, batch, one.sequences):
            some = slice(begin, min(batch, begin + one.sequences))
            for first in range(0, groups, one.heads):
                shared = slice(first, min(groups, first + one.heads))
                asking = slice(shared.start * each, shared.stop * each)
                part = asked._replace(
                    query=query[some, asking], key=key[some, shared], value=value[some, shared],
                    positions=positions, valid=None if asked.valid is None else asked.valid[some],
                    slopes=None if asked.slopes is None else asked.slopes[asking],
                    sinks=None if asked.sinks is None else asked.sinks[asking],
                )  # fmt: skip
                held = QuantStores(*(store[some, shared] for store in stores))
                _attend(kernels, part, held, bits, one.blocks, output[some, asking], launch, writes)
        if writes:
            skipped = max(0, new - kept)
            kernels.write_kernel[(batch * groups * (new - skipped),)](
                key, value, stores.key_ring, stores.value_ring, positions, *key.stride()[:3],
                *value.stride()[:3], *stores.key_ring.stride()[:3], *stores.value_ring.stride()[:3], groups,
                new, skipped, kept, RING=True, num_warps=1, **_widths(query.shape[3], value_width),
            )  # fmt: skip
    return output


def _attend(
    kernels: Any,
    asked: Asked,
    held: QuantStores,
    bits: QuantBits,
    blocks: int,
    output: torch.Tensor,
    launch: AttendLaunch,
    writes: bool,
) -> None:
    """Numbers of a pass, and its rows of the ``output``."""
    query, key, value, positions, valid, slopes, sinks = asked[:7]
    assert key is not None and value is not None
    batch, heads, rows, width = query.shape
    groups, slots, kept, value_width = *held.key_codes.shape[1:3], *held.value_ring.shape[2:]
    block, new = held.block, positions.shape[0]
    far = max(1, blocks) * block
    far_keys = query.new_empty((batch, groups, far, width), dtype=held.key_ring.dtype)
    far_values = query.new_empty((batch, groups, far, value_width), dtype=held.value_ring.dtype)
    packed, words = packing(held, bits, width)
    pieces = pieces_of(held, width)
    if blocks:
        kernels.read_kernel[(batch * groups * blocks * pieces,)](
            *held[:4], positions, far_keys, far_values, blocks, far, slots, kept, *words, **packed,
            CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
        # Of more than are kept the first would be overtaken; without a window all are.
        closing = min(-(-new // block), blocks)
        kernels.close_rows_kernel[(batch * groups * closing * pieces,)](
            key, value, *held, positions, far_keys, far_values, *key.stride()[:3], *value.stride()[:3],
            groups, new, closing, far, slots, kept, *limits_of(held), *words, **packed,
            CHANNELS=CHANNELS, WRITES=writes, num_warps=4,
        )  # fmt: skip
    parts, shape = launch.parts, (batch, heads, rows, launch.parts)
    partial = sums = output
    if parts > 1:
        partial = query.new_empty((*shape, value_width), dtype=torch.float32)
        sums = query.new_empty(shape, dtype=torch.float32)
    shown = query if valid is None else rows_together(valid)
    counts = query
    if slopes is not None and valid is not None:
        counts = valid.cumsum(-1, dtype=torch.int32)
    tiles = -(-rows * (heads // groups) // launch.rows)
    kernels.prompt_kernel[(tiles * parts * batch * groups,)](
        query, key, value, far_keys, far_values, held.key_ring, held.value_ring, positions,
        positions[new - rows :], shown, counts, query if slopes is None else slopes,
        query if sinks is None else sinks, output, partial, sums, *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], shown.stride(0), counts.stride(0), *output.stride()[:3], heads, heads // groups,
        rows, far, kept, parts, asked.scale, asked.softcap, LENGTH=block, FINAL=parts == 1,
        VALID=valid is not None, SLOPES=slopes is not None, SINKS=sinks is not None,
        CAPPED=bool(asked.softcap), APPROXIMATE=query.dtype is torch.bfloat16, ROWS=launch.rows,
        COLUMNS=launch.columns, PRECISION=precision(), num_warps=launch.warps, num_stages=launch.stages,
        **_widths(width, value_width),
    )  # fmt: skip
    if parts > 1:
        merge(kernels, output, partial, sums, sinks)


def _widths(width: int, value_width: int) -> dict[str, int]:
    return {
        "WIDTH": width, "VALUE_WIDTH": value_width, "BLOCK_D": block_of(width),
        "BLOCK_V": block_of(value_width),
    }  # fmt: skip


def _blocks(asked: Asked, stores: QuantStores) -> int:
    kept, slots = stores.key_ring.shape[2], stores.key_codes.shape[2]
    return min(slots, max(0, (asked.length - kept) // stores.block + 1))


def _bytes_of_a_head(stores: QuantStores, blocks: int) -> int:
    """Of the numbers of ``blocks`` blocks of a head of keys."""
    row = sum(ring.shape[3] * ring.element_size() for ring in (stores.key_ring, stores.value_ring))
    return max(1, blocks) * stores.block * row


def _pass_of(asked: Asked, stores: QuantStores, most_bytes: int = _MOST_BYTES) -> _Pass:
    blocks, groups = _blocks(asked, stores), stores.key_ring.shape[1]
    batch = _torch.hint(asked.query.shape[0])
    heads = max(1, most_bytes // _bytes_of_a_head(stores, blocks))
    return _Pass(max(1, min(batch, heads // groups)), min(groups, heads), blocks)


def _problem(asked: Asked, stores: QuantStores, one: _Pass) -> AttendProblem:
    """What a launch of a pass is for: rounded keys are as attention over a full store reads them."""
    heads, rows, width = map(_torch.hint, asked.query.shape[1:])
    group, value_width = heads // stores.key_ring.shape[1], stores.value_ring.shape[3]
    held = max(1, one.blocks) * stores.block
    kind = asked.query.dtype
    return AttendProblem(one.sequences, one.heads, rows * group, held, width, value_width, kind)


def prompt_scratch(asked: Asked, stores: QuantStores) -> int:
    """Bytes that a call of several rows takes on a GPU beyond its output."""
    one = _pass_of(asked, stores)
    problem = _problem(asked, stores, one)
    taken = one.sequences * one.heads * _bytes_of_a_head(stores, one.blocks)
    parts = launch_for(problem, processors_for(asked.query.device)).parts
    if parts > 1:
        taken += problem.batch * problem.groups * problem.rows * parts * (problem.value_width + 1) * 4
    if asked.valid is not None and asked.slopes is not None:
        taken += problem.batch * asked.valid.shape[1] * 4
    return taken
