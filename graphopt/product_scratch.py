"""What products of matrices take beside their result on the CPU at hand.

A library that lacks instructions for a dtype sums in memory of its own: without AVX512-BF16 or AMX, a product
of bfloat16 takes four bytes for each element of its result. Operators that multiply in steps take that in
each step, so what is stated of them counts it. Measured rather than looked up: it depends on the library.
"""

from __future__ import annotations

import functools

import torch

from graphopt import _torch

__all__ = ["product_scratch"]

_LARGEST, _MOST_FLOPS = 64 << 20, 5 * 10**9
"""Bytes and FLOPs of products that are run to find out."""

_ALIGNMENT = 512
"""Bytes by which memory for sums was seen to exceed the sums, and more."""


def product_scratch(
    left: tuple[int, int], right: tuple[int, int], dtype: torch.dtype, *, turned: str = ""
) -> int:
    """Bytes that ``left @ right``, shapes of matrices, takes beside its result, which is of ``dtype`` too.

    ``turned``: which of ``"left"`` and ``"right"`` is the transpose of a matrix whose rows are contiguous.
    0 for float32 and float64, which libraries sum in place.
    """
    if dtype not in (torch.bfloat16, torch.float16) or 0 in (*left, *right):
        return 0
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    (rows, inner), columns = left, right[1]
    touched = (rows * inner + inner * columns + rows * columns) * dtype.itemsize
    sums = 4 * rows * columns
    if _torch.profiler_running():
        # Nothing can be measured: the most that was seen.
        return sums + _ALIGNMENT
    if touched + sums <= _LARGEST and 2 * rows * inner * columns <= _MOST_FLOPS:
        found = _measured(rows, inner, columns, dtype, turned, threads, exact)
    else:
        # Sums of a whole result, or none.
        found = _measured(min(rows, 64), min(inner, 64), min(columns, 64), dtype, turned, threads, exact)
        found = sums + _ALIGNMENT if found else 0
    return found


@functools.cache
def _measured(
    rows: int, inner: int, columns: int, dtype: torch.dtype, turned: str, threads: int, exact: bool
) -> int:
    running = peak = 0
    with _torch.without_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        left, right = (
            torch.ones(shape[::-1], dtype=dtype).t() if turned == which else torch.ones(shape, dtype=dtype)
            for which, shape in (("left", (rows, inner)), ("right", (inner, columns)))
        )
        out = torch.empty(rows, columns, dtype=dtype)
        for event in _torch.record_allocations(lambda: torch.mm(left, right, out=out)):
            running += event
            peak = max(peak, running)
    return peak
