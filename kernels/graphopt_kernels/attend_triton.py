"""Triton source of attention over stores (``attend_launch``). Imports triton: import it lazily.

::

    attend_kernel   a part of the keys for all heads that share them   maximum, sum and weighted values
    merge_kernel    the parts of a row                                 the row of the output

Where a sequence is, is read from ``positions`` on the device: the keys that are there are shared out evenly
among the parts, whatever the position is, and what is beyond is not read. Arguments of kernels are not
annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.attention_triton import base_two_scores

__all__ = [
    "attend_kernel", "close_rows", "merge_kernel", "part_of", "rows_of_program", "take_in", "write_kernel",
    "write_new_row",
]  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)

UNIT = tl.constexpr(16)
"""Keys that parts are shared out in."""

MERGED = tl.constexpr(32)
"""Parts that are added up at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def rows_of_program(program, positions, rows, group, splits, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which rows a program has: rows of positions and heads of a group are counted together, heads first, so
    that a key that several of them read is read once.

    Returns the part, the number of batch and head of keys, the rows, their heads within the group, whether
    each is there, positions of rows, and the first and the last of these. Rows that see most go first.
    """
    split = program % splits
    rest = program // splits
    all_rows = rows * group
    blocks = tl.cdiv(all_rows, ROWS)
    begin = (blocks - 1 - rest % blocks) * ROWS
    packed = begin + tl.arange(0, ROWS)
    there = packed < all_rows
    row = tl.where(there, packed, 0) // group
    head = tl.where(there, packed, 0) % group
    at = tl.load(positions + row, mask=there, other=0).to(tl.int32)
    first = tl.load(positions + begin // group).to(tl.int32)
    last = tl.load(positions + (tl.minimum(begin + ROWS, all_rows) - 1) // group).to(tl.int32)
    return split, rest // blocks, row, head, there, at, first, last


@triton.jit  # type: ignore[untyped-decorator]
def part_of(low, high, split, splits, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The ``split``-th of ``splits`` even parts of the places from ``low`` to ``high``, of ``STEP`` or more:
    the last ones are empty where there are few places."""
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), UNIT) * UNIT
    share = tl.maximum(share, STEP)
    begin = low + split * share
    return begin, tl.minimum(begin + share, high)


@triton.jit  # type: ignore[untyped-decorator]
def take_in(  # type: ignore[no-untyped-def]
    total,
    most,
    result,
    q,
    k,
    v,
    position,
    inside,
    at,
    slope,
    valid,
    places,
    origin,
    window,
    scale,
    softcap,
    WINDOW: tl.constexpr,
    VALID: tl.constexpr,
    SLOPES: tl.constexpr,
    CAPPED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take keys ``k`` [C, D] and values ``v`` [C, Dv] at ``position`` [C] into the running softmax of rows
    ``q`` [R, D] at positions ``at`` [R]. ``inside`` [C]: which of them are there."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores, _ = base_two_scores(
        products, at, position, q, 0, 0, 0, 0, scale, softcap, CAPPED, APPROXIMATE, 0, False
    )
    if SLOPES:
        place = position - origin
        if VALID:
            place = tl.load(places + position, mask=inside, other=0) - 1
        scores += (slope * LOG2E)[:, None] * place.to(tl.float32)[None, :]
    seen = inside[None, :] & (position[None, :] <= at[:, None])
    if WINDOW:
        seen = seen & (position[None, :] > at[:, None] - window)
    if VALID:
        known = tl.load(valid + position, mask=inside, other=0) != 0
        # A row that is padding reads itself: nobody reads it, but it must be a number.
        seen = seen & (known[None, :] | (position[None, :] == at[:, None]))
    scores = tl.where(seen, scores, -float("inf"))
    highest = tl.maximum(most, tl.max(scores, axis=1))
    # Rows of which nothing was seen yet: what is minus infinity has to stay so.
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(most - shift)
    total = total * shrink + tl.sum(weights, axis=1)
    result = result * shrink[:, None]
    result = tl.dot(weights.to(v.dtype), v, result, input_precision=PRECISION)
    return total, highest, result


