"""Triton source of ``causal_conv::forward``. Imports triton: import it lazily."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["forward_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    data,
    weight,
    bias,
    result,
    channels,
    length,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """``BLOCK`` elements of one row; neighbours are read again from the cache, not from memory."""
    row = tl.program_id(0).to(tl.int64)
    channel = row % channels
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = row * length
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TAPS):
        place = at + (TAPS - 1 - k) if REVERSE else at - (TAPS - 1 - k)
        x = tl.load(data + start + place, mask=(place >= 0) & (place < length), other=0.0)
        total += tl.load(weight + channel * TAPS + k).to(tl.float32) * x.to(tl.float32)
    if BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(result + start + at, total.to(result.dtype.element_ty), mask=at < length)
