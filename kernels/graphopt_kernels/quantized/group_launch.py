"""How a product that reads weights in groups is started: which kernel, in which tiles, by its sizes.

    problem = GroupProblem(rows, columns, inner, torch.bfloat16, group=128, half=64, levels=False)
    launch = launch_for(problem, multiprocessors)

As in ``byte_launch`` every launch is predicted to be as slow as its slowest resource on as much of the device
as its programs fill, and the fastest is taken; ``library`` is unpacking the weight and a dense product.
Instructions were counted in the loops of disassemblies for sm_90; rates are those of an H200
(``graphopt_cost_model/devices/h200.yaml``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.quantized.byte_launch import (
    HALVES,
    PARTS,
    PROCESSORS,
    Problem,
    dense_seconds,
    streamed_seconds,
)
from graphopt_kernels.quantized.planes import unit_of

__all__ = [
    "LIBRARY", "GroupLaunch", "GroupProblem", "check_launch", "launch_for", "launches", "packed_bytes",
    "predicted_seconds", "steps_of", "usual_launch",
]  # fmt: skip

_STREAMED = 3.65e12
_COPY = 4.28e12
_ISSUED = {"slices": 15e12, "tiles": 10e12}
"""Instructions of lanes a second in loops that wait for codes, words and sums of groups, as measured on an
H200 (``benchmarks/sweep_packed.py``)."""

_TENSOR = 790e12
_WARP_GROUPS, _WARPS = 0.45, 0.45
"""Shares of that: of tiles, which wait for each group's sum, and of what single warps do."""

_LAUNCH, _START = 2e-6, 4.5e-6
_MANY = 2.0
"""How many times as long slices of more than 16 rows were measured to take."""

_BESIDE = 0.1
"""As in ``byte_launch``, as the two before."""

_AHEAD = 5
"""Stages where extra bits wait for words: two steps are on their way."""

_CONVERTED = {4: 2.0, 3: 2.25, 2: 2.0}
"""Instructions that make a number of a code, by bits."""

_EXTRA = 45
"""Of a block: they find and read extra bits, which most have not."""

_UNALIGNED = 6.0
"""Instructions for a code that cannot be loaded with its neighbours; only x is ever so here."""


