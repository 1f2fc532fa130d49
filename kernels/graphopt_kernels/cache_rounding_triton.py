"""Triton source that rounds and packs blocks of exact rows, and reads packed ones (``attend_quant_launch``,
``attend_quant_prompts``).

::

    close_kernel        the block that one row fills      codes and scales
    close_rows_kernel   the blocks that several rows do   codes and scales, and numbers they stand for
    read_kernel         blocks that are packed            numbers they stand for

The layout is that of ``graphopt_kernels.cache_codes``; stores are contiguous. Numbers are in the type of the
exact rows, [B, Hkv, places, width] by position. Imports triton: import it lazily. Arguments of kernels are
not annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.cache_numbers_triton import UNIT

__all__ = ["close_kernel", "close_rows_kernel", "exact_rows", "read_kernel"]

NEAREST = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken away again, it rounds to the nearest whole number, ties to even."""


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
    x, key_codes, key_scales, slot, limit, words, channel, BITS: tl.constexpr, LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Round keys ``x`` float32 [``LENGTH``, ``CHANNELS``] of a block, into block ``slot`` where it
    ``WRITES``. Returns the numbers that they become."""
    levels: tl.constexpr = (1 << BITS) - 1
    scale, zero = _scale_of(tl.min(x, axis=0), tl.max(x, axis=0), levels, limit, key_scales)
    codes = _codes_of(x, scale[None, :], zero[None, :], levels)
    if WRITES:
        shown = channel < WIDTH
        scales = key_scales + slot * 2 * WIDTH + channel
        tl.store(scales, scale.to(key_scales.dtype.element_ty), mask=shown)
        tl.store(scales + WIDTH, zero.to(key_scales.dtype.element_ty), mask=shown)
        base = key_codes + slot * words * WIDTH
        if BITS == 3:
            _write_key_words(codes, base, channel, 2, 0, LENGTH, CHANNELS, WIDTH)
            _write_key_words(codes, base + LENGTH // 16 * WIDTH, channel, 1, 2, LENGTH, CHANNELS, WIDTH)
        else:
            _write_key_words(codes, base, channel, BITS, 0, LENGTH, CHANNELS, WIDTH)
    return codes.to(tl.float32) * scale[None, :] + zero[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _close_values(  # type: ignore[no-untyped-def]
    x, value_codes, value_scales, stored, limit, words, first_words, BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Round values ``x`` float32 [``UNIT``, ``BLOCK``], into rows ``stored`` of the store where it
    ``WRITES``. Returns the numbers that they become."""
    wide = tl.arange(0, BLOCK)
    count: tl.constexpr = BLOCK // GROUP
    groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    levels: tl.constexpr = (1 << BITS) - 1
    # The last group may have fewer channels: what is not there is in no range.
    lowest = tl.where((wide < WIDTH)[None, :], x, float("inf"))
    least = tl.min(tl.reshape(lowest, [UNIT, count, GROUP]), axis=2)
    highest = tl.where((wide < WIDTH)[None, :], x, -float("inf"))
    greatest = tl.max(tl.reshape(highest, [UNIT, count, GROUP]), axis=2)
    scale, zero = _scale_of(least, greatest, levels, limit, value_scales)
    if WRITES:
        number = tl.arange(0, count)
        scales = value_scales + stored[:, None] * (2 * groups) + number[None, :]
        given = (number < groups)[None, :] & (stored >= 0)[:, None]
        tl.store(scales, scale.to(value_scales.dtype.element_ty), mask=given)
        tl.store(scales + groups, zero.to(value_scales.dtype.element_ty), mask=given)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [UNIT, count, GROUP]), [UNIT, BLOCK])
    zero = tl.reshape(tl.broadcast_to(zero[:, :, None], [UNIT, count, GROUP]), [UNIT, BLOCK])
    # Codes beyond the width are zero bits of the last words.
    codes = tl.where((wide < WIDTH)[None, :], _codes_of(x, scale, zero, levels), 0)
    if WRITES:
        if BITS == 3:
            _write_value_words(codes, value_codes, stored, words, 2, 0, UNIT, BLOCK, WIDTH)
            _write_value_words(codes, value_codes + first_words, stored, words, 1, 2, UNIT, BLOCK, WIDTH)
        else:
            _write_value_words(codes, value_codes, stored, words, BITS, 0, UNIT, BLOCK, WIDTH)
    return codes.to(tl.float32) * scale + zero


