"""Triton source of ``graphopt_kernels.rotary_stores``. Imports triton: import it lazily.

A program has some heads of queries, keys or values of one row: a step of one token has few heads, and all
that counts is that many multiprocessors begin at once. How heads are turned is ``rotary_triton``'s. Kernel
arguments are not annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.rotary_triton import load_table, turn_part

__all__ = ["stores_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def stores_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    turned,
    key_store,
    value_store,
    positions,
    cos,
    sin,
    query_weight,
    key_weight,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    turned_batch,
    turned_head,
    turned_row,
    key_store_batch,
    key_store_head,
    key_store_row,
    value_store_batch,
    value_store_head,
    value_store_row,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    rows,
    slots,
    eps,
    offset,
    RING: tl.constexpr,
    NORMED: tl.constexpr,
    QUERY_WEIGHTED: tl.constexpr,
    KEY_WEIGHTED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALVED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HEADS: tl.constexpr,
):
    """``HEADS`` heads of one row: of queries, turned, to ``turned``; of keys, turned, and of values to their
    place in the stores. A position that has no place there is not written, and its queries are NaN.

    Strides are named after tensor and dimension, in elements; the last of each is 1.
    """
    QUERY_BLOCKS: tl.constexpr = (QUERIES + HEADS - 1) // HEADS
    KEY_BLOCKS: tl.constexpr = (KEYS + HEADS - 1) // HEADS
    BLOCKS: tl.constexpr = QUERY_BLOCKS + 2 * KEY_BLOCKS
    block = tl.program_id(0) % BLOCKS
    # A tile of one position: [1, 1, 1], as what turns heads expects it.
    item = tl.program_id(0) // BLOCKS + tl.zeros([1, 1, 1], tl.int32)
    batch = (item // rows).to(tl.int64)
    row = (item % rows).to(tl.int64)
    there = item >= 0
    place = tl.load(positions + row).to(tl.int64)
    kept = place >= 0
    if RING:
        place = place % slots
    else:
        kept = kept & (place < slots)
    # Values need no tables.
    turns = there & (block < QUERY_BLOCKS + KEY_BLOCKS)
    cos_rows = cos + (batch * cos_batch + row * cos_row)
    sin_rows = sin + (batch * sin_batch + row * sin_row)
    cos_first, cos_second = load_table(cos_rows, turns, WIDTH, HALF, INTERLEAVED, HALVED, HEADS)
    sin_first, sin_second = load_table(sin_rows, turns, WIDTH, HALF, INTERLEAVED, HALVED, HEADS)
    if block < QUERY_BLOCKS:
        turn_part(
            query + (batch * query_batch + row * query_row), query_head,
            turned + (batch * turned_batch + row * turned_row), turned_head, query_weight, block * HEADS,
            there, kept, cos_first, cos_second, sin_first, sin_second, eps, offset, QUERIES, QUERIES, 0,
            QUERIES, True, True, True, False, NORMED, QUERY_WEIGHTED, INTERLEAVED, SIZE, WIDTH, HALF, REST,
            HEADS,
        )  # fmt: skip
    elif block < QUERY_BLOCKS + KEY_BLOCKS:
        turn_part(
            key + (batch * key_batch + row * key_row), key_head,
            key_store + (batch * key_store_batch + place * key_store_row), key_store_head, key_weight,
            (block - QUERY_BLOCKS) * HEADS, kept, kept, cos_first, cos_second, sin_first, sin_second, eps,
            offset, KEYS, KEYS, 0, KEYS, True, False, True, False, NORMED, KEY_WEIGHTED, INTERLEAVED, SIZE,
            WIDTH, HALF, REST, HEADS,
        )  # fmt: skip
    else:
        head = (block - QUERY_BLOCKS - KEY_BLOCKS) * HEADS + tl.arange(0, HEADS)[None, :, None]
        column = tl.arange(0, BLOCK_V)[None, None, :]
        inside = kept & (head < KEYS) & (column < VALUE_SIZE)
        source = value + (batch * value_batch + row * value_row) + (head * value_head + column)
        target = value_store + (batch * value_store_batch + place * value_store_row)
        target = target + head.to(tl.int64) * value_store_head + column
        held = tl.load(source, mask=inside, other=0.0)
        tl.store(target, held.to(value_store.dtype.element_ty), mask=inside)
