"""Triton source that rounds and packs a block of exact rows (``attend_quant_launch``).

The layout is that of ``graphopt_kernels.cache_codes``; stores are contiguous. Imports triton: import it
lazily. Arguments of kernels are not annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.cache_numbers_triton import UNIT

__all__ = ["close_kernel"]

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
            _close_keys(
                key_codes, key_scales, key_ring, store, slot, begin, kept, key_limit, key_words, piece,
                KEY_BITS, LENGTH, CHANNELS, WIDTH,
            )  # fmt: skip
        else:
            _close_values(
                value_codes, value_scales, value_ring, store, slot, begin, kept, value_limit, value_words,
                first_words, piece - pieces, VALUE_BITS, LENGTH, GROUP, VALUE_WIDTH, BLOCK_V,
            )  # fmt: skip
