"""Triton source of the gradient of a bias in ``graphopt_kernels.attention``. Imports triton: import it
lazily.

The other kernels of the backward could write this gradient, but only for each batch and head apart: as
large as the scores. Here scores are computed once more instead, and summed over what shares the bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.attention_backward_triton import d_scores_of_tile
from graphopt_kernels.attention_triton import place_of, tile

__all__ = ["bias_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def bias_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    bias,
    seed,
    grad,
    shifts,
    along,
    d_bias,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    bias_batch,
    bias_head,
    bias_row,
    bias_column,
    grad_batch,
    grad_head,
    grad_row,
    batches,
    heads,
    group,
    rows,
    columns,
    scale,
    softcap,
    left,
    right,
    cut,
    kept,
    DROPS: tl.constexpr,
    OVER_BATCHES: tl.constexpr,
    OVER_HEADS: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a tile of the bias for each program, summed over what ``OVER_`` says that it is broadcast
    over, in the order of the tensors. ``d_bias`` is contiguous, the sizes that are broadcast over being 1."""
    row_blocks = tl.cdiv(rows, ROWS)
    column_blocks = tl.cdiv(columns, COLUMNS)
    # What tells programs apart, and what each goes through.
    own_rows = 1 if OVER_ROWS else row_blocks
    own_columns = 1 if OVER_COLUMNS else column_blocks
    own_heads = 1 if OVER_HEADS else heads
    through_rows = row_blocks if OVER_ROWS else 1
    through_columns = column_blocks if OVER_COLUMNS else 1
    through_heads = heads if OVER_HEADS else 1
    through_batches = batches if OVER_BATCHES else 1
    program = tl.program_id(0)
    own_column = program % own_columns
    own_row = program // own_columns % own_rows
    own_head = program // own_columns // own_rows % own_heads
    own_batch = program // own_columns // own_rows // own_heads
    number = 0
    if DROPS:
        number = tl.load(seed)
    sums_of_tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(through_batches * through_heads * through_rows * through_columns):
        column_block = own_column + step % through_columns
        row_block = own_row + step // through_columns % through_rows
        head = own_head + step // through_columns // through_rows % through_heads
        batch = own_batch + step // through_columns // through_rows // through_heads
        begin = row_block * ROWS
        start = column_block * COLUMNS
        seen = True
        if LEFT:
            seen = seen & (start + COLUMNS - 1 >= begin - left)
        if RIGHT:
            seen = seen & (start <= begin + ROWS - 1 + right)
        if seen:
            item = batch * heads + head
            far, at, shared = place_of(item, heads, group)
            q_at = query + far * query_batch + at * query_head
            q = tile(q_at, begin, query_row, rows, ROWS, WIDTH, BLOCK_D, True)
            dy = tile(
                grad + far * grad_batch + at * grad_head,
                begin, grad_row, rows, ROWS, VALUE_WIDTH, BLOCK_V, True,
            )  # fmt: skip
            row = begin + tl.arange(0, ROWS)
            of_rows = item.to(tl.int64) * rows + row
            shift = tl.load(shifts + of_rows, mask=row < rows, other=float("inf"))
            sums = tl.load(along + of_rows, mask=row < rows, other=0.0)
            d_scores, _, _ = d_scores_of_tile(
                q, dy, shift, sums, start, row, key + far * key_batch + shared * key_head,
                value + far * value_batch + shared * value_head,
                bias + far * bias_batch + at * bias_head, key_row, value_row, bias_row, bias_column,
                rows, columns, scale, softcap, left, right, number, item, begin, cut, kept, DROPS, CAPPED,
                APPROXIMATE, 1, True, LEFT, RIGHT, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V, ROWS, COLUMNS,
                PRECISION, True,
            )  # fmt: skip
            sums_of_tile += d_scores
    row = own_row * ROWS + tl.arange(0, ROWS)[:, None]
    column = own_column * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    height = rows
    width = columns
    if OVER_ROWS:
        sums_of_tile = tl.sum(sums_of_tile, axis=0, keep_dims=True)
        row = tl.zeros([1, 1], tl.int32)
        height = 1
    if OVER_COLUMNS:
        sums_of_tile = tl.sum(sums_of_tile, axis=1, keep_dims=True)
        column = tl.zeros([1, 1], tl.int32)
        width = 1
    base = (own_batch * own_heads + own_head).to(tl.int64) * height * width
    place = d_bias + base + row.to(tl.int64) * width + column
    tl.store(place, sums_of_tile.to(d_bias.dtype.element_ty), mask=(row < height) & (column < width))
