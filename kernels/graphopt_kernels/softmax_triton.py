"""Triton source of ``graphopt_kernels.softmax``. Imports triton: import it lazily.

Kernel arguments are not annotated: triton evaluates annotations, and would take ``Any`` for a
global variable of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.cross_entropy_rows_triton import exponential

__all__ = ["forward_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    data,
    result,
    rows,
    LOG: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``ROWS`` rows for each program, in registers from their maximum to the result."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < WIDTH)
    place = row * WIDTH + at
    x = tl.load(data + place, mask=inside, other=float("-inf")).to(tl.float32)
    # The maximum of a row with NaN is any; that of nothing but -inf makes NaN of it, as it should.
    x -= tl.max(x, axis=1, keep_dims=True)
    share = exponential(x)
    total = tl.sum(share, axis=1, keep_dims=True)
    y = x - tl.log(total) if LOG else share * (1.0 / total)
    tl.store(result + place, y.to(result.dtype.element_ty), mask=inside)
