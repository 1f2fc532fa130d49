"""Triton source of ``graphopt_kernels.row_quantize``. Imports triton: import it lazily.

Kernel arguments are not annotated: triton evaluates annotations, and would take ``Any`` for a
global variable of the kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphopt_kernels.row_norm_triton import normalized

__all__ = ["DTYPES", "over", "quantize_kernel"]

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit  # type: ignore[untyped-decorator]
def over(y, scale, TINY: tl.constexpr):  # type: ignore[no-untyped-def]
    """``y / scale``, rounded as a division is, for a product and two fused ones an element. ``TINY``: scales
    may be so small that their inverse overflows."""
    if TINY:
        boost = tl.where(scale < 1e-30, 7.922816251426434e28, 1.0)
        y *= boost
        scale *= boost
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    about = y * inverse
    # Over infinity everything finite is zero, without a correction that would be NaN.
    known = tl.where(scale < float("inf"), scale, 0.0)
    return tl.fma(tl.fma(-about, known, y), inverse, about)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    data,
    weight,
    bias,
    codes,
    scales,
    rows,
    eps,
    offset,
    limit,
    least,
    NORMALIZED: tl.constexpr,
    CENTERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    ROUNDED: tl.constexpr,
    OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    CLAMPED: tl.constexpr,
    TINY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``ROWS`` rows for each program, in registers from their norm to their codes.

    ``NORMALIZED``: what is quantized is the norm of the rows, rounded to ``DTYPE``; without it ``weight`` is
    what the columns are multiplied by in float32, if ``WEIGHTED``. ``WHOLE``: codes are
    integers. ``CLAMPED``: the limit is not what conversions keep to or whole numbers are rounded to.
    ``TINY`` as in ``over``.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < WIDTH)
    place = row * WIDTH + at
    y = tl.load(data + place, mask=inside, other=0.0)
    if NORMALIZED:
        y, _, _ = normalized(
            y, inside, at, weight, bias, 0.0, 0.0, eps, offset,
            CENTERED, WEIGHTED, BIASED, ROUNDED, OFFSET, WIDTH, False,
        )  # fmt: skip
        y = y.to(DTYPE)
    y = y.to(tl.float32)
    if WEIGHTED and not NORMALIZED:
        y *= tl.load(weight + at, mask=at < WIDTH, other=0.0)
    # As integers, so that a NaN is the largest of all.
    bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 1.0, tl.float32) * limit)
    scale = tl.where(scale < least, least, scale)
    tl.store(scales + row, scale, mask=row < rows)
    y = over(y, scale, TINY)
    if WHOLE:
        # Adding and taking away 1.5 * 2^23 rounds halves to even.
        y = (y + 12582912.0) - 12582912.0
    if CLAMPED:
        y = tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))
    tl.store(codes + place, y.to(codes.dtype.element_ty), mask=inside)
