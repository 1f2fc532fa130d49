"""Triton source of ``graphopt_kernels.dropout_add``. Imports triton: import it lazily.

Kernel arguments are not annotated: triton evaluates annotations, and would take ``Any`` for a
global variable of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.philox_triton import factors_of_block

__all__ = ["dropout_add_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def dropout_add_kernel(  # type: ignore[no-untyped-def]
    data, residual, result, seed, size, cut, kept, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    """``BLOCK`` elements for each program."""
    # Beyond what 32 bits can tell, where there are that many.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = start + at < size
    x = tl.load(data + start + at, mask=inside, other=0.0).to(tl.float32)
    y = x * factors_of_block(tl.load(seed), start, cut, kept, BLOCK)
    if ADDS:
        y += tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + start + at, y.to(result.dtype.element_ty), mask=inside)
