"""How a product that reads weights of a byte is started: which kernel, in which tiles, by its sizes.

    problem = Problem(rows, columns, inner, torch.bfloat16, torch.int8)
    launch = launch_for(problem, multiprocessors)

Every kernel that takes a problem is predicted to be as slow as its slowest resource, memory, instructions or
tensor cores, on as much of the device as its programs fill, and a launch for each kernel; the fastest is
taken. ``library`` stands for what always works: unpacking the weight and a dense product of it, or, where x
is rounded as well, the library's product of eight-bit numbers. Slots of instructions are counted in
disassemblies for sm_90; rates are those of an H200 (``graphopt_cost_model/devices/h200.yaml``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from graphopt.candidate import Reason

__all__ = [
    "HALVES", "LIBRARY", "LIBRARY_ROWS", "PARTS", "PROCESSORS", "Launch", "Problem", "check_launch",
    "dense_seconds", "in_parts", "kernel_seconds", "launch_for", "launches", "predicted_seconds", "steps_of",
    "streamed_seconds", "usual_launch",
]  # fmt: skip

_READ, _STREAMED = 4.28e12, 3.65e12
"""Bytes a second from memory, and what kernels get of it that go through shared memory."""

_COPY = 4.28e12
_SLOTS = 33.5e12 * 0.8
"""Of lanes, and the share of them that a loop with loads and barriers gets."""

_UNPACKED = 0.3 / 0.8
"""Of that, what tiles get that turn codes into operands of warp groups between two waits."""

_TENSOR = {2: 790e12, 1: 1580e12}
"""FLOP/s of tensor cores by bytes of an operand."""

_LIBRARY = {torch.int8: 0.5, torch.float8_e4m3fn: 0.87}
_DENSE = 0.98
_WARP_GROUPS, _ROUNDED, _WARPS = 0.6, 0.88, 0.45
"""Shares of that: of the library for eight-bit numbers and for dense operands, of tiles that warp groups
multiply, with operands from registers and from shared memory, of what single warps do."""

_TILE = 128
"""Rows and columns of a tile of the library's product of eight-bit numbers."""

_LIBRARY_READ = ((32, 0.8), (64, 0.5))
"""Of memory's rate, what the library's product of integers reads a weight with, up to so many rows."""

_LAUNCH = 2e-6
"""Seconds from a kernel to the next one of the same product, in a queue that is not empty."""

_STARTS = {"row": 1.5e-6, "slices": 4.5e-6, "tiles": 4.5e-6, "library": 6e-6}
"""Seconds until a kernel gets going and to its end, in a queue of others, as measured on an H200
(``benchmarks/sweep_packed.py``, ``benchmarks/gpu_quantized.py``)."""

_AHEAD = 40_000
"""Bytes on their way that keep a multiprocessor's memory busy."""

_SHARED = 200_000
_CACHED = 10e12
"""Bytes of shared memory; bytes a second that inputs are read with again, from the cache."""

PROCESSORS = 132
"""Of an H100 or H200: where no device is there to be asked."""

PARTS = 16
"""Most programs that share a sum."""

_BESIDE = 0.1
"""Of what is hidden behind the slower one of memory and computation, so much is not."""

LIBRARY_ROWS = 16
"""The library multiplies eight-bit numbers for more rows than these."""

_CONVERTED = {
    (torch.int8, torch.float32): 2.25,
    (torch.int8, torch.float16): 1.25,
    (torch.int8, torch.bfloat16): 2.0,
    (torch.float8_e4m3fn, torch.float32): 1.5,
    (torch.float8_e4m3fn, torch.float16): 0.5,
    (torch.float8_e4m3fn, torch.bfloat16): 2.5,
}
"""Instructions that make a number of a code."""

HALVES = (torch.bfloat16, torch.float16)


