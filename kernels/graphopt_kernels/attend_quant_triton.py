"""Triton source of one row's attention over rounded keys and values (``attend_quant_launch``).

::

    attend_kernel   a part of the keys for all heads that share them            maximum, sum, weighted values
    close_kernel    a block of exact rows, where the new row completes one      its codes and scales
    merge_kernel    the parts of a row (``attend_triton``)                      the row of the output

The layout is that of ``graphopt_kernels.cache_codes``; stores are contiguous. Codes become numbers in
registers: a code of n bits, put behind the exponent of 2^n, is 2^n + code. Imports triton: import it
lazily. Arguments of kernels are not annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.attend_triton import close_rows, rows_of_program, take_in, write_new_row

__all__ = ["attend_kernel", "close_kernel"]

UNIT = tl.constexpr(32)
"""Positions whose codes of a key are whole words, whatever their bits."""

NEAREST = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken away again, it rounds to the nearest whole number, ties to even."""


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(codes, scale, zero, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``codes * scale + zero`` in float32, without a conversion of whole numbers."""
    # The exponent is that of 2^BITS, the mantissa begins with the code.
    behind = ((codes << (23 - BITS)) | (0x3F800000 + (BITS << 23))).to(tl.float32, bitcast=True)
    return behind * scale + (zero - (1 << BITS) * scale)


@triton.jit
def _neighbours(tile):  # type: ignore[no-untyped-def]
    """Of each four columns of ``tile`` the first, second, third and fourth."""
    apart = tl.reshape(tile, [tile.shape[0], tile.shape[1] // 4, 2, 2])
    even, odd = tl.split(apart)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit  # type: ignore[untyped-decorator]
def _key_words(  # type: ignore[no-untyped-def]
    base, unit, end, slots, per, words, BITS: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Words [``COUNT`` * ``BITS``, ``BLOCK``] of a plane of ``BITS`` bits of ``COUNT`` units of keys."""
    row = tl.arange(0, COUNT * BITS)
    number = unit + row // BITS
    # A plane begins with the word that follows the planes before it.
    word = (number // per % slots) * words + START * per + (number % per) * BITS + row % BITS
    channel = tl.arange(0, BLOCK)
    place = base + word[:, None] * WIDTH + channel[None, :]
    return tl.load(place, mask=(number < end)[:, None] & (channel < WIDTH)[None, :], other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _key_codes(held, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes [positions, channels] of words [.., channels]."""
    each: tl.constexpr = 32 // BITS
    shifts = tl.arange(0, each) * BITS
    codes = (held[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [held.shape[0] * each, held.shape[1]])


@triton.jit  # type: ignore[untyped-decorator]
def _some_keys(codes, scale, zero, BITS: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys float32 [``COUNT`` * 32, channels] of ``codes`` and the units' scales [``COUNT``, channels]."""
    apart = tl.reshape(codes, [COUNT, 32, codes.shape[1]])
    made = _numbers(apart, scale[:, None, :].to(tl.float32), zero[:, None, :].to(tl.float32), BITS)
    return tl.reshape(made, [COUNT * 32, codes.shape[1]])


@triton.jit  # type: ignore[untyped-decorator]
def _keys_of(  # type: ignore[no-untyped-def]
    codes, scales, unit, end, slots, per, words, BITS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys float32 [``COUNT`` * 32, ``BLOCK``] of units from ``unit`` on, zeros from ``end`` on.

    Four neighbours are dealt with apart and joined again, so that one thread has them all: that is how
    tensor cores take them, and keys need not go through shared memory.
    """
    number = unit + tl.arange(0, COUNT)
    channel = tl.arange(0, BLOCK)
    mask = (number < end)[:, None] & (channel < WIDTH)[None, :]
    place = scales + (number // per % slots)[:, None] * (2 * WIDTH) + channel[None, :]
    sa, sb, sc, sd = _neighbours(tl.load(place, mask=mask, other=0.0))
    za, zb, zc, zd = _neighbours(tl.load(place + WIDTH, mask=mask, other=0.0))
    if BITS == 3:
        low = _key_words(codes, unit, end, slots, per, words, 2, 0, COUNT, WIDTH, BLOCK)
        high = _key_words(codes, unit, end, slots, per, words, 1, 2, COUNT, WIDTH, BLOCK)
        la, lb, lc, ld = _neighbours(low)
        ha, hb, hc, hd = _neighbours(high)
        ca = _key_codes(la, 2) | (_key_codes(ha, 1) << 2)
        cb = _key_codes(lb, 2) | (_key_codes(hb, 1) << 2)
        cc = _key_codes(lc, 2) | (_key_codes(hc, 1) << 2)
        cd = _key_codes(ld, 2) | (_key_codes(hd, 1) << 2)
    else:
        held = _key_words(codes, unit, end, slots, per, words, BITS, 0, COUNT, WIDTH, BLOCK)
        la, lb, lc, ld = _neighbours(held)
        ca, cb = _key_codes(la, BITS), _key_codes(lb, BITS)
        cc, cd = _key_codes(lc, BITS), _key_codes(ld, BITS)
    a, b = _some_keys(ca, sa, za, BITS, COUNT), _some_keys(cb, sb, zb, BITS, COUNT)
    c, d = _some_keys(cc, sc, zc, BITS, COUNT), _some_keys(cd, sd, zd, BITS, COUNT)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [COUNT * 32, BLOCK])


@triton.jit  # type: ignore[untyped-decorator]
def _four(held, FIRST: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes ``FIRST``, ``FIRST + STEP``, .. of words [.., 2, 2], one thread having those of a word."""
    mask: tl.constexpr = (1 << BITS) - 1
    a = (held >> (FIRST * BITS)) & mask
    b = (held >> ((FIRST + STEP) * BITS)) & mask
    c = (held >> ((FIRST + 2 * STEP) * BITS)) & mask
    d = (held >> ((FIRST + 3 * STEP) * BITS)) & mask
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit  # type: ignore[untyped-decorator]
def _eight(held, FIRST: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.join(_four(held, FIRST, 2 * STEP, BITS), _four(held, FIRST + STEP, 2 * STEP, BITS))


@triton.jit  # type: ignore[untyped-decorator]
def _value_codes(  # type: ignore[no-untyped-def]
    base, row, inside, words, BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes int32 [``ROWS``, ``BLOCK``] of a plane of ``BITS`` bits of rows of values, ``words`` apart."""
    each: tl.constexpr = 32 // BITS
    word = tl.arange(0, BLOCK // each)
    place = base + row[:, None] * words + word[None, :]
    held = tl.load(place, mask=inside[:, None] & (word * each < WIDTH)[None, :], other=0)
    if BITS == 8:
        codes = _four(held, 0, 1, BITS)
    elif BITS == 4:
        codes = _eight(held, 0, 1, BITS)
    elif BITS == 2:
        codes = tl.join(_eight(held, 0, 2, BITS), _eight(held, 1, 2, BITS))
    else:
        even = tl.join(_eight(held, 0, 4, BITS), _eight(held, 2, 4, BITS))
        codes = tl.join(even, tl.join(_eight(held, 1, 4, BITS), _eight(held, 3, 4, BITS)))
    return tl.reshape(codes, [ROWS, BLOCK])


@triton.jit  # type: ignore[untyped-decorator]
def _values_of(  # type: ignore[no-untyped-def]
    codes, scales, row, inside, words, first_words, BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values float32 [``ROWS``, ``BLOCK``] of rows of the store, zeros where they are not ``inside``.
    ``first_words``: of the first of two planes."""
    if BITS == 3:
        found = _value_codes(codes, row, inside, words, 2, WIDTH, ROWS, BLOCK)
        high = _value_codes(codes + first_words, row, inside, words, 1, WIDTH, ROWS, BLOCK)
        found = found | (high << 2)
    else:
        found = _value_codes(codes, row, inside, words, BITS, WIDTH, ROWS, BLOCK)
    groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    count: tl.constexpr = BLOCK // GROUP
    number = tl.arange(0, count)
    mask = inside[:, None] & (number < groups)[None, :]
    place = scales + row[:, None] * (2 * groups) + number[None, :]
    scale = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(place + groups, mask=mask, other=0.0).to(tl.float32)
    made = _numbers(tl.reshape(found, [ROWS, count, GROUP]), scale[:, :, None], zero[:, :, None], BITS)
    return tl.reshape(made, [ROWS, BLOCK])


@triton.jit  # type: ignore[untyped-decorator]
def attend_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    key_ring,
    value_ring,
    positions,
    valid,
    places,
    slopes,
    sinks,
    output,
    partial,
    sums,
    query_batch,
    query_head,
    query_row,
    new_key_batch,
    new_key_head,
    new_key_row,
    new_value_batch,
    new_value_head,
    new_value_row,
    valid_batch,
    places_batch,
    output_batch,
    output_head,
    output_row,
    heads,
    group,
    slots,
    kept,
    splits,
    window,
    scale,
    softcap,
    key_words,
    value_words,
    first_words,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    TAKES: tl.constexpr,
    FINAL: tl.constexpr,
    WINDOW: tl.constexpr,
    VALID: tl.constexpr,
    SLOPES: tl.constexpr,
    SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The row of all heads of a group, and a part of the keys, for each program.

    Blocks have ``LENGTH`` positions, ``slots`` of them are kept, and ``kept`` rows as they are. Rounded keys
    are taken ``COUNT`` units at a time; the last part takes the exact ones. ``TAKES``: the new row is read
    from ``key`` and ``value``, and written in the place of one that no program reads.
    """
    split, item, row, head, there, at, _, last = rows_of_program(
        tl.program_id(0), positions, 1, group, splits, ROWS
    )
    shared = item % (heads // group)
    batch = (item // (heads // group)).to(tl.int64)
    head = shared * group + head
    store = batch * (heads // group) + shared
    key_codes += store * slots * key_words * WIDTH
    key_scales += store * slots * 2 * WIDTH
    value_codes += store * slots * LENGTH * value_words
    value_scales += store * slots * LENGTH * 2 * ((VALUE_WIDTH + GROUP - 1) // GROUP)
    key_ring += store * kept * WIDTH
    value_ring += store * kept * VALUE_WIDTH
    valid += batch * valid_batch
    places += batch * places_batch
    wide = tl.arange(0, BLOCK_D)[None, :]
    place = query + batch * query_batch + head[:, None].to(tl.int64) * query_head
    q = tl.load(place + wide, mask=there[:, None] & (wide < WIDTH), other=0.0)
    slope = tl.zeros([ROWS], tl.float32)
    if SLOPES:
        slope = tl.load(slopes + head, mask=there, other=0.0).to(tl.float32)
    origin = 0 if SINKS else last
    per: tl.constexpr = LENGTH // UNIT
    newest = last // LENGTH - kept // LENGTH
    low = tl.maximum(newest - slots + 1, 0) * per
    high = (newest + 1) * per
    near = tl.maximum(newest + 1, 0) * LENGTH
    if WINDOW:
        low = tl.maximum(low, tl.maximum(last - window + 1, 0) // UNIT)
        near = tl.maximum(near, last - window + 1)
    total = tl.zeros([ROWS], tl.float32)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    result = tl.zeros([ROWS, BLOCK_V], tl.float32)
    # The last part has exact rows alone, unless it is the only one.
    share = tl.cdiv(tl.maximum(high - low, 0), tl.maximum(splits - 1, 1))
    share = tl.maximum(tl.cdiv(share, COUNT) * COUNT, COUNT)
    begin = low + split * share
    end = tl.minimum(begin + share, high)
    for unit in range(begin, end, COUNT):
        column = tl.arange(0, COUNT * UNIT)
        number = unit + column // UNIT
        inside = number < end
        k = _keys_of(
            key_codes, key_scales, unit, end, slots, per, key_words, KEY_BITS, COUNT, WIDTH, BLOCK_D
        ).to(q.dtype)
        stored = (number // per % slots) * LENGTH + (number % per) * UNIT + column % UNIT
        v = _values_of(
            value_codes, value_scales, stored, inside, value_words, first_words, VALUE_BITS, GROUP,
            VALUE_WIDTH, COUNT * UNIT, BLOCK_V,
        ).to(q.dtype)  # fmt: skip
        total, most, result = take_in(
            total, most, result, q, k, v, column + unit * UNIT, inside, at, slope, valid, places, origin,
            window, scale, softcap, WINDOW, VALID, SLOPES, CAPPED, APPROXIMATE, PRECISION,
        )  # fmt: skip
    key += batch * new_key_batch + shared.to(tl.int64) * new_key_head
    value += batch * new_value_batch + shared.to(tl.int64) * new_value_head
    beyond = tl.where(split == splits - 1, last + 1, near)
    wide_value = tl.arange(0, BLOCK_V)[None, :]
    for start in tl.range(near, beyond, UNIT, num_stages=1):
        position = start + tl.arange(0, UNIT)
        present = position < beyond
        held = present
        if TAKES:
            held = position < last
        spot = (position % kept)[:, None]
        k = tl.load(key_ring + spot * WIDTH + wide, mask=held[:, None] & (wide < WIDTH), other=0.0)
        inner = held[:, None] & (wide_value < VALUE_WIDTH)
        v = tl.load(value_ring + spot * VALUE_WIDTH + wide_value, mask=inner, other=0.0)
        if TAKES:
            new = (position == last)[:, None]
            k += tl.load(key + wide + spot * 0, mask=new & (wide < WIDTH), other=0.0).to(k.dtype)
            inner = new & (wide_value < VALUE_WIDTH)
            v += tl.load(value + wide_value + spot * 0, mask=inner, other=0.0).to(v.dtype)
        total, most, result = take_in(
            total, most, result, q, k.to(q.dtype), v.to(q.dtype), position, present, at, slope, valid, places,
            origin, window, scale, softcap, WINDOW, VALID, SLOPES, CAPPED, APPROXIMATE, PRECISION,
        )  # fmt: skip
    if (split == splits - 1) & TAKES:
        write_new_row(
            key, value, key_ring + (last % kept) * WIDTH, value_ring + (last % kept) * VALUE_WIDTH, WIDTH,
            VALUE_WIDTH, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    close_rows(
        total, most, result, output, partial, sums, sinks, batch, head, row, there, split, splits, heads, 1,
        output_batch, output_head, output_row, SINKS, FINAL, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _scale_of(least, greatest, levels, limit, like):  # type: ignore[no-untyped-def]
    """Scale and zero of codes up to ``levels``, as they are kept, in float32 (``cache_codes``)."""
    zero = tl.minimum(tl.maximum(least, -limit), limit).to(like.dtype.element_ty).to(tl.float32)
    scale = tl.div_rn(greatest - zero, tl.full(zero.shape, levels, tl.float32))
    scale = tl.minimum(tl.maximum(scale, 0.0), limit).to(like.dtype.element_ty).to(tl.float32)
    return scale, zero


@triton.jit
def _codes_of(x, scale, zero, levels):  # type: ignore[no-untyped-def]
    divided = tl.div_rn(x - zero, tl.where(scale > 0.0, scale, 1.0))
    divided = tl.where(scale > 0.0, divided, 0.0)
    return tl.minimum(tl.maximum((divided + NEAREST) - NEAREST, 0.0), levels).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _write_key_words(  # type: ignore[no-untyped-def]
    codes, base, channel, BITS: tl.constexpr, LOW: tl.constexpr, LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write a plane of ``BITS`` bits from bit ``LOW`` on of codes [``LENGTH``, ``CHANNELS``]."""
    each: tl.constexpr = 32 // BITS
    count: tl.constexpr = LENGTH // each
    plane = tl.reshape((codes >> LOW) & ((1 << BITS) - 1), [count, each, CHANNELS])
    shifts = tl.arange(0, each) * BITS
    words = tl.sum(plane << shifts[None, :, None], axis=1)
    place = base + tl.arange(0, count)[:, None] * WIDTH + channel[None, :]
    tl.store(place, words, mask=(channel < WIDTH)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _write_value_words(  # type: ignore[no-untyped-def]
    codes, base, row, words, BITS: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The same of codes [``ROWS``, ``BLOCK``] of values."""
    each: tl.constexpr = 32 // BITS
    plane = tl.reshape((codes >> LOW) & ((1 << BITS) - 1), [ROWS, BLOCK // each, each])
    shifts = tl.arange(0, each) * BITS
    made = tl.sum(plane << shifts[None, None, :], axis=2)
    word = tl.arange(0, BLOCK // each)
    place = base + row[:, None] * words + word[None, :]
    tl.store(place, made, mask=(row >= 0)[:, None] & (word * each < WIDTH)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _close_keys(  # type: ignore[no-untyped-def]
    key_codes, key_scales, key_ring, store, slot, begin, kept, limit, words, piece, BITS: tl.constexpr,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Round some channels of the block that begins at row ``begin`` of a ring, into block ``slot``."""
    channel = piece * CHANNELS + tl.arange(0, CHANNELS)
    row = begin + tl.arange(0, LENGTH)
    shown = channel < WIDTH
    place = key_ring + store * kept * WIDTH + row[:, None] * WIDTH + channel[None, :]
    x = tl.load(place, mask=shown[None, :], other=0.0).to(tl.float32)
    levels: tl.constexpr = (1 << BITS) - 1
    scale, zero = _scale_of(tl.min(x, axis=0), tl.max(x, axis=0), levels, limit, key_scales)
    scales = key_scales + slot * 2 * WIDTH + channel
    tl.store(scales, scale.to(key_scales.dtype.element_ty), mask=shown)
    tl.store(scales + WIDTH, zero.to(key_scales.dtype.element_ty), mask=shown)
    codes = _codes_of(x, scale[None, :], zero[None, :], levels)
    base = key_codes + slot * words * WIDTH
    if BITS == 3:
        _write_key_words(codes, base, channel, 2, 0, LENGTH, CHANNELS, WIDTH)
        _write_key_words(codes, base + LENGTH // 16 * WIDTH, channel, 1, 2, LENGTH, CHANNELS, WIDTH)
    else:
        _write_key_words(codes, base, channel, BITS, 0, LENGTH, CHANNELS, WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def _close_values(  # type: ignore[no-untyped-def]
    value_codes, value_scales, value_ring, store, slot, begin, kept, limit, words, first_words, piece,
    BITS: tl.constexpr, LENGTH: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round ``UNIT`` values of the same block."""
    inner = piece * UNIT + tl.arange(0, UNIT)
    wide = tl.arange(0, BLOCK)
    place = value_ring + store * kept * WIDTH + (begin + inner)[:, None] * WIDTH + wide[None, :]
    count: tl.constexpr = BLOCK // GROUP
    groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    levels: tl.constexpr = (1 << BITS) - 1
    # The last group may have fewer channels: what is not there is in no range.
    x = tl.load(place, mask=(wide < WIDTH)[None, :], other=float("inf")).to(tl.float32)
    least = tl.min(tl.reshape(x, [UNIT, count, GROUP]), axis=2)
    x = tl.where((wide < WIDTH)[None, :], x, -float("inf"))
    greatest = tl.max(tl.reshape(x, [UNIT, count, GROUP]), axis=2)
    scale, zero = _scale_of(least, greatest, levels, limit, value_scales)
    number = tl.arange(0, count)
    stored = slot * LENGTH + inner
    scales = value_scales + stored[:, None] * (2 * groups) + number[None, :]
    given = (number < groups)[None, :] & (inner >= 0)[:, None]
    tl.store(scales, scale.to(value_scales.dtype.element_ty), mask=given)
    tl.store(scales + groups, zero.to(value_scales.dtype.element_ty), mask=given)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [UNIT, count, GROUP]), [UNIT, BLOCK])
    zero = tl.reshape(tl.broadcast_to(zero[:, :, None], [UNIT, count, GROUP]), [UNIT, BLOCK])
    # Codes beyond the width are zero bits of the last words.
    codes = tl.where((wide < WIDTH)[None, :], _codes_of(x, scale, zero, levels), 0)
    if BITS == 3:
        _write_value_words(codes, value_codes, stored, words, 2, 0, UNIT, BLOCK, WIDTH)
        _write_value_words(codes, value_codes + first_words, stored, words, 1, 2, UNIT, BLOCK, WIDTH)
    else:
        _write_value_words(codes, value_codes, stored, words, BITS, 0, UNIT, BLOCK, WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def close_kernel(  # type: ignore[no-untyped-def]
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    key_ring,
    value_ring,
    positions,
    slots,
    kept,
    key_limit,
    value_limit,
    key_words,
    value_words,
    first_words,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some channels of a block's keys, or ``UNIT`` of its values, for each program: rounded and packed where
    the row at ``positions`` [1] is the last one before the first row of the block is overwritten, else
    nothing."""
    following = tl.load(positions).to(tl.int32) + 1
    if (following % LENGTH == 0) & (following >= kept):
        pieces: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
        per: tl.constexpr = LENGTH // UNIT
        piece = tl.program_id(0) % (pieces + per)
        store = (tl.program_id(0) // (pieces + per)).to(tl.int64)
        block = following // LENGTH - kept // LENGTH
        slot = store * slots + block % slots
        # Blocks do not wrap around the ring, which is a multiple of them.
        begin = (block * LENGTH) % kept
        if piece < pieces:
            _close_keys(
                key_codes, key_scales, key_ring, store, slot, begin, kept, key_limit, key_words, piece,
                KEY_BITS, LENGTH, CHANNELS, WIDTH,
            )  # fmt: skip
        else:
            _close_values(
                value_codes, value_scales, value_ring, store, slot, begin, kept, value_limit, value_words,
                first_words, piece - pieces, VALUE_BITS, LENGTH, GROUP, VALUE_WIDTH, BLOCK_V,
            )  # fmt: skip