@triton.jit  # type: ignore[untyped-decorator]
def _columns_of(base, start, stride, inside, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``COUNT`` rows of ``WIDTH`` elements from ``start`` on, zeros where they are not ``inside``."""
    row = tl.arange(0, COUNT)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    # The start may lie beyond what 32 bits can tell, the place within a tile does not.
    place = base + tl.full((), start, tl.int64) * stride + row * stride + column
    mask = inside[:, None]
    if BLOCK > WIDTH:
        mask = mask & (column < WIDTH)
    return tl.load(place, mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def write_new_row(  # type: ignore[no-untyped-def]
    key,
    value,
    key_place,
    value_place,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Copy a key and a value to their places in the stores."""
    wide = tl.arange(0, BLOCK_D)
    row = tl.load(key + wide, mask=wide < WIDTH)
    tl.store(key_place + wide, row.to(key_place.dtype.element_ty), mask=wide < WIDTH)
    wide = tl.arange(0, BLOCK_V)
    row = tl.load(value + wide, mask=wide < VALUE_WIDTH)
    tl.store(value_place + wide, row.to(value_place.dtype.element_ty), mask=wide < VALUE_WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def close_rows(  # type: ignore[no-untyped-def]
    total,
    most,
    result,
    output,
    partial,
    sums,
    sinks,
    batch,
    head,
    row,
    there,
    split,
    splits,
    heads,
    rows,
    output_batch,
    output_head,
    output_row,
    SINKS: tl.constexpr,
    FINAL: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write rows of the output (``FINAL``: there is one part), or of ``partial`` float32 [B, H, n, parts,
    Dv] beside the logarithms in base 2 of their sums, ``sums`` [B, H, n, parts]."""
    wide = tl.arange(0, BLOCK_V)[None, :]
    mask = there[:, None] & (wide < VALUE_WIDTH)
    if FINAL:
        if SINKS:
            sink = tl.load(sinks + head, mask=there, other=0.0).to(tl.float32) * LOG2E
            highest = tl.maximum(most, sink)
            shrink = tl.exp2(most - highest)
            total = total * shrink + tl.exp2(sink - highest)
            result = result * shrink[:, None]
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        place = output + batch * output_batch + head[:, None].to(tl.int64) * output_head
        place = place + row[:, None].to(tl.int64) * output_row + wide
        tl.store(place, result.to(output.dtype.element_ty), mask=mask)
    else:
        item = ((batch * heads + head) * rows + row) * splits + split
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(partial + item[:, None] * VALUE_WIDTH + wide, result, mask=mask & (total > 0.0)[:, None])
        tl.store(sums + item, most + tl.log2(total), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def attend_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    key_store,
    value_store,
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
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    valid_batch,
    places_batch,
    output_batch,
    output_head,
    output_row,
    heads,
    group,
    rows,
    slots,
    splits,
    window,
    scale,
    softcap,
    RING: tl.constexpr,
    NEW: tl.constexpr,
    WRITES: tl.constexpr,
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
    COLUMNS: tl.constexpr,
    NEW_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``ROWS`` rows of a head of keys and a part of the keys for each program.

    ``NEW``: the stores hold what was before the first row; new keys come from ``key`` and ``value``, in
    ``NEW_COLUMNS`` at a time, and the last part takes them. ``WRITES``: it also puts the one new row in its
    place, from where no program reads. ``RING``: position p is in slot ``p % slots``. Strides are named after
    tensor and dimension; the last of each is 1.
    """
    split, item, row, head, there, at, first, last = rows_of_program(
        tl.program_id(0), positions, rows, group, splits, ROWS
    )
    shared = item % (heads // group)
    batch = (item // (heads // group)).to(tl.int64)
    head = shared * group + head
    shared = shared.to(tl.int64)
    valid += batch * valid_batch
    places += batch * places_batch
    key_store += batch * key_batch + shared * key_head
    value_store += batch * value_batch + shared * value_head
    wide = tl.arange(0, BLOCK_D)[None, :]
    place = query + batch * query_batch + head[:, None].to(tl.int64) * query_head
    place = place + row[:, None].to(tl.int64) * query_row + wide
    q = tl.load(place, mask=there[:, None] & (wide < WIDTH), other=0.0)
    slope = tl.zeros([ROWS], tl.float32)
    if SLOPES:
        slope = tl.load(slopes + head, mask=there, other=0.0).to(tl.float32)
    # Scores may all be shifted alike, unless a sink stands beside them: nearer to 0 they are rounded less.
    origin = 0 if SINKS else last
    low = 0
    high = tl.minimum(last + 1, slots)
    oldest = tl.full((), 0, tl.int32)
    if NEW:
        oldest = tl.load(positions).to(tl.int32)
        high = tl.minimum(oldest, slots)
    elif RING:
        # The one row is in its slot already.
        oldest = last + 1
    if WINDOW and not RING:
        low = tl.maximum(first - window + 1, 0)
    total = tl.zeros([ROWS], tl.float32)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    result = tl.zeros([ROWS, BLOCK_V], tl.float32)
    if NEW:
        key += batch * new_key_batch + shared * new_key_head
        value += batch * new_value_batch + shared * new_value_head
        newest = 0
        if WINDOW:
            newest = tl.maximum(first - window + 1 - oldest, 0)
        # The last part has the fewest keys.
        beyond = tl.where(split == splits - 1, last - oldest + 1, newest)
        # Mostly one tile: nothing to have on its way.
        for start in tl.range(newest, beyond, NEW_COLUMNS, num_stages=1):
            number = start + tl.arange(0, NEW_COLUMNS)
            inside = number < beyond
            # As later rows will find them.
            k = _columns_of(key, start, new_key_row, inside, NEW_COLUMNS, WIDTH, BLOCK_D)
            k = k.to(key_store.dtype.element_ty).to(q.dtype)
            v = _columns_of(value, start, new_value_row, inside, NEW_COLUMNS, VALUE_WIDTH, BLOCK_V)
            v = v.to(value_store.dtype.element_ty).to(q.dtype)
            total, most, result = take_in(
                total, most, result, q, k, v, oldest + number, inside, at, slope, valid, places, origin,
                window, scale, softcap, WINDOW, VALID, SLOPES, CAPPED, APPROXIMATE, PRECISION,
            )  # fmt: skip
        if WRITES:
            place_in = oldest
            if RING:
                place_in = oldest % slots
            # Blocks of rows may be several.
            block = (tl.program_id(0) // splits) % tl.cdiv(rows * group, ROWS)
            if (split == splits - 1) & (block == 0) & (place_in < slots):
                write_new_row(
                    key, value, key_store + place_in.to(tl.int64) * key_row,
                    value_store + place_in.to(tl.int64) * value_row, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V,
                )  # fmt: skip
    begin, end = part_of(low, high, split, splits, COLUMNS)
    for start in range(begin, end, COLUMNS):
        slot = start + tl.arange(0, COLUMNS)
        inside = slot < end
        position = slot
        if RING:
            position = oldest - 1 - (oldest - 1 - slot + slots) % slots
            # What is out of every window may be overwritten right now.
            inside = inside & (position > first - window)
        k = _columns_of(key_store, start, key_row, inside, COLUMNS, WIDTH, BLOCK_D).to(q.dtype)
        v = _columns_of(value_store, start, value_row, inside, COLUMNS, VALUE_WIDTH, BLOCK_V).to(q.dtype)
        total, most, result = take_in(
            total, most, result, q, k, v, position, inside, at, slope, valid, places, origin, window, scale,
            softcap, WINDOW, VALID, SLOPES, CAPPED, APPROXIMATE, PRECISION,
        )  # fmt: skip
    close_rows(
        total, most, result, output, partial, sums, sinks, batch, head, row, there, split, splits, heads,
        rows, output_batch, output_head, output_row, SINKS, FINAL, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(  # type: ignore[no-untyped-def]
    partial,
    sums,
    sinks,
    output,
    output_batch,
    output_head,
    output_row,
    heads,
    rows,
    splits,
    SINKS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """A row of the output for each program, its parts added up in their order."""
    item = tl.program_id(0).to(tl.int64)
    row = item % rows
    head = (item // rows) % heads
    batch = item // rows // heads
    partial += item * splits * VALUE_WIDTH
    sums += item * splits
    part = tl.arange(0, BLOCK_SPLITS)
    logs = tl.load(sums + part, mask=part < splits, other=-float("inf"))
    highest = tl.max(logs, axis=0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.sum(tl.exp2(logs - highest), axis=0)
    if SINKS:
        total += tl.exp2(sink - highest)
    wide = tl.arange(0, BLOCK_V)
    result = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, splits, MERGED):
        number = start + tl.arange(0, MERGED)
        log = tl.load(sums + number, mask=number < splits, other=-float("inf"))
        # Parts without keys have written none. What is no number shall show.
        given = (log != -float("inf"))[:, None] & (wide < VALUE_WIDTH)[None, :]
        each = tl.load(partial + number[:, None] * VALUE_WIDTH + wide[None, :], mask=given, other=0.0)
        result += tl.sum(each * tl.exp2(log - highest)[:, None], axis=0)
    result = result / tl.where(total == 0.0, 1.0, total)
    place = output + batch * output_batch + head * output_head + row * output_row + wide
    tl.store(place, result.to(output.dtype.element_ty), mask=wide < VALUE_WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def write_kernel(  # type: ignore[no-untyped-def]
    key,
    value,
    key_store,
    value_store,
    positions,
    new_key_batch,
    new_key_head,
    new_key_row,
    new_value_batch,
    new_value_head,
    new_value_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    groups,
    rows,
    skipped,
    slots,
    RING: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A new row of a head for each program, to its place in the stores; the first ``skipped`` of ``rows`` are
    overtaken by later ones."""
    item = tl.program_id(0)
    count = rows - skipped
    row = (skipped + item % count).to(tl.int64)
    shared = ((item // count) % groups).to(tl.int64)
    batch = (item // count // groups).to(tl.int64)
    slot = tl.load(positions + row)
    if RING:
        slot = slot % slots
    if slot < slots:
        write_new_row(
            key + batch * new_key_batch + shared * new_key_head + row * new_key_row,
            value + batch * new_value_batch + shared * new_value_head + row * new_value_row,
            key_store + batch * key_batch + shared * key_head + slot * key_row,
            value_store + batch * value_batch + shared * value_head + slot * value_row,
            WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V,
        )  # fmt: skip