@triton.jit  # type: ignore[untyped-decorator]
def _close_old_keys(  # type: ignore[no-untyped-def]
    block, key_codes, key_scales, slot, limit, words, piece, BITS: tl.constexpr, LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Round some channels of a ``block`` of a ring."""
    channel = piece * CHANNELS + tl.arange(0, CHANNELS)
    place = block + tl.arange(0, LENGTH)[:, None] * WIDTH + channel[None, :]
    x = tl.load(place, mask=(channel < WIDTH)[None, :], other=0.0).to(tl.float32)
    _close_keys(x, key_codes, key_scales, slot, limit, words, channel, BITS, LENGTH, CHANNELS, WIDTH, True)


@triton.jit  # type: ignore[untyped-decorator]
def _close_old_values(  # type: ignore[no-untyped-def]
    block, value_codes, value_scales, slot, limit, words, first_words, piece, BITS: tl.constexpr,
    LENGTH: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round ``UNIT`` values of it."""
    inner = piece * UNIT + tl.arange(0, UNIT)
    wide = tl.arange(0, BLOCK)[None, :]
    x = tl.load(block + inner[:, None] * WIDTH + wide, mask=wide < WIDTH, other=0.0).to(tl.float32)
    _close_values(
        x, value_codes, value_scales, slot * LENGTH + inner, limit, words, first_words, BITS, GROUP, WIDTH,
        BLOCK, True,
    )  # fmt: skip


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
    the row at ``positions`` [1], which is in the rings, is the last before one takes the place of the first
    row of the block, else nothing. The same row may come twice."""
    beyond = tl.load(positions).to(tl.int32) + 1
    if (beyond % LENGTH == 0) & (beyond >= kept):
        pieces: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
        per: tl.constexpr = LENGTH // UNIT
        piece = tl.program_id(0) % (pieces + per)
        store = (tl.program_id(0) // (pieces + per)).to(tl.int64)
        block = beyond // LENGTH - kept // LENGTH
        slot = store * slots + block % slots
        # Blocks do not wrap around the ring, which is a multiple of them.
        begin = (block * LENGTH) % kept
        if piece < pieces:
            _close_old_keys(
                key_ring + (store * kept + begin) * WIDTH, key_codes, key_scales, slot, key_limit, key_words,
                piece, KEY_BITS, LENGTH, CHANNELS, WIDTH,
            )  # fmt: skip
        else:
            _close_old_values(
                value_ring + (store * kept + begin) * VALUE_WIDTH, value_codes, value_scales, slot,
                value_limit, value_words, first_words, piece - pieces, VALUE_BITS, LENGTH, GROUP, VALUE_WIDTH,
                BLOCK_V,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def exact_rows(  # type: ignore[no-untyped-def]
    ring,
    new,
    position,
    first,
    kept,
    new_row,
    column,
    shown,
    WIDTH: tl.constexpr,
):
    """Rows at ``position`` [R], columns ``column`` [1, C] of them, in the type of the ring: from the ring
    where they came before ``first``, else from ``new``."""
    fresh = (position >= first)[:, None]
    old = ring + ((position % kept) * WIDTH)[:, None] + column
    row = (position - first).to(tl.int64)[:, None]
    held = tl.load(old, mask=~fresh & shown, other=0.0)
    come = tl.load(new + row * new_row + column, mask=fresh & shown, other=0.0)
    return tl.where(fresh, come.to(held.dtype), held)


@triton.jit  # type: ignore[untyped-decorator]
def _close_new_keys(  # type: ignore[no-untyped-def]
    key, ring, key_codes, key_scales, far_keys, slot, begin, first, kept, key_row, limit, words, piece,
    BITS: tl.constexpr, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    WRITES: tl.constexpr,
):  # fmt: skip
    """Round some channels of the block that begins at position ``begin``."""
    channel = piece * CHANNELS + tl.arange(0, CHANNELS)
    shown = (channel < WIDTH)[None, :]
    position = begin + tl.arange(0, LENGTH)
    x = exact_rows(ring, key, position, first, kept, key_row, channel[None, :], shown, WIDTH)
    numbers = _close_keys(
        x.to(tl.float32), key_codes, key_scales, slot, limit, words, channel, BITS, LENGTH, CHANNELS, WIDTH,
        WRITES,
    )  # fmt: skip
    place = far_keys + position.to(tl.int64)[:, None] * WIDTH + channel[None, :]
    tl.store(place, numbers.to(far_keys.dtype.element_ty), mask=shown)


@triton.jit  # type: ignore[untyped-decorator]
def _close_new_values(  # type: ignore[no-untyped-def]
    value, ring, value_codes, value_scales, far_values, slot, begin, first, kept, value_row, limit, words,
    first_words, piece, BITS: tl.constexpr, LENGTH: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Round ``UNIT`` values of the same block."""
    inner = piece * UNIT + tl.arange(0, UNIT)
    position = begin + inner
    wide = tl.arange(0, BLOCK)[None, :]
    shown = wide < WIDTH
    x = exact_rows(ring, value, position, first, kept, value_row, wide, shown, WIDTH)
    numbers = _close_values(
        x.to(tl.float32), value_codes, value_scales, slot * LENGTH + inner, limit, words, first_words, BITS,
        GROUP, WIDTH, BLOCK, WRITES,
    )  # fmt: skip
    place = far_values + position.to(tl.int64)[:, None] * WIDTH + wide
    tl.store(place, numbers.to(far_values.dtype.element_ty), mask=shown)


@triton.jit  # type: ignore[untyped-decorator]
def close_rows_kernel(  # type: ignore[no-untyped-def]
    key,
    value,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    key_ring,
    value_ring,
    positions,
    far_keys,
    far_values,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    groups,
    rows,
    count,
    far,
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
    WRITES: tl.constexpr,
):
    """The same of the last ``count`` blocks that ``rows`` new rows ``key`` and ``value`` at ``positions`` may
    fill, the rings as they were before: numbers go to ``far`` places of a head, and where it ``WRITES`` codes
    and scales to the stores, of which no slot is that of two blocks."""
    pieces: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    per: tl.constexpr = LENGTH // UNIT
    piece = tl.program_id(0) % (pieces + per)
    rest = tl.program_id(0) // (pieces + per)
    store = (rest // count).to(tl.int64)
    first = tl.load(positions).to(tl.int32)
    beyond = tl.load(positions + rows - 1).to(tl.int32) + 1
    block = beyond // LENGTH - kept // LENGTH - (count - 1 - rest % count)
    if (block >= 0) & (block * LENGTH + kept > first) & (block * LENGTH < far):
        slot = store * slots + block % slots
        if piece < pieces:
            key += (store // groups) * key_batch + (store % groups) * key_head
            _close_new_keys(
                key, key_ring + store * kept * WIDTH, key_codes, key_scales, far_keys + store * far * WIDTH,
                slot, block * LENGTH, first, kept, key_row, key_limit, key_words, piece, KEY_BITS, LENGTH,
                CHANNELS, WIDTH, WRITES,
            )  # fmt: skip
        else:
            value += (store // groups) * value_batch + (store % groups) * value_head
            _close_new_values(
                value, value_ring + store * kept * VALUE_WIDTH, value_codes, value_scales,
                far_values + store * far * VALUE_WIDTH, slot, block * LENGTH, first, kept, value_row,
                value_limit, value_words, first_words, piece - pieces, VALUE_BITS, LENGTH, GROUP, VALUE_WIDTH,
                BLOCK_V, WRITES,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _codes_at(place, number, apart, second, shown, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes ``number`` of rows of words at ``place``, words ``apart`` from each other; the highest of three
    bits begin ``second`` words on."""
    low: tl.constexpr = 2 if BITS == 3 else BITS
    each: tl.constexpr = 32 // low
    word = tl.load(place + (number // each) * apart, mask=shown, other=0)
    code = (word >> ((number % each) * low)) & ((1 << low) - 1)
    if BITS == 3:
        word = tl.load(place + (second + number // 32) * apart, mask=shown, other=0)
        code |= ((word >> (number % 32)) & 1) << 2
    return code.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _read_keys(  # type: ignore[no-untyped-def]
    key_codes, key_scales, far_keys, slot, begin, words, piece, BITS: tl.constexpr, LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    channel = (piece * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    shown = channel < WIDTH
    token = tl.arange(0, LENGTH)[:, None]
    place = key_codes + slot * words * WIDTH + channel
    code = _codes_at(place, token, WIDTH, LENGTH // 16, shown, BITS)
    scales = key_scales + slot * 2 * WIDTH + channel
    scale = tl.load(scales, mask=shown, other=0.0).to(tl.float32)
    zero = tl.load(scales + WIDTH, mask=shown, other=0.0).to(tl.float32)
    place = far_keys + (begin + token).to(tl.int64) * WIDTH + channel
    tl.store(place, (code * scale + zero).to(far_keys.dtype.element_ty), mask=shown)


@triton.jit  # type: ignore[untyped-decorator]
def _read_values(  # type: ignore[no-untyped-def]
    value_codes, value_scales, far_values, slot, begin, words, first_words, piece, BITS: tl.constexpr,
    LENGTH: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inner = (piece * UNIT + tl.arange(0, UNIT))[:, None]
    wide = tl.arange(0, BLOCK)[None, :]
    shown = wide < WIDTH
    groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    stored = slot * LENGTH + inner
    code = _codes_at(value_codes + stored * words, wide, 1, first_words, shown, BITS)
    scales = value_scales + stored * (2 * groups) + wide // GROUP
    scale = tl.load(scales, mask=shown, other=0.0).to(tl.float32)
    zero = tl.load(scales + groups, mask=shown, other=0.0).to(tl.float32)
    place = far_values + (begin + inner).to(tl.int64) * WIDTH + wide
    tl.store(place, (code * scale + zero).to(far_values.dtype.element_ty), mask=shown)


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(  # type: ignore[no-untyped-def]
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    positions,
    far_keys,
    far_values,
    count,
    far,
    slots,
    kept,
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
    """Some channels of a block's keys, or ``UNIT`` of its values, for each program: the numbers of the first
    ``count`` blocks of a head, where they were packed before the row at ``positions`` [0] came."""
    pieces: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    per: tl.constexpr = LENGTH // UNIT
    piece = tl.program_id(0) % (pieces + per)
    rest = tl.program_id(0) // (pieces + per)
    store = (rest // count).to(tl.int64)
    block = rest % count
    if block * LENGTH + kept <= tl.load(positions).to(tl.int32):
        slot = store * slots + block
        if piece < pieces:
            _read_keys(
                key_codes, key_scales, far_keys + store * far * WIDTH, slot, block * LENGTH, key_words, piece,
                KEY_BITS, LENGTH, CHANNELS, WIDTH,
            )  # fmt: skip
        else:
            _read_values(
                value_codes, value_scales, far_values + store * far * VALUE_WIDTH, slot, block * LENGTH,
                value_words, first_words, piece - pieces, VALUE_BITS, LENGTH, GROUP, VALUE_WIDTH, BLOCK_V,
            )  # fmt: skip
