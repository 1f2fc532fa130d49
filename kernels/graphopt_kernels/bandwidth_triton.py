"""Triton sources of ``graphopt_kernels.bandwidth``. Imports triton: import it lazily.

Kernel arguments are not annotated: triton evaluates annotations, and would take ``Any`` for a
global variable of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["copy_kernel", "read_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def copy_kernel(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``target[i] = source[i]`` for one block of elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(source, sums, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``sums[b]`` = float32 sum of block ``b``: one write for many reads."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < count, other=0.0)
    tl.store(sums + block, tl.sum(values.to(tl.float32), axis=0))
