"""Numbers that codes of weights stand for, in a few instructions each, as the kernels of ``groups_triton``
make them in registers.

Ways to turn four bytes into eight numbers (``FAST``), exact all of them:

    int4   16 + code by shift and mask, as bfloat16, less 16 + zero, which is a multiple of 1/8: 13
           instructions. As float16 64 + code and 64 + zero.
    nf4    a byte permutation looks a byte up among eight for each of four codes, twice for sixteen, once for
           each byte of a number: 21 instructions

Planes of codes of two and three bits (``planes``) become bytes of two codes of four bits first: four
instructions for sixteen codes of two bits, twelve for 32 of three.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["nibbles2", "nibbles3", "numbers"]

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
_NIBBLES2: tl.constexpr = tl.constexpr(
    """{ .reg .b32 t;
    shl.b32 t, $2, 2; lop3.b32 $0, t, 0xCCCCCCCC, $3, 0xE2;
    shr.b32 t, $3, 2; lop3.b32 $1, $2, 0xCCCCCCCC, t, 0xE2; }"""
)
"""The bits of the first that the second says, the others of the third: so 0xE2."""

_NIBBLES3: tl.constexpr = tl.constexpr(
    """{ .reg .b32 t, u, e;
    lop3.b32 e, $6, 0xAAAAAAAA, $7, 0xE2;
    shl.b32 t, $4, 2; lop3.b32 $0, t, 0xCCCCCCCC, e, 0xE2;
    shr.b32 t, e, 2; lop3.b32 $1, $4, 0xCCCCCCCC, t, 0xE2;
    shl.b32 t, $6, 1; shr.b32 u, $7, 1; lop3.b32 e, t, 0xAAAAAAAA, u, 0xE2;
    shl.b32 t, $5, 2; lop3.b32 $2, t, 0xCCCCCCCC, e, 0xE2;
    shr.b32 t, e, 2; lop3.b32 $3, $5, 0xCCCCCCCC, t, 0xE2; }"""
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
def nibbles2(codes, extra, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes of two codes of four bits each: the first half of a unit of codes of two bits, the second."""
    if FAST:
        one, two = tl.inline_asm_elementwise(
            _NIBBLES2, "=r,=r,r,r", [codes, extra], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )
    else:
        one = ((codes << 2) & 0xCC) | (extra & 0x33)
        two = (codes & 0xCC) | ((extra >> 2) & 0x33)
    return one, two


@triton.jit  # type: ignore[untyped-decorator]
def nibbles3(low, high, thirds, extra, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same, of four quarters of a unit of codes of three bits; ``low`` and ``high``: pairs of the bits of
    its halves."""
    if FAST:
        one, two, three, four = tl.inline_asm_elementwise(
            _NIBBLES3, "=r,=r,=r,=r,r,r,r,r", [low, high, thirds, extra],
            dtype=(tl.uint8, tl.uint8, tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        one, two = nibbles2(low, (thirds & 0xAA) | (extra & 0x55), False)
        three, four = nibbles2(high, ((thirds << 1) & 0xAA) | ((extra >> 1) & 0x55), False)
    return one, two, three, four
