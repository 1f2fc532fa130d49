"""Triton source of one row's attention over rounded keys and values (``attend_quant_launch``).

::

    attend_kernel   a part of the keys for all heads that share them            maximum, sum, weighted values
    merge_kernel    the parts of a row (``attend_triton``)                      the row of the output
    close_kernel    a block of exact rows (``cache_rounding_triton``)           its codes and scales

The layout is that of ``graphopt_kernels.cache_codes``; stores are contiguous. Products are turned: keys and
values, which are many, are the rows that tensor cores take by sixteen, heads the columns, which they take by
eight. Each warp has keys of its own and its own running softmax; they meet once, after the last key. Imports
triton: import it lazily. Arguments of kernels are not annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.attend_triton import close_rows, rows_of_program, take_in, write_new_row
from graphopt_kernels.attention_triton import base_two_scores
from graphopt_kernels.cache_numbers_triton import (
    UNIT,
    for_values,
    in_order,
    keys_of,
    positions_of,
    values_of,
)

__all__ = ["attend_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded_part(  # type: ignore[no-untyped-def]
    q,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    begin,
    end,
    oldest,
    slots,
    last,
    slope,
    valid,
    places,
    origin,
    window,
    scale,
    softcap,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    VALID: tl.constexpr,
    SLOPES: tl.constexpr,
    CAPPED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    TEAM: tl.constexpr,
    COUNT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums, maxima and weighted values of rows ``q`` [R, D] over rounded units ``begin`` to ``end``, of a
    store whose ``oldest`` block is told: [R], [R] and [R, Dv], ready for more keys."""
    per: tl.constexpr = LENGTH // UNIT
    words: tl.constexpr = LENGTH * KEY_BITS // 32
    columns = tl.broadcast_to(tl.trans(q)[None, :, :], [TEAM, BLOCK_D, ROWS])
    total = tl.zeros([TEAM, ROWS], tl.float32)
    most = tl.full([TEAM, ROWS], -float("inf"), tl.float32)
    # As many channels of values at a time as registers have room for, in whole groups.
    part: tl.constexpr = min(BLOCK_V, max(GROUP, 2048 // q.dtype.primitive_bitwidth))
    result = tl.zeros([TEAM, part, ROWS], tl.float32)
    more = result
    order = positions_of(TEAM, COUNT, KEY_BITS)
    first = oldest % slots
    for unit in range(begin, end, TEAM * COUNT):
        # What is beyond the end is read as the last unit again, which is there, and not seen.
        number = tl.minimum(unit + tl.arange(0, TEAM * COUNT), end - 1)
        block = first + number // per - oldest
        block = tl.where(block < slots, block, block - slots)
        inner = number % per
        k = keys_of(
            key_codes, key_scales, block, inner, TEAM, per, words, KEY_BITS, WIDTH, BLOCK_D, q.dtype, FAST
        )  # fmt: skip
        products = tl.dot(k, columns, input_precision=PRECISION)
        position = unit * UNIT + order
        scores, _ = base_two_scores(
            products, 0, 0, q, 0, 0, 0, 0, scale, softcap, CAPPED, APPROXIMATE, 0, False
        )
        seen = position < end * UNIT
        if SLOPES:
            place = position - origin
            if VALID:
                place = tl.load(places + position, mask=seen, other=0) - 1
            scores += (slope * LOG2E)[None, None, :] * place.to(tl.float32)[:, :, None]
        if VALID:
            seen = seen & (tl.load(valid + position, mask=seen, other=0) != 0)
        if WINDOW:
            seen = seen & (position > last - window)
        scores = tl.where(seen[:, :, None], scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, axis=1))
        # Of warps that saw nothing yet, what is minus infinity has to stay so.
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        weights = tl.exp2(scores - shift[:, None, :])
        shrink = tl.exp2(most - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        most = highest
        weights = for_values(weights.to(q.dtype), KEY_BITS)
        v = values_of(
            value_codes, value_scales, block * per + inner, 0, TEAM, VALUE_BITS, GROUP, VALUE_WIDTH, part,
            q.dtype, FAST,
        )  # fmt: skip
        result = tl.dot(v, weights, result * shrink[:, None, :], input_precision=PRECISION)
        if part < BLOCK_V:
            v = values_of(
                value_codes, value_scales, block * per + inner, part, TEAM, VALUE_BITS, GROUP, VALUE_WIDTH,
                part, q.dtype, FAST,
            )  # fmt: skip
            more = tl.dot(v, weights, more * shrink[:, None, :], input_precision=PRECISION)
    highest = tl.max(most, axis=0)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    shrink = tl.exp2(most - shift[None, :])
    total = tl.sum(total * shrink, axis=0)
    result = in_order(tl.sum(result * shrink[:, None, :], axis=0), VALUE_BITS)
    if part < BLOCK_V:
        more = in_order(tl.sum(more * shrink[:, None, :], axis=0), VALUE_BITS)
        both = tl.permute(tl.join(result, more), [2, 0, 1])
        result = tl.reshape(both, [BLOCK_V, ROWS])
    return total, highest, tl.trans(result)


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
    TEAM: tl.constexpr,
    COUNT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``ROWS`` heads of a group, and a part of the keys, for each program.

    Blocks have ``LENGTH`` positions, ``slots`` of them are kept, and ``kept`` rows as they are. Each of
    ``TEAM`` warps takes ``COUNT`` units of rounded keys at a time; the last part takes the exact ones.
    ``TAKES``: the new row is read from ``key`` and ``value``, and written in the place of one that no program
    reads. ``FAST``: numbers are made by instructions of the device.
    """
    split, item, row, head, there, at, _, last = rows_of_program(
        tl.program_id(0), positions, 1, group, splits, ROWS
    )
    shared = item % (heads // group)
    batch = (item // (heads // group)).to(tl.int64)
    head = shared * group + head
    store = batch * (heads // group) + shared
    key_words: tl.constexpr = LENGTH * KEY_BITS // 32
    value_words: tl.constexpr = (
        (VALUE_WIDTH + 15) // 16 + (VALUE_WIDTH + 31) // 32 if VALUE_BITS == 3
        else (VALUE_WIDTH * VALUE_BITS + 31) // 32
    )  # fmt: skip
    groups: tl.constexpr = (VALUE_WIDTH + GROUP - 1) // GROUP
    key_codes += store * slots * key_words * WIDTH
    key_scales += store * slots * 2 * WIDTH
    value_codes += store * slots * LENGTH * value_words
    value_scales += store * slots * LENGTH * 2 * groups
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
    oldest = tl.maximum(newest - slots + 1, 0)
    low = oldest * per
    high = (newest + 1) * per
    near = tl.maximum(newest + 1, 0) * LENGTH
    if WINDOW:
        low = tl.maximum(low, tl.maximum(last - window + 1, 0) // UNIT)
        near = tl.maximum(near, last - window + 1)
    # The last part has exact rows alone, unless it is the only one.
    share = tl.cdiv(tl.maximum(high - low, 0), tl.maximum(splits - 1, 1))
    share = tl.maximum(tl.cdiv(share, COUNT) * COUNT, COUNT)
    begin = low + split * share
    end = tl.minimum(begin + share, high)
    total, most, result = _rounded_part(
        q, key_codes, key_scales, value_codes, value_scales, begin, end, oldest, slots, last, slope, valid,
        places, origin, window, scale, softcap, KEY_BITS, VALUE_BITS, LENGTH, GROUP, WINDOW, VALID, SLOPES,
        CAPPED, APPROXIMATE, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V, ROWS, TEAM, COUNT, FAST, PRECISION,
    )  # fmt: skip
    key += batch * new_key_batch + shared.to(tl.int64) * new_key_head
    value += batch * new_value_batch + shared.to(tl.int64) * new_value_head
    beyond = tl.where(split == splits - 1, last + 1, near)
    wide_value = tl.arange(0, BLOCK_V)[None, :]
    # As many exact rows at a time as the registers of few warps have room for.
    some: tl.constexpr = UNIT if TEAM > 1 else 16
    for start in tl.range(near, beyond, some, num_stages=1):
        position = start + tl.arange(0, some)
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
    # Heads of a group may be of several programs.
    first = (tl.program_id(0) // splits) % tl.cdiv(group, ROWS) == 0
    if (split == splits - 1) & first & TAKES:
        write_new_row(
            key, value, key_ring + (last % kept) * WIDTH, value_ring + (last % kept) * VALUE_WIDTH, WIDTH,
            VALUE_WIDTH, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    close_rows(
        total, most, result, output, partial, sums, sinks, batch, head, row, there, split, splits, heads, 1,
        output_batch, output_head, output_row, SINKS, FINAL, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip
