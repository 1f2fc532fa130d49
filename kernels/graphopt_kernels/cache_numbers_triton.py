"""Triton source that makes numbers of packed keys and values (``graphopt_kernels.cache_codes``).

Tiles are [T, .., ..]: each of T warps of a program has one of its own. A word, or half a word where codes
have three bits or two, holds ``each`` codes of the dimension that it packs, and a thread has all of it: its
numbers are ``each`` tiles, one after another, the first with the first code of all words, and so on. So place
``j * words + w`` of that dimension is element ``w * each + j`` of the store, which products over keys need
not mind as long as all that meet agree. In this order tensor cores take numbers from the registers where they
were made: nothing of them moves.

``FAST``: two codes at a time are taken out by a mask and put behind the exponent of a half-precision number
of which they are the last bits (as in Marlin, Frantar et al. 2024), which needs PTX; else one by one, behind
that of a float32. Both give ``code * scale + zero``, rounded once. Imports triton: import it lazily.
Arguments of kernels are not annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["UNIT", "for_values", "in_order", "keys_of", "positions_of", "values_of"]

UNIT = tl.constexpr(32)
"""Positions whose codes of a key are whole words, whatever their bits."""


def _unpacking(bits: int, wide: int, kind: str, one: int) -> str:
    """PTX of all codes of two words of ``wide`` bits: ``one`` is a number of ``kind``, twice, whose last bits
    are codes.

    Operands: results, the words, with three bits the highest bits of their codes, and pairs of scales and
    zeros.
    """
    low = 2 if bits == 3 else bits
    each = wide // low
    if wide == 16:
        inputs = each + 1
        text = [f"mov.b32 p, ${each};"]
    else:
        inputs = each + 2
        text = [f"prmt.b32 p, ${each}, ${each + 1}, 0x5410; prmt.b32 q, ${each}, ${each + 1}, 0x7632;"]
    if bits == 3:
        text.append(f"mov.b32 e, ${inputs};")
        inputs += 1
    mask, highest = ((1 << low) - 1) * 0x10001, 0x40004
    for number in range(each):
        half, place = ("p", "q")[number * low // 16], number * low % 16
        if place:
            text.append(f"shr.b32 t, {half}, {place};")
        text.append(f"lop3.b32 t, {'t' if place else half}, {mask:#x}, m, 0xEA;")
        if bits == 3:
            step = number - 2
            shift = f"shr.b32 u, e, {step};" if step >= 0 else f"shl.b32 u, e, {-step};"
            text.append(f"{shift} lop3.b32 t, u, {highest:#x}, t, 0xEA;")
        text.append(f"sub.rn.{kind} t, t, m; fma.rn.{kind} ${number}, t, ${inputs}, ${inputs + 1};")
    return f"{{ .reg .b32 p, q, e, t, u, m; mov.b32 m, {one:#x}; " + " ".join(text) + " }"


def _bytes_to_bfloat16() -> str:
    """The same of words of four bytes, which a bfloat16 has no room for: a byte is put behind 2^15 in a
    float32, and what is rounded then is far below what a bfloat16 can tell."""
    text = [
        "{ .reg .b32 p, m, y, z, c, d; .reg .f32 s, t, u, v, f, g; mov.b32 m, 0x47000000;",
        "shl.b32 p, $6, 16; mov.b32 s, p; and.b32 p, $6, 0xFFFF0000; mov.b32 t, p;",
        "shl.b32 p, $7, 16; mov.b32 u, p; and.b32 p, $7, 0xFFFF0000; mov.b32 v, p;",
        "fma.rn.f32 u, s, 0fC7000000, u; fma.rn.f32 v, t, 0fC7000000, v;",
    ]
    for number in range(4):
        text.append(f"prmt.b32 c, $4, m, 0x74{number}4; prmt.b32 d, $5, m, 0x74{number}4;")
        text.append("mov.b32 f, c; mov.b32 g, d; fma.rn.f32 f, f, s, u; fma.rn.f32 g, g, t, v;")
        text.append(f"cvt.rn.bf16x2.f32 ${number}, g, f;")
    return " ".join(text) + " }"


_WORDS = ((2, 16), (3, 16), (4, 16), (4, 32), (8, 32))
"""Bits of a code, and of the words that codes are taken out of."""

# 128 has room for seven bits behind it in a bfloat16, 1024 for ten in a float16.
_PTX = {
    **{(*key, "bf16"): _unpacking(*key, "bf16x2", 0x43004300) for key in _WORDS if key != (8, 32)},
    **{(*key, "fp16"): _unpacking(*key, "f16x2", 0x64006400) for key in _WORDS},
    (8, 32, "bf16"): _bytes_to_bfloat16(),
}


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _ptx(bits: int, word: tl.dtype, dtype: tl.dtype) -> str:
    return _PTX[bits, word.primitive_bitwidth, str(dtype)]


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _key_codes(bits: int, units: int) -> int:
    """How many codes of a key a word has: eight threads have all words of a tile of ``units`` units, so that
    few units are half-words."""
    return 4 if bits == 8 or (bits == 4 and units == 1) else 8


@triton.jit
def _four(a, b, c, d):  # type: ignore[no-untyped-def]
    """[.., 2, 2], of which the last two numbers count ``a`` to ``d``."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _eight(a, b, c, d, e, f, g, h):  # type: ignore[no-untyped-def]
    return tl.join(_four(a, c, e, g), _four(b, d, f, h))


@triton.jit  # type: ignore[untyped-decorator]
def _code(words, extra, NUMBER: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    wide = words.to(tl.int32)
    if BITS == 3:
        return ((wide >> (2 * NUMBER)) & 3) | (((extra.to(tl.int32) >> NUMBER) & 1) << 2)
    return (wide >> (NUMBER * BITS)) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _four_codes(words, extra, FIRST: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    return _four(
        _code(words, extra, FIRST, BITS), _code(words, extra, FIRST + STEP, BITS),
        _code(words, extra, FIRST + 2 * STEP, BITS), _code(words, extra, FIRST + 3 * STEP, BITS),
    )  # fmt: skip


@triton.jit
def _in_turn(joined):  # type: ignore[no-untyped-def]
    """[T, each, R, C] of [T, R, C, 2, 2] or [T, R, C, 2, 2, 2]."""
    team: tl.constexpr = joined.shape[0]
    rows: tl.constexpr = joined.shape[1]
    columns: tl.constexpr = joined.shape[2]
    if len(joined.shape) == 5:
        joined = tl.permute(joined, [0, 3, 4, 1, 2])
    else:
        joined = tl.permute(joined, [0, 3, 4, 5, 1, 2])
    return tl.reshape(joined, [team, joined.numel // (team * rows * columns), rows, columns])


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(words, extra, scale, zero, BITS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """``DTYPE`` [T, each, R, C] of words [T, R, C] as ``_words_of`` gives them, where there are three bits
    ``extra`` int8 with the highest of all codes of a word; ``scale`` and ``zero`` [T, 1 or each, R, C]."""
    if FAST and DTYPE.primitive_bitwidth == 16 and scale.dtype == DTYPE and scale.shape[1] == 1:
        by = tl.reshape(scale, words.shape)
        begin = tl.reshape(zero, words.shape)
        if BITS == 8:
            a, b, c, d = tl.inline_asm_elementwise(
                _ptx(BITS, words.dtype, DTYPE), "=&r,=&r,=&r,=&r,r,r,r,r", [words, by, begin],
                dtype=(by.dtype,) * 4, is_pure=True, pack=2,
            )  # fmt: skip
            return _in_turn(_four(a, b, c, d))
        elif BITS == 4 and words.dtype == tl.int16:
            a, b, c, d = tl.inline_asm_elementwise(
                _ptx(BITS, words.dtype, DTYPE), "=&r,=&r,=&r,=&r,r,r,r", [words, by, begin],
                dtype=(by.dtype,) * 4, is_pure=True, pack=2,
            )  # fmt: skip
            return _in_turn(_four(a, b, c, d))
        elif BITS == 4:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _ptx(BITS, words.dtype, DTYPE), "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r", [words, by, begin],
                dtype=(by.dtype,) * 8, is_pure=True, pack=2,
            )  # fmt: skip
            return _in_turn(_eight(a, b, c, d, e, f, g, h))
        elif BITS == 3:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _ptx(BITS, words.dtype, DTYPE), "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
                [words, extra.to(tl.int16), by, begin], dtype=(by.dtype,) * 8, is_pure=True, pack=2,
            )  # fmt: skip
            return _in_turn(_eight(a, b, c, d, e, f, g, h))
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _ptx(BITS, words.dtype, DTYPE), "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r", [words, by, begin],
                dtype=(by.dtype,) * 8, is_pure=True, pack=2,
            )  # fmt: skip
            return _in_turn(_eight(a, b, c, d, e, f, g, h))
    else:
        if words.dtype.primitive_bitwidth // BITS == 4:
            codes = _in_turn(_four_codes(words, extra, 0, 1, BITS))
        else:
            codes = _in_turn(
                tl.join(_four_codes(words, extra, 0, 2, BITS), _four_codes(words, extra, 1, 2, BITS))
            )
        # The exponent is that of 2^BITS, the mantissa begins with the code.
        behind = ((codes << (23 - BITS)) | (0x3F800000 + (BITS << 23))).to(tl.float32, bitcast=True)
        by = scale.to(tl.float32)
        return (behind * by + (zero.to(tl.float32) - (1 << BITS) * by)).to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_of(  # type: ignore[no-untyped-def]
    base, place, TEAM: tl.constexpr, ROWS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """[T, units * ``ROWS``, ``BLOCK``]: of each unit as many rows, ``STRIDE`` elements apart, from element
    ``place`` [T * units] of ``base`` on, zeros beyond ``WIDTH``."""
    inner = tl.arange(0, ROWS * BLOCK)
    spot = inner // BLOCK * STRIDE + inner % BLOCK
    if STRIDE == BLOCK:
        # All of it is one piece: the widest loads there are.
        spot = inner
    if WIDTH >= BLOCK:
        held = tl.load(base + place[:, None] + spot[None, :])
    else:
        held = tl.load(base + place[:, None] + spot[None, :], mask=(inner % BLOCK < WIDTH)[None, :], other=0)
    return tl.reshape(held, [TEAM, place.shape[0] // TEAM * ROWS, BLOCK])


@triton.jit  # type: ignore[untyped-decorator]
def _key_words(  # type: ignore[no-untyped-def]
    codes, place, KIND: tl.constexpr, TEAM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``KIND`` [T, rows, ``BLOCK``] of ``ROWS`` rows of words of each unit, from word ``place`` [T * units]
    on, of which each is several elements of ``KIND``."""
    parts: tl.constexpr = 32 // KIND.primitive_bitwidth
    if parts == 1:
        return _rows_of(codes, place, TEAM, ROWS, WIDTH, WIDTH, BLOCK)
    else:
        base = codes.to(tl.pointer_type(KIND), bitcast=True)
        held = _rows_of(base, place * parts, TEAM, ROWS, WIDTH * parts, WIDTH * parts, BLOCK * parts)
        rows: tl.constexpr = held.shape[1]
        apart = tl.permute(tl.reshape(held, [TEAM, rows, BLOCK, parts]), [0, 1, 3, 2])
        return tl.reshape(apart, [TEAM, rows * parts, BLOCK])


@triton.jit  # type: ignore[untyped-decorator]
def keys_of(  # type: ignore[no-untyped-def]
    codes, scales, block, inner, TEAM: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Keys ``DTYPE`` [T, units * 32, ``BLOCK``] in the order of ``positions_of``.

    ``block``, ``inner`` [T * units]: the block in the store that a unit is in, and which of its ``PER``
    units; blocks have ``WORDS`` words of a channel.
    """
    count: tl.constexpr = block.shape[0] // TEAM
    low: tl.constexpr = 2 if BITS == 3 else BITS
    kind: tl.constexpr = tl.int16 if _key_codes(BITS, count) * low == 16 else tl.int32
    words = _key_words(codes, (block * WORDS + inner * low) * WIDTH, kind, TEAM, low, WIDTH, BLOCK)
    extra = words
    if BITS == 3:
        extra = _key_words(codes, (block * WORDS + PER * 2 + inner) * WIDTH, tl.int8, TEAM, 1, WIDTH, BLOCK)
    rows: tl.constexpr = words.shape[1] // count
    pair = tl.reshape(
        _rows_of(scales, block * (2 * WIDTH), TEAM, 2, WIDTH, WIDTH, BLOCK), [TEAM, count, 2, BLOCK]
    )
    scale, zero = tl.split(tl.permute(pair, [0, 1, 3, 2]))
    scale = tl.broadcast_to(scale[:, :, None, :], [TEAM, count, rows, BLOCK])
    zero = tl.broadcast_to(zero[:, :, None, :], [TEAM, count, rows, BLOCK])
    scale = tl.reshape(scale, [TEAM, 1, count * rows, BLOCK])
    zero = tl.reshape(zero, [TEAM, 1, count * rows, BLOCK])
    made = _numbers(words, extra, scale, zero, BITS, DTYPE, FAST)
    return tl.reshape(made, [TEAM, count * UNIT, BLOCK])


@triton.jit  # type: ignore[untyped-decorator]
def positions_of(TEAM: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which position of the ``TEAM * COUNT`` units of a tile each place of keys is of, int32
    [T, ``COUNT`` * 32]."""
    each: tl.constexpr = _key_codes(BITS, COUNT)
    places: tl.constexpr = COUNT * UNIT
    apart = tl.reshape(tl.arange(0, TEAM * COUNT * UNIT), [TEAM, places // each, each])
    return tl.reshape(tl.permute(apart, [0, 2, 1]), [TEAM, places])


@triton.jit
def _value_order(tile):  # type: ignore[no-untyped-def]
    """Places of [T, places, C], which are in the order of positions, as values have them: four rows of a
    store that follow one another are read at once, which are in four different parts of shared memory."""
    team: tl.constexpr = tile.shape[0]
    count: tl.constexpr = tile.shape[1]
    width: tl.constexpr = tile.shape[2]
    apart = tl.reshape(tile, [team, count // 16, 4, 4, width])
    return tl.reshape(tl.permute(apart, [0, 1, 3, 2, 4]), [team, count, width])


@triton.jit  # type: ignore[untyped-decorator]
def for_values(weights, KEY_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights [T, places, C] of keys, in the order that values have."""
    team: tl.constexpr = weights.shape[0]
    count: tl.constexpr = weights.shape[1]
    width: tl.constexpr = weights.shape[2]
    each: tl.constexpr = _key_codes(KEY_BITS, count // UNIT)
    apart = tl.reshape(weights, [team, each, count // each, width])
    return _value_order(tl.reshape(tl.permute(apart, [0, 2, 1, 3]), [team, count, width]))


@triton.jit
def _word_order(tile):  # type: ignore[no-untyped-def]
    """Words of [T, .., words, C] so that a thread has neighbours: eight threads have the words of a row."""
    team: tl.constexpr = tile.shape[0]
    each: tl.constexpr = tile.shape[1]
    words: tl.constexpr = tile.shape[2]
    columns: tl.constexpr = tile.shape[3]
    if words > 8:
        apart = tl.reshape(tile, [team, each, 8, words // 8, columns])
        tile = tl.reshape(tl.permute(apart, [0, 1, 3, 2, 4]), [team, each, words, columns])
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _by_words(tile, GROUP: tl.constexpr, EACH: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[T, 1 or ``EACH``, ``WORDS``, C] of what groups of channels have [T, groups, C]."""
    team: tl.constexpr = tile.shape[0]
    groups: tl.constexpr = tile.shape[1]
    columns: tl.constexpr = tile.shape[2]
    if GROUP >= EACH:
        shared = tl.broadcast_to(tile[:, :, None, :], [team, groups, WORDS // groups, columns])
        return tl.reshape(shared, [team, 1, WORDS, columns])
    else:
        # Codes of a word are of several groups.
        parts: tl.constexpr = EACH // GROUP
        apart = tl.permute(tl.reshape(tile, [team, WORDS, parts, columns]), [0, 2, 1, 3])
        apart = tl.broadcast_to(apart[:, :, None, :, :], [team, parts, GROUP, WORDS, columns])
        return tl.reshape(apart, [team, EACH, WORDS, columns])


@triton.jit  # type: ignore[untyped-decorator]
def values_of(  # type: ignore[no-untyped-def]
    codes, scales, unit, FIRST: tl.constexpr, TEAM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Values, turned: ``DTYPE`` [T, ``BLOCK``, units * 32], channels from ``FIRST`` on, in the order that
    ``in_order`` undoes, places in that of ``for_values``. ``unit`` [T * units]: which one of the store."""
    low: tl.constexpr = 2 if BITS == 3 else BITS
    each: tl.constexpr = 4 if BITS == 8 else 8
    kind: tl.constexpr = tl.int16 if BITS < 4 else tl.int32
    parts: tl.constexpr = 2 if BITS < 4 else 1
    words: tl.constexpr = BLOCK // each
    given: tl.constexpr = (WIDTH * low + 31) // 32
    highest: tl.constexpr = (WIDTH + 31) // 32 if BITS == 3 else 0
    stride: tl.constexpr = given + highest
    groups: tl.constexpr = BLOCK // GROUP
    given_groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    base = codes.to(tl.pointer_type(kind), bitcast=True)
    place = unit * (UNIT * stride)
    begin: tl.constexpr = FIRST // each
    held = _rows_of(
        base + begin, place * parts, TEAM, UNIT, stride * parts, given * parts - begin, words
    )  # fmt: skip
    held = tl.permute(_value_order(held), [0, 2, 1])
    extra = held
    if BITS == 3:
        base = (codes + given).to(tl.pointer_type(tl.int8), bitcast=True)
        extra = _rows_of(base + begin, place * 4, TEAM, UNIT, stride * 4, highest * 4 - begin, words)
        extra = tl.permute(_value_order(extra), [0, 2, 1])
    place = unit * (UNIT * 2 * given_groups)
    skipped: tl.constexpr = FIRST // GROUP
    pair = _rows_of(
        scales + skipped, place, TEAM, UNIT * 2, given_groups, given_groups - skipped, groups
    )  # fmt: skip
    places: tl.constexpr = unit.shape[0] // TEAM * UNIT
    pair = _value_order(tl.reshape(pair, [TEAM, places, 2 * groups]))
    scale, zero = tl.split(tl.permute(tl.reshape(pair, [TEAM, places, 2, groups]), [0, 3, 1, 2]))
    scale, zero = _by_words(scale, GROUP, each, words), _by_words(zero, GROUP, each, words)
    held = tl.reshape(_word_order(held[:, None, :, :]), held.shape)
    extra = tl.reshape(_word_order(extra[:, None, :, :]), extra.shape)
    made = _numbers(held, extra, _word_order(scale), _word_order(zero), BITS, DTYPE, FAST)
    return tl.reshape(made, [TEAM, BLOCK, places])


@triton.jit  # type: ignore[untyped-decorator]
def in_order(result, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Channels of ``result`` [``BLOCK``, C] as the store has them, of the order that ``values_of`` gives."""
    width: tl.constexpr = result.shape[0]
    columns: tl.constexpr = result.shape[1]
    each: tl.constexpr = 4 if BITS == 8 else 8
    words: tl.constexpr = width // each
    lanes: tl.constexpr = min(words, 8)
    apart = tl.reshape(result, [each, words // lanes, lanes, columns])
    return tl.reshape(tl.permute(apart, [2, 1, 0, 3]), [width, columns])
