"""How attention over stores is started on a GPU: which calls its kernels take, tiles, how many parts.

A step of one token has one program for each sequence and head of keys, far too few to read memory at its
speed, so the keys are shared out in parts as well (split-K; Dao et al. 2023, "Flash-Decoding for
long-context inference"). How many is chosen on the host, by sizes that do not change from step to step; which
keys a part has, on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt_kernels.attend_operator import Asked, NoConstants, RowStores
from graphopt_kernels.attention_launch import WIDEST, WIDEST_FLOAT32, rows_together
from graphopt_kernels.tuning.lookup import processors_of

__all__ = [
    "AttendLaunch", "AttendProblem", "attend_on_gpu", "attend_scratch", "block_of", "jitted",
    "kernels_follow", "kernels_for", "kernels_take", "kinds_taken", "launch_for", "merge", "new_rows_on_gpu",
    "on_device", "parts_for", "precision", "problem_of", "processors_for",
]  # fmt: skip

RESIDENT = 2
"""Programs that a multiprocessor of sm_90 has at a time: their tiles on the way fill its shared memory."""

PROCESSORS = 132
"""Multiprocessors of an H100 or H200, which are assumed where no GPU can be asked."""

_START, _MERGE = 128, 2
"""Keys that could be read in the time that a program takes to begin, and that a part takes to be merged."""

_LEAST, _MOST_PARTS = 64, 1024
"""Keys of a part, and parts."""

_NEW_COLUMNS = 16
"""New keys at a time where they are few: tensor cores take no fewer."""


class AttendProblem(NamedTuple):
    """``batch`` sequences of ``groups`` heads of keys, ``rows`` rows of positions and heads that share one of
    these, over at most ``length`` keys; widths and dtypes of what is asked and of what is held."""

    batch: int
    groups: int
    rows: int
    length: int
    width: int
    value_width: int
    dtype: torch.dtype

    @property
    def block(self) -> int:
        """The wider of a key's and a value's tile."""
        return block_of(max(self.width, self.value_width))


class AttendLaunch(NamedTuple):
    """``rows`` and ``columns`` of a tile, how many ``parts`` keys are shared out in, warps of a program, and
    ``stages``: tiles that are on their way at a time."""

    rows: int
    columns: int
    parts: int
    warps: int
    stages: int


def launch_for(problem: AttendProblem, processors: int) -> AttendLaunch:
    """Tiles by widths and rows, which the registers and the shared memory of sm_90 have room for."""
    rows, columns, warps, stages = _tile(problem)
    programs = problem.batch * problem.groups * -(-problem.rows // rows)
    return AttendLaunch(rows, columns, parts_for(programs, problem.length, processors), warps, stages)


def _tile(problem: AttendProblem) -> tuple[int, int, int, int]:
    few = max(16, 1 << (problem.rows - 1).bit_length())
    if problem.dtype is torch.float32:
        # Products of float32 are three of tensor cores each: tiles are small.
        return min(few, 32), 32 if problem.block <= 64 else 16, 4, 2
    if problem.block > 128:
        return min(few, 64), 32, 4 if few <= 32 else 8, 2 if few > 32 else 3
    if few <= 64:
        return few, 128 if problem.block <= 64 and few <= 32 else 64, 4, 3
    return 128, 64, 8, 3


def parts_for(programs: int, length: int, processors: int) -> int:
    """How many parts the ``length`` keys of each of ``programs`` are shared out in, to be done soonest: as
    many programs as ``processors`` have at a time run together, then as many again."""
    together = RESIDENT * processors
    most = max(1, min(length // _LEAST, _MOST_PARTS))

    def taken(parts: int) -> float:
        turns = -(-programs * parts // together)
        merging = _START + _MERGE * parts if parts > 1 else 0
        return turns * (length / parts + _START) + merging

    # More turns than a few gain nothing but an even end.
    candidates = {min(most, max(1, turns * together // programs)) for turns in range(1, 9)} | {1}
    return min(sorted(candidates), key=taken)


def block_of(width: int) -> int:
    """Elements of a tile of heads: tensor cores take 16 and more."""
    return max(16, 1 << (width - 1).bit_length())


def precision() -> str:
    """How products of float32 are computed: by tensor cores, in three parts where torch wants them exact."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def kernels_for(query: torch.Tensor, key_store: torch.Tensor, value_store: torch.Tensor) -> Any:
    """The module of the jitted kernels where they take these tensors, else ``None``."""
    if not query.is_cuda or kernels_take(query, key_store, value_store) is not None:
        return None
    return jitted()


