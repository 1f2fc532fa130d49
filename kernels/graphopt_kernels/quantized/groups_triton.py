"""Products that read weights of four bits, a scale for each group of neighbours, on tensor cores.

As in ``bytes_triton`` the weight is the left-hand operand, taken from registers, and rows of x are what is
padded; codes are streamed once, 16 bytes a thread at a time. A block of codes (``nibbles``) is two products,
one of the low halves of its bytes and one of the high ones. The sum of a group is scaled as it is added to
the total, in float32. Words of groups are given to the instructions that make numbers of codes, whether they
need them or not: the compiler fetches ahead what products depend on.

Ways to turn four bytes into eight numbers (``FAST``), exact all of them:

    int4   16 + code by shift and mask, as bfloat16, less 16 + zero, which is a multiple of 1/8: 13
           instructions. As float16 64 + code and 64 + zero.
    nf4    a byte permutation looks a byte up among eight for each of four codes, twice for sixteen, once for
           each byte of a number: 21 instructions
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["numbers", "slices_kernel", "sum_kernel", "tile_kernel", "unpack_kernel"]

_INT4_TO_BFLOAT16: tl.constexpr = tl.constexpr(
    """{ .reg .b32 u, t;
    prmt.b32 u, $4, 0, 0x3120;
    shl.b32 t, u, 3; lop3.b32 t, t, 0x00780078, 0x41804180, 0xEA; sub.rn.bf16x2 $0, t, $5;
    shr.b32 t, u, 5; lop3.b32 t, t, 0x00780078, 0x41804180, 0xEA; sub.rn.bf16x2 $1, t, $6;
    shr.b32 t, u, 1; lop3.b32 t, t, 0x00780078, 0x41804180, 0xEA; sub.rn.bf16x2 $2, t, $5;
    shr.b32 t, u, 9; lop3.b32 t, t, 0x00780078, 0x41804180, 0xEA; sub.rn.bf16x2 $3, t, $6; }"""
)
_INT4_TO_FLOAT16: tl.constexpr = tl.constexpr(
    """{ .reg .b32 u, t;
    prmt.b32 u, $4, 0, 0x3120;
    shl.b32 t, u, 4; lop3.b32 t, t, 0x00F000F0, 0x54005400, 0xEA; sub.rn.f16x2 $0, t, $5;
    shr.b32 t, u, 4; lop3.b32 t, t, 0x00F000F0, 0x54005400, 0xEA; sub.rn.f16x2 $1, t, $6;
    lop3.b32 t, u, 0x00F000F0, 0x54005400, 0xEA; sub.rn.f16x2 $2, t, $5;
    shr.b32 t, u, 8; lop3.b32 t, t, 0x00F000F0, 0x54005400, 0xEA; sub.rn.f16x2 $3, t, $6; }"""
)
_INT4_TO_FLOAT32: tl.constexpr = tl.constexpr(
    """{ .reg .b32 t;
    lop3.b32 t, $8, 0x0000000F, 0x4B000000, 0xEA;
        mov.b32 $0, t; sub.rn.f32 $0, $0, 0f4B000000;
    shr.b32 t, $8, 4; lop3.b32 t, t, 0x0000000F, 0x4B000000, 0xEA;
        mov.b32 $4, t; sub.rn.f32 $4, $4, 0f4B000000;
    shr.b32 t, $8, 8; lop3.b32 t, t, 0x0000000F, 0x4B000000, 0xEA;
        mov.b32 $1, t; sub.rn.f32 $1, $1, 0f4B000000;
    shr.b32 t, $8, 12; lop3.b32 t, t, 0x0000000F, 0x4B000000, 0xEA;
        mov.b32 $5, t; sub.rn.f32 $5, $5, 0f4B000000;
    shr.b32 t, $8, 16; lop3.b32 t, t, 0x0000000F, 0x4B000000, 0xEA;
        mov.b32 $2, t; sub.rn.f32 $2, $2, 0f4B000000;
    shr.b32 t, $8, 20; lop3.b32 t, t, 0x0000000F, 0x4B000000, 0xEA;
        mov.b32 $6, t; sub.rn.f32 $6, $6, 0f4B000000;
    shr.b32 t, $8, 24; lop3.b32 t, t, 0x0000000F, 0x4B000000, 0xEA;
        mov.b32 $3, t; sub.rn.f32 $3, $3, 0f4B000000;
    shr.b32 t, $8, 28; lop3.b32 t, t, 0x0000000F, 0x4B000000, 0xEA;
        mov.b32 $7, t; sub.rn.f32 $7, $7, 0f4B000000; }"""
)
_NF4_TO_BFLOAT16: tl.constexpr = tl.constexpr(
    """{ .reg .b32 s, c, p, q, l, h;
    and.b32 s, $4, 0x77777777; shr.b32 c, $4, 1; lop3.b32 c, c, 0x44444444, 0x32103210, 0xEA;
    prmt.b32 p, 0xCA063280, 0x00BA3D92, s; prmt.b32 q, 0xAD7C25A3, 0x803910E2, s; prmt.b32 l, p, q, c;
    prmt.b32 p, 0xBEBFBFBF, 0x00BDBEBE, s; prmt.b32 q, 0x3E3E3E3D, 0x3F3F3F3E, s; prmt.b32 h, p, q, c;
    prmt.b32 $0, l, h, 0x6240; prmt.b32 $2, l, h, 0x7351;
    shr.b32 s, s, 16; shr.b32 c, c, 16;
    prmt.b32 p, 0xCA063280, 0x00BA3D92, s; prmt.b32 q, 0xAD7C25A3, 0x803910E2, s; prmt.b32 l, p, q, c;
    prmt.b32 p, 0xBEBFBFBF, 0x00BDBEBE, s; prmt.b32 q, 0x3E3E3E3D, 0x3F3F3F3E, s; prmt.b32 h, p, q, c;
    prmt.b32 $1, l, h, 0x6240; prmt.b32 $3, l, h, 0x7351; }"""
)
_NF4_TO_FLOAT16: tl.constexpr = tl.constexpr(
    """{ .reg .b32 s, c, p, q, l, h;
    and.b32 s, $4, 0x77777777; shr.b32 c, $4, 1; lop3.b32 c, c, 0x44444444, 0x32103210, 0xEA;
    prmt.b32 p, 0x52339200, 0x00D4EA8D, s; prmt.b32 q, 0x68E02618, 0x00C9800D, s; prmt.b32 l, p, q, c;
    prmt.b32 p, 0xB6B8B9BC, 0x00ADB1B4, s; prmt.b32 q, 0x3533312D, 0x3C393837, s; prmt.b32 h, p, q, c;
    prmt.b32 $0, l, h, 0x6240; prmt.b32 $2, l, h, 0x7351;
    shr.b32 s, s, 16; shr.b32 c, c, 16;
    prmt.b32 p, 0x52339200, 0x00D4EA8D, s; prmt.b32 q, 0x68E02618, 0x00C9800D, s; prmt.b32 l, p, q, c;
    prmt.b32 p, 0xB6B8B9BC, 0x00ADB1B4, s; prmt.b32 q, 0x3533312D, 0x3C393837, s; prmt.b32 h, p, q, c;
    prmt.b32 $1, l, h, 0x6240; prmt.b32 $3, l, h, 0x7351; }"""
)
_NF4_TO_FLOAT32: tl.constexpr = tl.constexpr(
    """{ .reg .b32 s, c, p, q, d, e, f, g, t, u, v, w;
    and.b32 s, $8, 0x77777777; shr.b32 c, $8, 1; lop3.b32 c, c, 0x44444444, 0x32103210, 0xEA;
    prmt.b32 p, 0xA030B100, 0x00713F4D, s; prmt.b32 q, 0x3ADDE3FF, 0x00B3ABB8, s; prmt.b32 d, p, q, c;
    prmt.b32 p, 0x326B3900, 0x007835A2, s; prmt.b32 q, 0x0304CAFA, 0x001307A4, s; prmt.b32 e, p, q, c;
    prmt.b32 p, 0xCA063280, 0x00BA3D91, s; prmt.b32 q, 0xAD7C24A2, 0x803910E1, s; prmt.b32 f, p, q, c;
    prmt.b32 p, 0xBEBFBFBF, 0x00BDBEBE, s; prmt.b32 q, 0x3E3E3E3D, 0x3F3F3F3E, s; prmt.b32 g, p, q, c;
    prmt.b32 t, d, e, 0x6240; prmt.b32 u, f, g, 0x6240; prmt.b32 v, d, e, 0x7351; prmt.b32 w, f, g, 0x7351;
    prmt.b32 p, t, u, 0x5410; mov.b32 $0, p; prmt.b32 p, t, u, 0x7632; mov.b32 $1, p;
    prmt.b32 p, v, w, 0x5410; mov.b32 $4, p; prmt.b32 p, v, w, 0x7632; mov.b32 $5, p;
    shr.b32 s, s, 16; shr.b32 c, c, 16;
    prmt.b32 p, 0xA030B100, 0x00713F4D, s; prmt.b32 q, 0x3ADDE3FF, 0x00B3ABB8, s; prmt.b32 d, p, q, c;
    prmt.b32 p, 0x326B3900, 0x007835A2, s; prmt.b32 q, 0x0304CAFA, 0x001307A4, s; prmt.b32 e, p, q, c;
    prmt.b32 p, 0xCA063280, 0x00BA3D91, s; prmt.b32 q, 0xAD7C24A2, 0x803910E1, s; prmt.b32 f, p, q, c;
    prmt.b32 p, 0xBEBFBFBF, 0x00BDBEBE, s; prmt.b32 q, 0x3E3E3E3D, 0x3F3F3F3E, s; prmt.b32 g, p, q, c;
    prmt.b32 t, d, e, 0x6240; prmt.b32 u, f, g, 0x6240; prmt.b32 v, d, e, 0x7351; prmt.b32 w, f, g, 0x7351;
    prmt.b32 p, t, u, 0x5410; mov.b32 $2, p; prmt.b32 p, t, u, 0x7632; mov.b32 $3, p;
    prmt.b32 p, v, w, 0x5410; mov.b32 $6, p; prmt.b32 p, v, w, 0x7632; mov.b32 $7, p; }"""
)
_LEVELS: tl.constexpr = tl.constexpr(
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    )
)  # fmt: skip


@triton.jit
def _levels(codes):  # type: ignore[no-untyped-def]
    found = tl.full(codes.shape, _LEVELS[0], tl.float32)
    for code in tl.static_range(1, 16):
        found = tl.where(codes == code, _LEVELS[code], found)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def numbers(codes, zeros, DTYPE: tl.constexpr, LEVELS: tl.constexpr, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the low and the high halves of ``codes`` stand for, as ``DTYPE``: the level, or the code less
    ``zeros`` / 8, below 128 and of one column."""
    if FAST and LEVELS:
        near = tl.broadcast_to(zeros, codes.shape)
        if tl.bfloat16 == DTYPE:
            low, high = tl.inline_asm_elementwise(
                _NF4_TO_BFLOAT16, "=r,=r,=r,=r,r,r", [codes, near],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        elif tl.float16 == DTYPE:
            low, high = tl.inline_asm_elementwise(
                _NF4_TO_FLOAT16, "=r,=r,=r,=r,r,r", [codes, near],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                _NF4_TO_FLOAT32, "=f,=f,=f,=f,=f,=f,=f,=f,r,r", [codes, near],
                dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
            )  # fmt: skip
    elif FAST and tl.bfloat16 == DTYPE:
        near = (zeros.to(tl.int16) | 0x4180).to(tl.bfloat16, bitcast=True)
        low, high = tl.inline_asm_elementwise(
            _INT4_TO_BFLOAT16, "=r,=r,=r,=r,r,r,r", [codes, tl.broadcast_to(near, codes.shape)],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    elif FAST and tl.float16 == DTYPE:
        near = ((zeros.to(tl.int16) << 1) | 0x5400).to(tl.float16, bitcast=True)
        low, high = tl.inline_asm_elementwise(
            _INT4_TO_FLOAT16, "=r,=r,=r,=r,r,r,r", [codes, tl.broadcast_to(near, codes.shape)],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    elif FAST:
        low, high = tl.inline_asm_elementwise(
            _INT4_TO_FLOAT32, "=f,=f,=f,=f,=f,=f,=f,=f,r", [codes],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
        low -= zeros.to(tl.float32) * 0.125
        high -= zeros.to(tl.float32) * 0.125
    elif LEVELS:
        low, high = _levels(codes & 15).to(DTYPE), _levels(codes >> 4).to(DTYPE)
    else:
        shift = zeros.to(tl.float32) * 0.125
        low = ((codes & 15).to(tl.float32) - shift).to(DTYPE)
        high = ((codes >> 4).to(tl.float32) - shift).to(DTYPE)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def _words(  # type: ignore[no-untyped-def]
    words_ptr, ranges_ptr, rows, groups, inside, GROUPS, RANGES,
    LEVELS: tl.constexpr, DOUBLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Zeros and scales of ``groups`` of ``rows``."""
    if EVEN:
        words = tl.load(words_ptr + rows * GROUPS + groups)
    else:
        words = tl.load(words_ptr + rows * GROUPS + groups, mask=inside, other=0)
    if DOUBLE:
        ranges = tl.load(ranges_ptr + rows * RANGES + groups // 256, mask=inside, other=0.0)
        zeros, scales = words, words.to(tl.float32) * ranges
    elif LEVELS:
        zeros, scales = words.to(tl.uint8), words.to(tl.float32, bitcast=True)
    else:
        zeros, scales = words.to(tl.uint8), (words & -65536).to(tl.float32, bitcast=True)
    return zeros, scales


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    total, bias_ptr, out_ptr, rows, columns, part, M, N, BIASED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``total``: sums by column and row."""
    inside = (columns < N)[:, None] & (rows < M)[None, :]
    places = rows.to(tl.int64)[None, :] * N + columns[:, None]
    if PARTS == 1:
        if BIASED:
            total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + part.to(tl.int64) * M * N + places, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def slices_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, words_ptr, ranges_ptr, bias_ptr, out_ptr, M, N, K, GROUPS, RANGES, STEPS,
    BIASED: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    LEVELS: tl.constexpr, DOUBLE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weight, a few rows: a warp for each of ``SLICES`` blocks of a step."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    across = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    rows = (tl.program_id(0) % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Results beyond the last are computed from its weights, and not stored.
    real = tl.minimum(columns, N - 1).to(tl.int64)[None, :]
    blocks = tl.cdiv(K, 2 * HALF)
    starts = codes_ptr + real[:, :, None] * (blocks * HALF)
    inputs = x_ptr + rows.to(tl.int64)[None, None, :] * K
    here = (rows < M)[None, None, :]
    order = tl.arange(0, HALF)[None, None, :]
    within = tl.arange(0, HALF)[None, :, None]
    total = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for step in range(part * STEPS, (part + 1) * STEPS):
        block = step * SLICES + tl.arange(0, SLICES)
        first = block[:, None] * (2 * HALF) // GROUP
        ks = block[:, None, None] * (2 * HALF) + within
        if EVEN:
            codes = tl.load(starts + block[:, None, None] * HALF + order, eviction_policy="evict_first")
            x = tl.load(inputs + ks, mask=here, other=0.0)
            y = tl.load(inputs + ks + HALF, mask=here, other=0.0)
        else:
            inside = (block < blocks)[:, None, None]
            codes = tl.load(
                starts + block[:, None, None] * HALF + order,
                mask=inside, other=0, eviction_policy="evict_first",
            )  # fmt: skip
            x = tl.load(inputs + ks, mask=here & (ks < K), other=0.0)
            y = tl.load(inputs + ks + HALF, mask=here & (ks + HALF < K), other=0.0)
        zeros, scales = _words(
            words_ptr, ranges_ptr, real, first, first < GROUPS, GROUPS, RANGES, LEVELS, DOUBLE, EVEN
        )
        low, high = numbers(codes, zeros[:, :, None], DTYPE, LEVELS, FAST)
        sums = tl.dot(low, x)
        if GROUP == HALF:
            # The halves are groups of their own.
            total += sums * scales[:, :, None]
            zeros, scales = _words(
                words_ptr, ranges_ptr, real, first + 1, first + 1 < GROUPS,
                GROUPS, RANGES, LEVELS, DOUBLE, EVEN,
            )  # fmt: skip
            low, high = numbers(codes, zeros[:, :, None], DTYPE, LEVELS, FAST)
            sums = tl.dot(high, y)
        else:
            sums = tl.dot(high, y, sums)
        total += sums * scales[:, :, None]
    _store(tl.sum(total, 0), bias_ptr, out_ptr, rows, columns, part, M, N, BIASED, PARTS)


@triton.jit  # type: ignore[untyped-decorator]
def tile_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, words_ptr, ranges_ptr, bias_ptr, out_ptr, M, N, K, GROUPS, RANGES, STEPS,
    BIASED: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    LEVELS: tl.constexpr, DOUBLE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weight: a tile of ``BLOCK_N`` results of ``BLOCK_M`` rows a program, a block of
    codes a step. Programs that read the same weights follow each other."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    across = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    rows = (tl.program_id(0) % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = tl.minimum(columns, N - 1).to(tl.int64)
    blocks = tl.cdiv(K, 2 * HALF)
    starts = codes_ptr + real[:, None] * (blocks * HALF)
    inputs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[None, :] * K
    order = tl.arange(0, HALF)[None, :]
    within = tl.arange(0, HALF)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(part * STEPS, (part + 1) * STEPS):
        first = step * (2 * HALF) // GROUP
        ks = step * (2 * HALF) + within
        if EVEN:
            codes = tl.load(starts + step * HALF + order)
            x = tl.load(inputs + ks)
            y = tl.load(inputs + ks + HALF)
        else:
            codes = tl.load(starts + step * HALF + order, mask=step < blocks, other=0)
            x = tl.load(inputs + ks, mask=ks < K, other=0.0)
            y = tl.load(inputs + ks + HALF, mask=ks + HALF < K, other=0.0)
        zeros, scales = _words(
            words_ptr, ranges_ptr, real, first, first < GROUPS, GROUPS, RANGES, LEVELS, DOUBLE, EVEN
        )
        low, high = numbers(codes, zeros[:, None], DTYPE, LEVELS, FAST)
        sums = tl.dot(low, x)
        if GROUP == HALF:
            total += sums * scales[:, None]
            zeros, scales = _words(
                words_ptr, ranges_ptr, real, first + 1, first + 1 < GROUPS,
                GROUPS, RANGES, LEVELS, DOUBLE, EVEN,
            )  # fmt: skip
            low, high = numbers(codes, zeros[:, None], DTYPE, LEVELS, FAST)
            sums = tl.dot(high, y)
        else:
            sums = tl.dot(high, y, sums)
        total += sums * scales[:, None]
    _store(total, bias_ptr, out_ptr, rows, columns, part, M, N, BIASED, PARTS)


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, bias_ptr, out_ptr, count, N,
    BIASED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of ``count`` results, rows of ``N``, one after the other."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    total = tl.load(partial_ptr + places, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(partial_ptr + part * count + places, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias_ptr + places % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def unpack_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, words_ptr, ranges_ptr, factors_ptr, out_ptr, N, K, GROUPS, RANGES,
    FACTORED: tl.constexpr, FAST: tl.constexpr, LEVELS: tl.constexpr, DOUBLE: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The weight [N, K]: ``WIDE`` blocks of ``BLOCK_N`` rows a program."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    blocks = tl.cdiv(K, 2 * HALF)
    here = (rows < N)[:, None]
    inside = here & (block < blocks)[None, :]
    order = tl.arange(0, HALF)[None, None, :]
    codes = tl.load(
        codes_ptr + (rows[:, None] * blocks + block[None, :])[:, :, None] * HALF + order,
        mask=inside[:, :, None], other=0,
    )  # fmt: skip
    ks = block[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    places = rows[:, None, None] * K + ks[None, :, :]
    for side in tl.static_range(0, 2):
        # Both halves of a block are in one group, or each is a group.
        groups = (block * (2 * HALF) + side * HALF)[None, :] // GROUP
        zeros, scales = _words(
            words_ptr, ranges_ptr, rows[:, None], groups, here & (groups < GROUPS),
            GROUPS, RANGES, LEVELS, DOUBLE, False,
        )  # fmt: skip
        low, high = numbers(codes, zeros[:, :, None], tl.float32, LEVELS, FAST)
        weight = (high if side else low) * scales[:, :, None]
        reached = ks + side * HALF < K
        if FACTORED:
            weight *= tl.load(factors_ptr + ks + side * HALF, mask=reached, other=0.0)[None, :, :]
        tl.store(
            out_ptr + places + side * HALF,
            weight.to(out_ptr.dtype.element_ty),
            mask=inside[:, :, None] & reached[None, :, :],
        )
