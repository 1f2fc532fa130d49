"""Triton source of ``outliers.split_rows``. Imports triton: import it lazily."""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.row_quantize_triton import over

__all__ = ["split_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def split_kernel(  # type: ignore[no-untyped-def]
    data, kept, columns, codes, scales, beside, rows, limit, least, COUNT,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows for each program: those of ``columns`` as they are, [.., COUNT], the others rounded to
    int8, as ``row_quantize_triton.quantize_kernel`` does, as if there were zeros instead."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < WIDTH)
    place = row * WIDTH + at
    rounded = tl.load(kept + at, mask=at < WIDTH, other=0) != 0
    y = tl.load(data + place, mask=inside & rounded, other=0.0).to(tl.float32)
    # As integers, so that a NaN is the largest of all.
    bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 1.0, tl.float32) * limit)
    scale = tl.where(scale < least, least, scale)
    tl.store(scales + row, scale, mask=row < rows)
    y = over(y, scale, False)
    # Adding and taking away 1.5 * 2^23 rounds halves to even.
    y = (y + 12582912.0) - 12582912.0
    tl.store(codes + place, y.to(tl.int8), mask=inside)
    for start in range(0, COUNT, WIDE):
        chosen = start + tl.arange(0, WIDE)[None, :]
        there = (chosen < COUNT) & (row < rows)
        column = tl.load(columns + chosen, mask=chosen < COUNT, other=0)
        x = tl.load(data + row * WIDTH + column, mask=there, other=0.0)
        tl.store(beside + row * COUNT + chosen, x, mask=there)