def kernels_take(query: torch.Tensor, key_store: torch.Tensor, value_store: torch.Tensor) -> Reason | None:
    """``None``, or why the kernels do not take what the operators take."""
    reason = kinds_taken(
        {"queries": query.dtype, "stored keys": key_store.dtype, "stored values": value_store.dtype},
        max(key_store.shape[-1], value_store.shape[-1]),
    )
    if reason is not None:
        return reason
    for name, store in (("keys", key_store), ("values", value_store)):
        if store.stride(-1) != 1:
            return Reason(f"elements of a row of stored {name} lie {store.stride(-1)} apart: expected 1")
    if 0 in query.shape:
        return Reason("there are no rows")
    return None


def kernels_follow(device: torch.device, dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Whether steps of ``dtype`` on ``device`` run kernels, which read what is there and no more."""
    taken = kinds_taken({"queries": dtype}, max(width, value_width)) is None
    return taken and device.type == "cuda" and jitted() is not None


def kinds_taken(dtypes: Mapping[str, torch.dtype], width: int) -> Reason | None:
    """``None``, or why the kernels do not take tensors of ``dtypes``, by name, in heads of ``width``."""
    for name, dtype in dtypes.items():
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return Reason(f"the kernels of attention over stores do not take {name} in {dtype}")
    widest = WIDEST_FLOAT32 if dtypes["queries"] is torch.float32 else WIDEST
    if width > widest:
        return Reason(f"heads of {width} elements do not fit the registers: at most {widest} do")
    return None


@functools.cache
def jitted() -> Any:
    """The module of the jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels import attend_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return attend_triton


def new_rows_on_gpu(asked: Asked, stores: RowStores, *, ring: bool) -> torch.Tensor | None:
    """``attend_on_gpu`` where its kernels take these tensors and all of the new rows ask, else ``None``."""
    if asked.query.shape[2] != asked.positions.shape[0]:
        return None
    kernels = kernels_for(asked.query, *stores)
    return None if kernels is None else attend_on_gpu(kernels, asked, stores, ring=ring)


def attend_on_gpu(
    kernels: Any,
    asked: Asked,
    stores: RowStores,
    *,
    ring: bool,
    launch: AttendLaunch | None = None,
    processors: int | None = None,
) -> torch.Tensor:
    """``graphopt::attend_full``, or with ``ring`` ``graphopt::attend_ring``, by their kernels. ``launch``: in
    place of the one for the problem.

    One new row is written by the program that reads its key and value. Of several, those of a full store are
    written before and read from there, and those of a ring after, when nobody reads what they take the place
    of.
    """
    query, positions = rows_together(asked.query), asked.positions.contiguous()
    key, value, valid, slopes, sinks = asked.key, asked.value, asked.valid, asked.slopes, asked.sinks
    key_store, value_store = stores
    batch, heads, rows, width = query.shape
    groups, slots, value_width = key_store.shape[1], key_store.shape[2], value_store.shape[3]
    problem = problem_of(query, key_store, value_store, asked.length)
    launch = launch or launch_for(problem, processors or processors_for(query.device))
    output = query.new_empty((batch, heads, rows, value_width))
    widths = {
        "WIDTH": width, "VALUE_WIDTH": value_width, "BLOCK_D": block_of(width),
        "BLOCK_V": block_of(value_width),
    }  # fmt: skip
    held = (*key_store.stride()[:3], *value_store.stride()[:3])
    # Tensors that are not there stand for by the query: no kernel looks at them.
    new = [query, query]
    if key is not None and value is not None:
        new = [rows_together(key), rows_together(value)]
    given = (*new[0].stride()[:3], *new[1].stride()[:3])
    beside = key is not None and (ring or rows == 1)

    def write() -> None:
        skipped = max(0, rows - slots) if ring else 0
        kernels.write_kernel[(batch * groups * (rows - skipped),)](
            *new, key_store, value_store, positions, *given, *held, groups, rows, skipped, slots, RING=ring,
            num_warps=1, **widths,
        )  # fmt: skip

    counts = query
    if slopes is not None and valid is not None:
        counts = valid[:batch].cumsum(-1, dtype=torch.int32)
    shown = query if valid is None else rows_together(valid)
    parts = launch.parts
    shape = (batch, heads, rows, parts)
    partial = sums = output
    if parts > 1:
        partial = query.new_empty((*shape, value_width), dtype=torch.float32)
        sums = query.new_empty(shape, dtype=torch.float32)
    blocks = -(-rows * (heads // groups) // launch.rows)
    with on_device(query):
        if key is not None and not beside:
            write()
        kernels.attend_kernel[(blocks * parts * batch * groups,)](
            query, *new, key_store, value_store, positions, shown, counts,
            query if slopes is None else slopes, query if sinks is None else sinks, output, partial, sums,
            *query.stride()[:3], *given, *held, shown.stride(0), counts.stride(0), *output.stride()[:3],
            heads, heads // groups, rows, slots, parts, asked.window, asked.scale, asked.softcap,
            RING=ring, NEW=beside, WRITES=beside and rows == 1, FINAL=parts == 1, WINDOW=bool(asked.window),
            VALID=valid is not None, SLOPES=slopes is not None, SINKS=sinks is not None,
            CAPPED=bool(asked.softcap), APPROXIMATE=query.dtype is torch.bfloat16, ROWS=launch.rows,
            COLUMNS=launch.columns, NEW_COLUMNS=_NEW_COLUMNS if rows <= _NEW_COLUMNS else launch.columns,
            PRECISION=precision(), num_warps=launch.warps, num_stages=launch.stages, **widths,
        )  # fmt: skip
        if parts > 1:
            merge(kernels, output, partial, sums, sinks)
        if beside and rows > 1:
            write()
    return output


def merge(
    kernels: Any,
    output: torch.Tensor,
    partial: torch.Tensor,
    sums: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Add up what the parts of each row left in ``partial`` [B, H, n, parts, Dv] and ``sums``."""
    batch, heads, rows, parts = sums.shape
    value_width = output.shape[3]
    kernels.merge_kernel[(batch * heads * rows,)](
        partial, sums, output if sinks is None else sinks, output, *output.stride()[:3], heads, rows, parts,
        SINKS=sinks is not None, VALUE_WIDTH=value_width, BLOCK_V=block_of(value_width),
        BLOCK_SPLITS=max(2, 1 << (parts - 1).bit_length()), num_warps=4,
    )  # fmt: skip


def problem_of(
    query: torch.Tensor, key_store: torch.Tensor, value_store: torch.Tensor, length: int
) -> AttendProblem:
    """What a launch for these tensors is for, of fake ones too: symbols count as what they were."""
    batch, heads, rows, width = map(_torch.hint, query.shape)
    groups = key_store.shape[1]
    held = min(length, key_store.shape[2])
    return AttendProblem(
        batch, groups, rows * (heads // groups), held, width, value_store.shape[3], query.dtype
    )


def attend_scratch(asked: Asked, stores: RowStores, _: NoConstants) -> int:
    """Bytes that a call takes on a GPU beyond its output: the parts of rows, and counts of positions."""
    query, valid = asked.query, asked.valid
    if query.device.type != "cuda" or kernels_take(query, *stores) is not None:
        return 0
    problem = problem_of(query, *stores, asked.length)
    parts = launch_for(problem, processors_for(query.device)).parts
    batch, heads, rows, _width = map(_torch.hint, query.shape)
    taken = batch * heads * rows * parts * (stores.value_store.shape[3] + 1) * 4 if parts > 1 else 0
    if valid is not None and asked.slopes is not None:
        taken += batch * valid.shape[1] * 4
    return taken


def processors_for(device: torch.device) -> int:
    """How many multiprocessors ``device`` has; those of an H100 where there is none to be asked."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return PROCESSORS
    return processors_of(device)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Where kernels are started: the device of ``tensor``. Launches that are written down have none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