class GroupProblem(NamedTuple):
    """x [``rows``, ``inner``] of ``dtype`` times a weight [``columns``, ``inner``] of codes of four bits,
    ``half`` of them in the low halves of a block's bytes, in groups of ``group``. ``levels``: codes number
    levels of nf4; ``double``: scales are codes of eight bits. ``bits``: two or three of each code are there,
    in planes of ``half`` bytes (``planes``), but for ``slots`` units of a row."""

    rows: int
    columns: int
    inner: int
    dtype: torch.dtype
    group: int
    half: int
    levels: bool = False
    double: bool = False
    bits: int = 4
    slots: int = 0

    @property
    def block(self) -> int:
        """Codes that a step reads of a row at least."""
        return 2 * self.half if self.bits == 4 else unit_of(self.bits, self.half)

    @property
    def blocks(self) -> int:
        """Of a row."""
        return -(-self.inner // self.block)


class GroupLaunch(NamedTuple):
    """``kind``: ``slices``, ``tiles``, or ``library``. A program computes ``columns`` results of ``rows``
    rows, ``slices`` blocks of each in a step; ``parts`` programs share a sum."""

    kind: str
    rows: int
    columns: int
    slices: int
    parts: int
    warps: int
    stages: int


LIBRARY = GroupLaunch("library", 1, 1, 1, 1, 1, 1)


def launch_for(problem: GroupProblem, processors: int) -> GroupLaunch:
    """The launch that is predicted to be fastest."""
    found = launches(problem, processors)
    return min(found, key=lambda launch: predicted_seconds(problem, launch, processors))


def usual_launch(problem: GroupProblem) -> GroupLaunch:
    """``launch_for`` an H100 or H200."""
    return launch_for(problem, PROCESSORS)


def launches(problem: GroupProblem, processors: int) -> list[GroupLaunch]:
    """All that are weighed."""
    found = [
        launch for whole in _launches(problem) for launch in (whole, _in_parts(problem, whole, processors))
    ]
    return list(dict.fromkeys(found))


def check_launch(problem: GroupProblem, launch: GroupLaunch) -> Reason | None:
    """``None``, or why ``launch`` would not compute ``problem``."""
    text = _wrong_with(problem, launch)
    return None if text is None else Reason(text)


def _wrong_with(problem: GroupProblem, launch: GroupLaunch) -> str | None:
    if launch.kind == "library":
        return None
    if launch.kind not in ("slices", "tiles"):
        return f"there is no kernel {launch.kind!r}"
    if problem.dtype not in HALVES:
        return f"tensor cores do not multiply {problem.dtype}"
    sizes = launch.rows, launch.columns, launch.slices, launch.warps
    if any(size < 1 or size & (size - 1) for size in sizes):
        return "sizes are powers of two"
    if launch.slices != (launch.warps if launch.kind == "slices" else 1):
        return "every warp has a slice, or there is one"
    if launch.rows < 8 or launch.columns < 16:
        return "tensor cores take 8 rows and 16 columns"
    blocks = problem.blocks
    if launch.parts < 1 or (launch.parts - 1) * steps_of(problem, launch) * launch.slices >= blocks:
        return "a part has nothing to add up"
    return None


def steps_of(problem: GroupProblem, launch: GroupLaunch) -> int:
    """Of each part."""
    steps = -(-problem.blocks // launch.slices)
    return -(-steps // launch.parts)


def packed_bytes(problem: GroupProblem) -> float:
    """Of the weight: codes, words of groups, what outliers have beside."""
    words = -(-problem.inner // problem.group) * (1 if problem.double else 4)
    codes = problem.blocks * problem.block * problem.bits // 8
    return problem.columns * (codes + words + problem.slots * problem.half)


def _launches(problem: GroupProblem) -> Iterator[GroupLaunch]:
    """Those to choose from, each in one part."""
    yield LIBRARY
    if problem.dtype not in HALVES:
        return
    high = max(8, 1 << (problem.rows - 1).bit_length())
    if problem.rows <= 64 and problem.bits < 4:
        yield from _slices_of_planes(problem, min(high, 32))
    elif problem.rows <= 32:
        for wide in (16, 32, 64):
            if high * wide <= 1024:
                yield GroupLaunch("slices", high, wide, 4, 1, 4, 3 if wide == 64 else 4)
    if problem.rows > 16 and problem.inner % 8 == 0:
        # Sums are held twice: four warps have not the registers for 64 rows of 128, nor eight for 128 beside
        # many planes or scales.
        stages = _AHEAD if problem.slots else 3
        yield GroupLaunch("tiles", 64, 64, 1, 1, 4, stages)
        yield GroupLaunch("tiles", 64, 128, 1, 1, 8, stages)
        if problem.bits == 4 or (problem.bits == 2 and problem.group > 32):
            yield GroupLaunch("tiles", 128, 128, 1, 1, 8, stages)


def _slices_of_planes(problem: GroupProblem, high: int) -> Iterator[GroupLaunch]:
    """Those of ``high`` rows whose registers are enough, and whose steps are not more than shared memory
    holds: compiled for sm_90."""
    stages = _AHEAD if problem.slots else 6 - problem.bits
    if problem.half == 16:
        sizes: tuple[tuple[int, int], ...] = ((16, 4 if high == 32 else 8),)
    elif problem.bits == 2:
        narrow = high == 32 or (high == 8 and not problem.slots)
        sizes = ((16, 4 if narrow else 8), (32, 4), *(() if high == 32 else ((32, 8),)))
    else:
        if not problem.slots:
            high = min(high, 16)
        sizes = {8: ((16, 8), (32, 4), (32, 8)), 16: ((16, 4), (16, 8), (32, 4)), 32: ((16, 4),)}[high]
    for wide, slices in sizes:
        yield GroupLaunch("slices", high, wide, slices, 1, slices, stages)


def _programs(problem: GroupProblem, launch: GroupLaunch) -> int:
    return -(-problem.rows // launch.rows) * -(-problem.columns // launch.columns)


def _in_parts(problem: GroupProblem, launch: GroupLaunch, processors: int) -> GroupLaunch:
    """``launch`` with its sums in parts, so that its programs fill a GPU twice."""
    if launch.kind == "library":
        return launch
    steps = -(-problem.blocks // launch.slices)
    parts = min(-(-2 * processors // _programs(problem, launch)), PARTS, steps // launch.stages)
    if parts < 2:
        return launch
    # Every part has the same number of steps, the last perhaps fewer: none has nothing to do.
    return launch._replace(parts=-(-steps // -(-steps // parts)))


def predicted_seconds(problem: GroupProblem, launch: GroupLaunch, processors: int) -> float:
    """Seconds of ``problem``."""
    rows, columns, inner, dtype = problem[:4]
    weight, size = packed_bytes(problem), dtype.itemsize
    if launch.kind == "library":
        dense = dense_seconds(Problem(rows, columns, inner, dtype, torch.int8))
        return (weight + columns * inner * size) / _COPY + dense + _LAUNCH
    moved = weight + rows * inner * size + rows * columns * size
    across = -(-rows // launch.rows)
    programs = _programs(problem, launch) * launch.parts
    weights = columns * inner * across
    share = _WARP_GROUPS if launch.kind == "tiles" else _WARPS
    multiplied = 2 * launch.rows * weights / (_TENSOR * share)
    busy = min(1.0, programs / processors)
    if launch.parts > 1:
        moved += 8 * launch.parts * rows * columns
    computed = max(weights * _slots(problem, launch) / _ISSUED[launch.kind], multiplied) / busy
    step = launch.columns * launch.slices * problem.block * problem.bits // 8 * launch.stages
    waited = streamed_seconds(problem, launch, moved, programs, step, processors)
    starts = _START + _LAUNCH * (launch.parts > 1)
    slower = _MANY if launch.kind == "slices" and launch.rows > 16 else 1.0
    return slower * (max(computed, waited) + _BESIDE * min(computed, waited)) + starts


def _slots(problem: GroupProblem, launch: GroupLaunch) -> float:
    """Instructions for a weight in each row of tiles."""
    converted = 3.9 if problem.levels else _CONVERTED[problem.bits]
    if problem.slots:
        converted += _EXTRA / problem.block
    # Each time that a block has twice the groups there are words of their own.
    converted += 0.25 * math.log2(max(1.0, min(problem.block, 128) / problem.group))
    unaligned = 0.0 if problem.inner % 8 == 0 else _UNALIGNED * launch.rows / launch.columns
    scaled = launch.rows / 8 * (8 / min(problem.group, 2 * problem.half)) * 0.5
    if launch.kind == "tiles":
        return converted + 2 + 2 * scaled / launch.warps + unaligned
    # Addresses and waiting are shared by the columns of a slice.
    beside = {64: 34, 128: 18}.get(problem.block, 10) / launch.columns
    return converted + beside + scaled + launch.rows * (0.02 + 0.3 / launch.columns) + unaligned
