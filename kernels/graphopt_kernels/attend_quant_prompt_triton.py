"""Triton source of several rows' attention over rounded keys and values (``attend_quant_prompts``).

The row at position q reads, of keys at positions p and blocks of ``LENGTH``::

    p <  (q // LENGTH - kept // LENGTH + 1) * LENGTH     the numbers that packed keys stand for
    p >= that, up to q                                   the keys as they are, from the ring or the new rows

Tiles of rows go over numbers as attention over a full store does, and over the few exact ones behind. Imports
triton: import it lazily. Arguments of kernels are not annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.attend_triton import close_rows, part_of, rows_of_program, take_in
from graphopt_kernels.cache_rounding_triton import exact_rows

__all__ = ["prompt_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def prompt_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    far_keys,
    far_values,
    key_ring,
    value_ring,
    positions,
    asking,
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
    far,
    kept,
    splits,
    scale,
    softcap,
    LENGTH: tl.constexpr,
    FINAL: tl.constexpr,
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
    PRECISION: tl.constexpr,
):
    """``ROWS`` rows of a head of keys, of those at ``asking``, and a part of the rounded keys for each
    program; the last part takes the exact ones. New rows are at ``positions``; ``far`` places of a head have
    numbers."""
    split, item, row, head, there, at, first, last = rows_of_program(
        tl.program_id(0), asking, rows, group, splits, ROWS
    )
    shared = item % (heads // group)
    batch = (item // (heads // group)).to(tl.int64)
    head = shared * group + head
    store = batch * (heads // group) + shared
    valid += batch * valid_batch
    places += batch * places_batch
    key += batch * key_batch + shared.to(tl.int64) * key_head
    value += batch * value_batch + shared.to(tl.int64) * value_head
    key_ring += store * kept * WIDTH
    value_ring += store * kept * VALUE_WIDTH
    far_keys += store * far * WIDTH
    far_values += store * far * VALUE_WIDTH
    wide = tl.arange(0, BLOCK_D)[None, :]
    wide_value = tl.arange(0, BLOCK_V)[None, :]
    place = query + batch * query_batch + head[:, None].to(tl.int64) * query_head
    place = place + row[:, None].to(tl.int64) * query_row + wide
    q = tl.load(place, mask=there[:, None] & (wide < WIDTH), other=0.0)
    slope = tl.zeros([ROWS], tl.float32)
    if SLOPES:
        slope = tl.load(slopes + head, mask=there, other=0.0).to(tl.float32)
    # Scores may all be shifted alike, unless a sink stands beside them: nearer to 0 they are rounded less.
    origin = 0 if SINKS else last
    behind = kept // LENGTH - 1
    bound = (at // LENGTH - behind) * LENGTH
    near = tl.maximum((first // LENGTH - behind) * LENGTH, 0)
    high = tl.maximum((last // LENGTH - behind) * LENGTH, 0)
    total = tl.zeros([ROWS], tl.float32)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    result = tl.zeros([ROWS, BLOCK_V], tl.float32)
    begin, end = part_of(0, high, split, splits, COLUMNS)
    for start in range(begin, end, COLUMNS):
        position = start + tl.arange(0, COLUMNS)
        inside = position < end
        rounded = far_keys + position.to(tl.int64)[:, None] * WIDTH + wide
        k = tl.load(rounded, mask=inside[:, None] & (wide < WIDTH), other=0.0)
        rounded = far_values + position.to(tl.int64)[:, None] * VALUE_WIDTH + wide_value
        v = tl.load(rounded, mask=inside[:, None] & (wide_value < VALUE_WIDTH), other=0.0)
        if VALID:
            # A row that is padding reads itself, which is exact: not the last one before its bound.
            inside = inside & (tl.load(valid + position, mask=inside, other=0) != 0)
        total, most, result = take_in(
            total, most, result, q, k.to(q.dtype), v.to(q.dtype), position, inside, bound - 1, slope, valid,
            places, origin, 0, scale, softcap, False, VALID, SLOPES, CAPPED, APPROXIMATE, PRECISION,
        )  # fmt: skip
    oldest = tl.load(positions).to(tl.int32)
    beyond = tl.where(split == splits - 1, last + 1, near)
    window = (at - bound + 1)[:, None]
    for start in tl.range(near, beyond, COLUMNS, num_stages=1):
        position = start + tl.arange(0, COLUMNS)
        inside = position < beyond
        shown = inside[:, None] & (wide < WIDTH)
        k = exact_rows(key_ring, key, position, oldest, kept, key_row, wide, shown, WIDTH)
        shown = inside[:, None] & (wide_value < VALUE_WIDTH)
        v = exact_rows(value_ring, value, position, oldest, kept, value_row, wide_value, shown, VALUE_WIDTH)
        total, most, result = take_in(
            total, most, result, q, k.to(q.dtype), v.to(q.dtype), position, inside, at, slope, valid, places,
            origin, window, scale, softcap, True, VALID, SLOPES, CAPPED, APPROXIMATE, PRECISION,
        )  # fmt: skip
    close_rows(
        total, most, result, output, partial, sums, sinks, batch, head, row, there, split, splits, heads,
        rows, output_batch, output_head, output_row, SINKS, FINAL, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip
