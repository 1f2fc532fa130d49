"""A row times a weight of four or eight bits by products of integers: x in two digits of eight bits.

    v = round(x * 32512 / s)    s the largest |x| of the 16 or 32 numbers that a lane multiplies at a time
    v = d0 + 256 * d1           d0 from 0 to 255, d1 from -127 to 127

What is left out is at most 2**-16 of the largest |x| among neighbours, less than rounding the result to half
a precision does. An instruction (``dp4a``) adds four products of bytes to a sum: codes are multiplied as they
are read, four bits of a word at a time masked, where making each a float first takes more instructions than a
multiprocessor issues while memory delivers the codes. Sums of 32 products are exact; they are scaled and
added up in float32. A number that is not finite makes all results NaN.

Warps share a row's products, and every warp makes the digits of its part of x once for all rows of the
program. The zero of a group of int4 is multiplied by the sum of the digits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from graphopt_kernels.quantized.bytes_triton import gated

__all__ = ["row_digits_kernel"]

_MAGIC: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2**23: integers added to it are the last bits of a float32."""

_DIGITS: tl.constexpr = tl.constexpr(
    """{ .reg .b32 t, u;
    prmt.b32 t, $2, $3, 0x5410; prmt.b32 u, $4, $5, 0x5410;
    prmt.b32 $0, t, u, 0x6420; prmt.b32 $1, t, u, 0x7531; }"""
)
_SUMS: tl.constexpr = tl.constexpr(
    "{ .reg .b32 n; mov.b32 n, 0; dp4a.u32.u32 $0, $2, 0x01010101, n; dp4a.s32.u32 $1, $3, 0x01010101, n; }"
)
_PRODUCTS4: tl.constexpr = tl.constexpr(
    """{ .reg .b32 l, h, n; mov.b32 n, 0;
    and.b32 l, $4, 0x0F0F0F0F; shr.b32 h, $4, 4; and.b32 h, h, 0x0F0F0F0F;
    dp4a.u32.u32 $0, l, $5, n; dp4a.u32.s32 $1, l, $6, n;
    dp4a.u32.u32 $2, h, $7, n; dp4a.u32.s32 $3, h, $8, n; }"""
)
_PRODUCTS8: tl.constexpr = tl.constexpr(
    "{ .reg .b32 n; mov.b32 n, 0; dp4a.s32.u32 $0, $2, $3, n; dp4a.s32.s32 $1, $2, $4, n; }"
)