class Sizes(Protocol):
    """What all problems have."""

    @property
    def inner(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...


class Staged(Protocol):
    """What all launches have."""

    @property
    def rows(self) -> int: ...
    @property
    def parts(self) -> int: ...


class Problem(NamedTuple):
    """x [``rows``, ``inner``] of ``dtype`` times a weight [``columns``, ``inner``] of ``codes``; ``rounded``:
    x is of ``codes`` too when it is multiplied."""

    rows: int
    columns: int
    inner: int
    dtype: torch.dtype
    codes: torch.dtype
    rounded: bool = False


class Launch(NamedTuple):
    """``kind``: ``row``, ``slices``, ``tiles``, or ``library``. A program computes ``columns`` results of
    ``rows`` rows, ``inner`` products of each in a step and slice; ``parts`` programs share a sum."""

    kind: str
    rows: int
    columns: int
    inner: int
    slices: int
    parts: int
    warps: int
    stages: int


LIBRARY = Launch("library", 1, 1, 1, 1, 1, 1, 1)


def launch_for(problem: Problem, processors: int, library: bool = True) -> Launch:
    """The launch that is predicted to be fastest; without ``library`` the library's product of eight-bit
    numbers is none to choose from."""
    found = launches(problem, processors, library)
    return min(found, key=lambda launch: predicted_seconds(problem, launch, processors))


def usual_launch(problem: Problem) -> Launch:
    """``launch_for`` an H100 or H200."""
    return launch_for(problem, PROCESSORS)


def launches(problem: Problem, processors: int, library: bool = True) -> list[Launch]:
    """All that are weighed."""
    found = [
        launch
        for whole in _launches(problem, library)
        for launch in (whole, in_parts(problem, whole, processors))
    ]
    return list(dict.fromkeys(found))


def check_launch(problem: Problem, launch: Launch) -> Reason | None:
    """``None``, or why ``launch`` would not compute ``problem``."""
    text = _wrong_with(problem, launch)
    return None if text is None else Reason(text)


def _wrong_with(problem: Problem, launch: Launch) -> str | None:
    if launch.kind == "library":
        takes = not problem.rounded or _library_takes(problem)
        return None if takes else "the library does not multiply eight-bit numbers of these sizes"
    if launch.kind not in ("row", "slices", "tiles"):
        return f"there is no kernel {launch.kind!r}"
    if launch.kind == "row" and (problem.rows != 1 or problem.rounded):
        return "rows are multiplied one at a time, as they are"
    if launch.kind != "row" and not problem.rounded and problem.dtype not in HALVES:
        return f"tensor cores do not multiply {problem.dtype}"
    sizes = launch.rows, launch.columns, launch.inner, launch.slices, launch.warps
    if any(size < 1 or size & (size - 1) for size in sizes):
        return "sizes are powers of two"
    if launch.kind == "slices" and launch.slices != launch.warps:
        return "every warp has a slice"
    if launch.kind == "row" and (launch.inner < 512 or launch.columns < launch.warps):
        return "a warp reads 512 bytes of a row or more"
    if launch.kind != "row" and (launch.rows < 8 or launch.columns < 16 or launch.inner < 32):
        return "tensor cores take 8 rows, 16 columns and 32 products"
    step = launch.inner * launch.slices
    if launch.parts < 1 or (launch.parts - 1) * steps_of(problem, launch) * step >= problem.inner:
        return "a part has nothing to add up"
    return None


def steps_of(problem: Problem, launch: Launch) -> int:
    """Of each part."""
    steps = -(-problem.inner // (launch.inner * launch.slices))
    return -(-steps // launch.parts)


def _library_takes(problem: Problem) -> bool:
    """Whether the library multiplies eight-bit numbers of these sizes, into this dtype."""
    if problem.rows <= LIBRARY_ROWS:
        return False
    if problem.codes is torch.int8:
        return problem.columns % 8 == problem.inner % 8 == 0
    return problem.columns % 16 == problem.inner % 16 == 0 and problem.dtype is torch.bfloat16


def _launches(problem: Problem, library: bool) -> Iterator[Launch]:
    """Those to choose from, each in one part."""
    rows = problem.rows
    if not problem.rounded or (library and _library_takes(problem)):
        yield LIBRARY
    if rows == 1 and not problem.rounded:
        yield _row(problem)
    if not problem.rounded and problem.dtype not in HALVES:
        return
    high = max(8, 1 << (rows - 1).bit_length())
    if problem.inner % 16 and rows > 16:
        # Rows that do not begin on 16 bytes are loaded byte by byte, each with an address of its own.
        if problem.rounded:
            yield Launch("tiles", 64, 32, 32, 1, 1, 4, 2)
        return
    if high <= 32:
        for wide in (16, 32, 64):
            yield Launch("slices", high, wide, 128 if high <= 16 else 64, 4, 1, 4, 4)
    if 16 <= high <= 32 and not problem.rounded:
        yield Launch("tiles", high, 64, 128, 1, 1, 2, 4)
    if problem.rounded:
        few = Launch("tiles", 64, 128, 128, 1, 1, 4, 4)
        yield few if rows <= 64 else Launch("tiles", 128, 128, 128, 1, 1, 8, 3)
        return
    for high, wide, warps, stages in ((64, 128, 4, 4), (128, 128, 8, 3), (256, 128, 8, 3)):
        yield Launch("tiles", high, wide, 64, 1, 1, warps, stages)


def _row(problem: Problem) -> Launch:
    """Steps are short where a row is, and warps many where rows are few."""
    wide, inner, warps = (16, 2048, 8) if problem.columns <= 8192 else (16, 1024, 4)
    if problem.columns > 24576:
        wide, inner, warps = 8, 2048, 4
    if problem.dtype is torch.float32:
        inner //= 2
    whole = 1 << max(0, -(-problem.inner // 512) - 1).bit_length()
    return Launch("row", 1, wide, min(inner, 512 * whole), 1, 1, warps, 1)


def _programs(problem: Problem, launch: Launch) -> int:
    return -(-problem.rows // launch.rows) * -(-problem.columns // launch.columns)


def in_parts(problem: Problem, launch: Launch, processors: int) -> Launch:
    """``launch`` with its sums in parts, so that its programs fill a GPU twice."""
    if launch.kind == "library":
        return launch
    steps = -(-problem.inner // (launch.inner * launch.slices))
    parts = min(-(-2 * processors // _programs(problem, launch)), PARTS, steps // launch.stages)
    if parts < 2:
        return launch
    # Every part has the same number of steps, the last perhaps fewer: none has nothing to do.
    return launch._replace(parts=-(-steps // -(-steps // parts)))


def predicted_seconds(problem: Problem, launch: Launch, processors: int) -> float:
    """Seconds of ``problem``, rounding x apart, which all launches have in common."""
    rows, columns, inner, dtype, codes, rounded = problem
    size = 1 if rounded else dtype.itemsize
    moved = columns * inner + rows * inner * size + rows * columns * dtype.itemsize
    flops = 2 * rows * columns * inner
    rate = _TENSOR.get(size, 53e12)
    if launch.kind == "library":
        if not rounded:
            unpacked = columns * inner * (1 + dtype.itemsize) / _COPY + _unaligned(problem) / _SLOTS
            return unpacked + dense_seconds(problem) + _LAUNCH
        # Few tiles leave multiprocessors idle, each of them takes its whole sum.
        turns = -(-(-(-rows // _TILE) * -(-columns // _TILE)) // processors)
        filled = turns * 2 * _TILE * _TILE * inner / (rate * _LIBRARY[torch.float8_e4m3fn] / processors)
        shares = () if codes is torch.float8_e4m3fn else _LIBRARY_READ
        read = moved / (_READ * next((share for most, share in shares if rows <= most), 1.0))
        seconds = max(flops / (rate * _LIBRARY[codes]), read, filled) + _STARTS["library"]
        if codes is torch.float8_e4m3fn:
            return seconds
        # Sums of 32 bits are written and read again, by a kernel of its own.
        return seconds + 8 * rows * columns / _COPY + _LAUNCH
    across = -(-rows // launch.rows)
    slots = across * (columns * inner * _slots(problem, launch) + _unaligned(problem))
    padded = 0.0 if launch.kind == "row" else 2 * across * launch.rows * columns * inner / rate
    return kernel_seconds(problem, launch, moved, slots, padded, processors)


def kernel_seconds(
    problem: Problem,
    launch: Launch,
    moved: int,
    slots: float,
    multiplying: float,
    processors: int,
    each: int = 1,
    many: float = 1.6,
) -> float:
    """Seconds of kernels that move ``moved`` bytes and issue ``slots`` instructions of lanes, and would
    take tensor cores ``multiplying`` seconds at their full rate. ``each``: bytes for a unit of ``inner``.
    ``many``: how many times as long slices of more than 16 rows were measured to take."""
    programs = _programs(problem, launch) * launch.parts
    grouped = launch.kind == "tiles" and launch.warps >= 4
    share = (_ROUNDED if problem.rounded else _WARP_GROUPS) if grouped else _WARPS
    issued = _SLOTS * (_UNPACKED if grouped and not problem.rounded else 1.0)
    busy = min(1.0, programs / processors)
    if launch.parts > 1:
        moved += 8 * launch.parts * problem.rows * problem.columns
    computed = max(slots / issued, multiplying / share) / busy
    waited = moved / _READ
    if launch.kind != "row":
        staged = launch.columns * launch.inner * launch.slices * launch.stages * each
        waited = streamed_seconds(problem, launch, moved, programs, staged, processors)
    starts = _STARTS[launch.kind] + _LAUNCH * (launch.parts > 1)
    slower = many if launch.kind == "slices" and launch.rows > 16 else 1.0
    return slower * (max(computed, waited) + _BESIDE * min(computed, waited)) + starts


def streamed_seconds(
    problem: Sizes, launch: Staged, moved: float, programs: int, staged: int, processors: int
) -> float:
    """Seconds until ``moved`` bytes have come to ``programs``, each with ``staged`` of them on their way, and
    the rows of x to each once more."""
    held = min(programs, processors * max(1, _SHARED // staged)) * staged
    share = min(1.0, held / (_AHEAD * processors), 1.6 * programs / processors)
    again = programs / launch.parts * launch.rows * problem.inner * problem.dtype.itemsize
    return moved / (_STREAMED * share) + 0.5 * again / _CACHED


def dense_seconds(problem: Problem) -> float:
    """Seconds of a dense product of the same sizes, of the dtype of x."""
    rows, columns, inner, dtype = problem[:4]
    moved = (columns * inner + rows * inner + rows * columns) * dtype.itemsize
    rate = _TENSOR.get(dtype.itemsize, 53e12) * _DENSE
    return max(2 * rows * columns * inner / rate, moved / _READ) + _STARTS["library"]


def _slots(problem: Problem, launch: Launch) -> float:
    """Instructions for a weight in each row of tiles."""
    converted = _CONVERTED.get((problem.codes, problem.dtype), 2.0)
    if launch.kind == "row":
        return converted + 2.5
    if problem.rounded:
        converted = 0.5 if problem.codes is torch.float8_e4m3fn and launch.kind == "slices" else 0.0
    if launch.kind == "tiles" and launch.warps >= 4:
        # Bytes come from shared memory two at a time where warp groups take them from registers.
        return 1.5 if problem.rounded else converted + 5
    return converted + 1 + launch.rows * (0.03 + 0.8 / launch.columns)


def _unaligned(problem: Problem) -> float:
    """Instructions for weights that cannot be loaded 16 bytes at a time."""
    return 0.0 if problem.inner % 16 == 0 else 6.0 * problem.columns * problem.inner