@triton.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def _dot(a, b, SIGNED_A: tl.constexpr, SIGNED_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of four products of bytes."""
    total = a * 0 + b * 0
    for byte in tl.static_range(4):
        x, y = (a >> (8 * byte)) & 255, (b >> (8 * byte)) & 255
        if SIGNED_A:
            x = (x ^ 128) - 128
        if SIGNED_B:
            y = (y ^ 128) - 128
        total += x * y
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _digits(v, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Low and high digits, four in a word, of the last 16 bits of ``v`` [32, warps, sides, 4 words, 4]."""
    WARPS: tl.constexpr = v.shape[1]
    SIDES: tl.constexpr = v.shape[2]
    even, odd = tl.split(tl.reshape(v, (32, WARPS, SIDES, 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    if FAST:
        low, high = tl.inline_asm_elementwise(
            _DIGITS, "=&r,=&r,r,r,r,r", [first, second, third, fourth],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low = (first & 255) | ((second & 255) << 8) | ((third & 255) << 16) | ((fourth & 255) << 24)
        high = ((first >> 8) & 255) | (second & 0xFF00) | ((third & 0xFF00) << 8)
        high |= (fourth & 0xFF00) << 16
    return low, high


@triton.jit
def _whole(low, high):  # type: ignore[no-untyped-def]
    """The sum over words of products with low digits and, 256 times, with high ones; below 2**26."""
    LAST: tl.constexpr = len(low.shape) - 1
    return tl.sum(low, LAST) + 256 * tl.sum(high, LAST)


@triton.jit  # type: ignore[untyped-decorator]
def _floats(at, ks, K, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if EVEN:
        return tl.load(at + ks).to(tl.float32)
    else:
        return tl.load(at + ks, mask=ks < K, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _part(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, ks, K, offset,
    NORMED: tl.constexpr, WEIGHED: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Digits of x at ``ks`` [32, warps, sides, 2, 8], what the last is worth, and squares of x, both by lane
    and warp."""
    WARPS: tl.constexpr = ks.shape[1]
    SIDES: tl.constexpr = ks.shape[2]
    x = _floats(x_ptr, ks, K, EVEN)
    squares = tl.zeros((32, WARPS), tl.float32)
    if NORMED:
        squares = tl.sum(tl.reshape(x * x, (32, WARPS, SIDES * 16)), 2)
    if WEIGHED:
        x *= _floats(norm_ptr, ks, K, EVEN) + offset
    most = tl.reduce(tl.reshape(tl.abs(x), (32, WARPS, SIDES * 16)), 2, _larger)
    worth = tl.where(most < float("inf"), tl.maximum(most, 1e-30) / 32512.0, float("nan"))
    times = 1.0 / worth
    whole = (x * times[:, :, None, None, None] + _MAGIC).to(tl.int32, bitcast=True)
    low, high = _digits(tl.reshape(whole, (32, WARPS, SIDES, 4, 4)), FAST)
    return low, high, worth, squares


@triton.jit  # type: ignore[untyped-decorator]
def _products(codes, low, high, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of codes of eight bits [32, warps, rows, 4 words] and digits, by lane, warp and row."""
    low = tl.broadcast_to(low, codes.shape)
    high = tl.broadcast_to(high, codes.shape)
    if FAST:
        a, b = tl.inline_asm_elementwise(
            _PRODUCTS8, "=&r,=&r,r,r,r", [codes, low, high], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        a, b = _dot(codes, low, True, False), _dot(codes, high, True, True)
    return _whole(a, b)


@triton.jit  # type: ignore[untyped-decorator]
def _products_of_halves(codes, low, high, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of codes of four bits and digits [32, warps, 2 halves, 4 words]: of either half, and sums of the
    digits themselves."""
    WARPS: tl.constexpr = codes.shape[1]
    low_a, low_b = tl.split(tl.permute(low, (0, 1, 3, 2)))
    high_a, high_b = tl.split(tl.permute(high, (0, 1, 3, 2)))
    if FAST:
        of_low, of_high = tl.inline_asm_elementwise(
            _SUMS, "=&r,=&r,r,r", [low, high], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        ones = low * 0 + 0x01010101
        of_low, of_high = _dot(low, ones, False, False), _dot(high, ones, True, False)
    sum_a, sum_b = tl.split(_whole(of_low, of_high))
    low_a = tl.broadcast_to(tl.reshape(low_a, (32, WARPS, 1, 4)), codes.shape)
    low_b = tl.broadcast_to(tl.reshape(low_b, (32, WARPS, 1, 4)), codes.shape)
    high_a = tl.broadcast_to(tl.reshape(high_a, (32, WARPS, 1, 4)), codes.shape)
    high_b = tl.broadcast_to(tl.reshape(high_b, (32, WARPS, 1, 4)), codes.shape)
    if FAST:
        a, b, c, d = tl.inline_asm_elementwise(
            _PRODUCTS4, "=&r,=&r,=&r,=&r,r,r,r,r,r", [codes, low_a, high_a, low_b, high_b],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        first, second = codes & 0x0F0F0F0F, (codes >> 4) & 0x0F0F0F0F
        a, b = _dot(first, low_a, False, False), _dot(first, high_a, False, True)
        c, d = _dot(second, low_b, False, False), _dot(second, high_b, False, True)
    return _whole(a, b), _whole(c, d), sum_a, sum_b


@triton.jit
def _grouped(words, products, sums):  # type: ignore[no-untyped-def]
    """Products of a group's codes, less the zero times the sum of digits, times the scale."""
    zeros = ((words & 127) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return (words & -256).to(tl.float32, bitcast=True) * (
        products.to(tl.float32) - (zeros * 0.125) * sums.to(tl.float32)
    )


@triton.jit  # type: ignore[untyped-decorator]
def _read(at, inside, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit  # type: ignore[untyped-decorator]
def row_digits_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, bias_ptr, norm_ptr, added_ptr, out_ptr, N, K, GROUPS, eps, offset,
    BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BIASED: tl.constexpr, NORMED: tl.constexpr,
    WEIGHED: tl.constexpr, ADDED: tl.constexpr, GATE: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    FAST: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [K] times ``BLOCK_N`` rows of the weight a program; arguments as of ``bytes_triton.row_kernel``.

    ``codes`` are words of 32 bits: of eight ``BITS``, with ``scales`` float32[N], or of four in blocks of
    ``2 * HALF`` (``nibbles``), with words of ``GROUP`` neighbours (``group_products``). A step is 512 bytes
    of a row for each warp; codes of the next are on their way meanwhile."""
    SIDES: tl.constexpr = 2 if BITS == 4 else 1
    PLACE: tl.constexpr = 4096 // BITS
    BOTH: tl.constexpr = BITS == 4 and GROUP == HALF
    if EARLY:
        cuda.gdc_launch_dependents()
    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    row = tl.arange(0, BLOCK_N)[None, None, :, None]
    # Results beyond the last are computed from its weights, and not stored.
    if GATE == "":
        column = tl.minimum(tl.program_id(0) * BLOCK_N + row, N - 1).to(tl.int64)
    else:
        PAIRS: tl.constexpr = BLOCK_N // 2
        column = tl.minimum(tl.program_id(0) * PAIRS + row % PAIRS, N - 1).to(tl.int64) + row // PAIRS * N
    # Rows begin on 16 bytes.
    length = tl.multiple_of(K // (32 // BITS), 4)
    place = warp * 128 + lane * 4 + tl.arange(0, 4)[None, None, None, :]
    codes_at = codes_ptr + column * length + place
    if BITS == 4:
        LANES: tl.constexpr = HALF // 16
        first = lane // LANES * (2 * HALF) + lane % LANES * 16 + warp * PLACE
    else:
        first = lane * 16 + warp * PLACE
    side = tl.arange(0, SIDES)[None, None, :, None, None]
    vector = tl.arange(0, 2)[None, None, None, :, None]
    element = tl.arange(0, 8)[None, None, None, None, :]
    ks = first[:, :, :, :, None] + side * HALF + vector * 8 + element
    codes = _read(codes_at, place < length, EVEN)
    if BITS == 4:
        group = tl.reshape(first, (32, WARPS, 1))
        words_at = scales_ptr + tl.reshape(column, (1, 1, BLOCK_N)) * GROUPS
        words = _read(words_at + group // GROUP, group < K, EVEN)
        if BOTH:
            others = _read(words_at + (group + HALF) // GROUP, group < K, EVEN)
    if EARLY:
        cuda.gdc_wait()
    total = tl.zeros((32, WARPS, BLOCK_N), tl.float32)
    squares = tl.zeros((32, WARPS), tl.float32)
    for step in tl.static_range(STEPS):
        now = codes
        if step + 1 < STEPS:
            ahead = (step + 1) * WARPS
            codes = _read(codes_at + ahead * 128, ahead * 128 + place < length, EVEN)
        at = step * WARPS * PLACE
        low, high, worth, squared = _part(x_ptr, norm_ptr, at + ks, K, offset, NORMED, WEIGHED, EVEN, FAST)
        squares += squared
        if BITS == 4:
            one, other, sum_one, sum_other = _products_of_halves(now, low, high, FAST)
            if BOTH:
                found = _grouped(words, one, sum_one[:, :, None])
                found += _grouped(others, other, sum_other[:, :, None])
            else:
                found = _grouped(words, one + other, (sum_one + sum_other)[:, :, None])
            if step + 1 < STEPS:
                reached = ahead * PLACE + group
                words = _read(words_at + reached // GROUP, reached < K, EVEN)
                if BOTH:
                    others = _read(words_at + (reached + HALF) // GROUP, reached < K, EVEN)
        else:
            found = _products(now, low, high, FAST)
        total += found.to(tl.float32) * worth[:, :, None]
    sums = tl.sum(tl.reshape(total, (32 * WARPS, BLOCK_N)), 0)
    if NORMED:
        sums *= tl.rsqrt(tl.sum(tl.reshape(squares, (32 * WARPS,)), 0) / K + eps)
    if GATE == "":
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        within = columns < N
        if BITS == 8:
            sums *= tl.load(scales_ptr + columns, mask=within, other=0.0)
        if BIASED:
            sums += tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)
    else:
        PAIRED: tl.constexpr = BLOCK_N // 2
        columns = tl.program_id(0) * PAIRED + tl.arange(0, PAIRED)
        within = columns < N
        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, PAIRED)), (1, 0)))
        if BITS == 8:
            gate *= tl.load(scales_ptr + columns, mask=within, other=0.0)
            up *= tl.load(scales_ptr + N + columns, mask=within, other=0.0)
        if BIASED:
            gate += tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + N + columns, mask=within, other=0.0).to(tl.float32)
        sums = gated(gate, up, GATE)
    if ADDED:
        sums += tl.load(added_ptr + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(out_ptr + columns, sums.to(out_ptr.dtype.element_ty), mask=within)
