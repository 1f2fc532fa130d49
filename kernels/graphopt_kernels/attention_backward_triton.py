"""Triton source of the backward of ``graphopt_kernels.attention``. Imports triton: import it lazily.

Strides are named after tensor and dimension; the last of each is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.attention_triton import base_two_scores, only_visible, place_of, reach, tile
from graphopt_kernels.philox_triton import factors_of_tile

__all__ = ["d_scores_of_tile", "keys_kernel", "queries_kernel", "rows_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def rows_kernel(  # type: ignore[no-untyped-def]
    grad,
    output,
    log_sum_exp,
    shifts,
    along,
    grad_batch,
    grad_head,
    grad_row,
    output_batch,
    output_head,
    output_row,
    heads,
    rows,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the backward needs of each row: the sum of ``grad * output``, and the log-sum-exp in base 2 with
    infinity where the row is hidden whole, which makes its weights zero."""
    blocks = tl.cdiv(rows, ROWS)
    item = tl.program_id(0) // blocks
    begin = tl.program_id(0) % blocks * ROWS
    batch, head, _ = place_of(item, heads, 1)
    dy = tile(
        grad + batch * grad_batch + head * grad_head, begin, grad_row, rows, ROWS, VALUE_WIDTH, BLOCK_V, True
    )
    y = tile(
        output + batch * output_batch + head * output_head,
        begin, output_row, rows, ROWS, VALUE_WIDTH, BLOCK_V, True,
    )  # fmt: skip
    row = begin + tl.arange(0, ROWS)
    place = item.to(tl.int64) * rows + row
    tl.store(along + place, tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1), mask=row < rows)
    sums = tl.load(log_sum_exp + place, mask=row < rows, other=0.0)
    tl.store(shifts + place, tl.where(sums == -float("inf"), float("inf"), sums * LOG2E), mask=row < rows)


@triton.jit  # type: ignore[untyped-decorator]
def keys_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    bias,
    seed,
    grad,
    shifts,
    along,
    d_key,
    d_value,
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
    d_key_batch,
    d_key_head,
    d_key_row,
    d_value_batch,
    d_value_head,
    d_value_row,
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
    CAPPED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BIAS: tl.constexpr,
    BY_ROW: tl.constexpr,
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
    """Gradients of ``COLUMNS`` keys and values of a head for each program, summed over the heads of queries
    that share them."""
    blocks = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    begin = program % blocks * COLUMNS
    end = tl.minimum(begin + COLUMNS, columns) - 1
    batch, shared, _ = place_of(program // blocks, heads // group, 1)
    k = tile(
        key + batch * key_batch + shared * key_head, begin, key_row, columns, COLUMNS, WIDTH, BLOCK_D, True
    )
    v = tile(
        value + batch * value_batch + shared * value_head,
        begin, value_row, columns, COLUMNS, VALUE_WIDTH, BLOCK_V, True,
    )  # fmt: skip
    column = begin + tl.arange(0, COLUMNS)
    # A key is seen from ``right`` before its place to ``left`` after it.
    first, whole, broken, last = reach(begin, end, rows, right, left, RIGHT, LEFT, ROWS)
    number = 0
    if DROPS:
        number = tl.load(seed)
    d_k = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    d_v = tl.zeros([COLUMNS, BLOCK_V], tl.float32)
    # One loop over heads and blocks: several, with masks or without, would not fit the registers.
    steps = tl.maximum(tl.cdiv(last - first, ROWS), 0)
    for step in range(steps * group):
        head = shared * group + step // steps
        start = first + step % steps * ROWS
        row = start + tl.arange(0, ROWS)
        item = batch * heads + head
        of_rows = item * rows + row
        q_at = query + batch * query_batch + head * query_head
        q = tile(q_at, start, query_row, rows, ROWS, WIDTH, BLOCK_D, True)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        # Scores stand transposed here, keys by queries.
        scores, slope = base_two_scores(
            products, row[None, :], column[:, None], bias + batch * bias_batch + head * bias_head,
            bias_row, bias_column, rows, columns, scale, softcap, CAPPED, APPROXIMATE, BIAS, BY_ROW,
        )  # fmt: skip
        if LEFT or RIGHT:  # noqa: SIM102 (known when it is compiled)
            if (start < whole) | (start >= broken):
                scores = only_visible(
                    scores, row[None, :], column[:, None], columns, left, right, LEFT, RIGHT
                )
        # Beyond the last row weights are zero.
        shift = tl.load(shifts + of_rows, mask=row < rows, other=float("inf"))
        weights = tl.exp2(scores - shift[None, :])
        dy_at = grad + batch * grad_batch + head * grad_head
        dy = tile(dy_at, start, grad_row, rows, ROWS, VALUE_WIDTH, BLOCK_V, True)
        if DROPS:
            factors = factors_of_tile(number, item, start, begin, cut, kept, ROWS, COLUMNS, True)
            d_v = tl.dot((weights * factors).to(dy.dtype), dy, d_v, input_precision=PRECISION)
            d_weights = tl.dot(v, tl.trans(dy), input_precision=PRECISION) * factors
        else:
            d_v = tl.dot(weights.to(dy.dtype), dy, d_v, input_precision=PRECISION)
            d_weights = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        sums = tl.load(along + of_rows, mask=row < rows, other=0.0)
        d_scores = weights * (d_weights - sums[None, :])
        if CAPPED:
            d_scores = d_scores * slope
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION)
    here = column[:, None].to(tl.int64)
    inside = column[:, None] < columns
    wide = tl.arange(0, BLOCK_D)[None, :]
    at = d_key + batch * d_key_batch + shared * d_key_head + here * d_key_row + wide
    tl.store(at, (d_k * scale).to(d_key.dtype.element_ty), mask=inside & (wide < WIDTH))
    wide = tl.arange(0, BLOCK_V)[None, :]
    at = d_value + batch * d_value_batch + shared * d_value_head + here * d_value_row + wide
    tl.store(at, d_v.to(d_value.dtype.element_ty), mask=inside & (wide < VALUE_WIDTH))


@triton.jit  # type: ignore[untyped-decorator]
def d_scores_of_tile(  # type: ignore[no-untyped-def]
    q,
    dy,
    shift,
    sums,
    start,
    row,
    key,
    value,
    bias,
    key_row,
    value_row,
    bias_row,
    bias_column,
    rows,
    columns,
    scale,
    softcap,
    left,
    right,
    number,
    item,
    begin,
    cut,
    kept,
    DROPS: tl.constexpr,
    CAPPED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BIAS: tl.constexpr,
    BY_ROW: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Gradients of the scores before softmax of a tile, with the keys and the slope of the cap."""
    k = tile(key, start, key_row, columns, COLUMNS, WIDTH, BLOCK_D, MASKED)
    column = start + tl.arange(0, COLUMNS)
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores, slope = base_two_scores(
        products, row[:, None], column[None, :], bias, bias_row, bias_column, rows, columns, scale,
        softcap, CAPPED, APPROXIMATE, BIAS, BY_ROW,
    )  # fmt: skip
    if MASKED:
        scores = only_visible(scores, row[:, None], column[None, :], columns, left, right, LEFT, RIGHT)
    weights = tl.exp2(scores - shift[:, None])
    v = tile(value, start, value_row, columns, COLUMNS, VALUE_WIDTH, BLOCK_V, MASKED)
    d_weights = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
    if DROPS:
        d_weights *= factors_of_tile(number, item, begin, start, cut, kept, ROWS, COLUMNS, False)
    return weights * (d_weights - sums[:, None]), k, slope


@triton.jit  # type: ignore[untyped-decorator]
def _along_keys(  # type: ignore[no-untyped-def]
    d_q,
    q,
    dy,
    shift,
    sums,
    first,
    last,
    row,
    key,
    value,
    bias,
    key_row,
    value_row,
    bias_row,
    bias_column,
    rows,
    columns,
    scale,
    softcap,
    left,
    right,
    number,
    item,
    begin,
    cut,
    kept,
    DROPS: tl.constexpr,
    CAPPED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BIAS: tl.constexpr,
    BY_ROW: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the keys from ``first`` to ``last`` give to the gradient of queries."""
    for start in range(first, last, COLUMNS):
        d_scores, k, slope = d_scores_of_tile(
            q, dy, shift, sums, start, row, key, value, bias, key_row, value_row, bias_row, bias_column,
            rows, columns, scale, softcap, left, right, number, item, begin, cut, kept, DROPS, CAPPED,
            APPROXIMATE, BIAS, BY_ROW, LEFT, RIGHT, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V, ROWS, COLUMNS,
            PRECISION, MASKED,
        )  # fmt: skip
        if CAPPED:
            d_scores = d_scores * slope
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)
    return d_q


@triton.jit  # type: ignore[untyped-decorator]
def queries_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    bias,
    seed,
    grad,
    shifts,
    along,
    d_query,
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
    d_query_batch,
    d_query_head,
    d_query_row,
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
    CAPPED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BIAS: tl.constexpr,
    BY_ROW: tl.constexpr,
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
    """Gradient of ``ROWS`` queries of a head for each program."""
    blocks = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    block = program % blocks
    if RIGHT:
        block = blocks - 1 - block
    item = program // blocks
    batch, head, shared = place_of(item, heads, group)
    begin = block * ROWS
    end = tl.minimum(begin + ROWS, rows) - 1
    key += batch * key_batch + shared * key_head
    value += batch * value_batch + shared * value_head
    bias += batch * bias_batch + head * bias_head
    q = tile(
        query + batch * query_batch + head * query_head, begin, query_row, rows, ROWS, WIDTH, BLOCK_D, True
    )
    dy = tile(
        grad + batch * grad_batch + head * grad_head, begin, grad_row, rows, ROWS, VALUE_WIDTH, BLOCK_V, True
    )
    row = begin + tl.arange(0, ROWS)
    of_rows = item.to(tl.int64) * rows + row
    shift = tl.load(shifts + of_rows, mask=row < rows, other=float("inf"))
    sums = tl.load(along + of_rows, mask=row < rows, other=0.0)
    first, whole, broken, last = reach(begin, end, columns, left, right, LEFT, RIGHT, COLUMNS)
    number = 0
    if DROPS:
        number = tl.load(seed)
    d_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if LEFT:
        d_q = _along_keys(
            d_q, q, dy, shift, sums, first, tl.minimum(whole, last), row, key, value, bias, key_row,
            value_row, bias_row, bias_column, rows, columns, scale, softcap, left, right, number,
            item, begin, cut, kept, DROPS, CAPPED, APPROXIMATE, BIAS, BY_ROW, LEFT, RIGHT, WIDTH,
            VALUE_WIDTH, BLOCK_D, BLOCK_V, ROWS, COLUMNS, PRECISION, True,
        )  # fmt: skip
    d_q = _along_keys(
        d_q, q, dy, shift, sums, whole, broken, row, key, value, bias, key_row,
        value_row, bias_row, bias_column, rows, columns, scale, softcap, left, right, number,
        item, begin, cut, kept, DROPS, CAPPED, APPROXIMATE, BIAS, BY_ROW, LEFT, RIGHT, WIDTH,
        VALUE_WIDTH, BLOCK_D, BLOCK_V, ROWS, COLUMNS, PRECISION, False,
    )  # fmt: skip
    d_q = _along_keys(
        d_q, q, dy, shift, sums, tl.maximum(whole, broken), last, row, key, value, bias, key_row,
        value_row, bias_row, bias_column, rows, columns, scale, softcap, left, right, number,
        item, begin, cut, kept, DROPS, CAPPED, APPROXIMATE, BIAS, BY_ROW, LEFT, RIGHT, WIDTH,
        VALUE_WIDTH, BLOCK_D, BLOCK_V, ROWS, COLUMNS, PRECISION, True,
    )  # fmt: skip
    wide = tl.arange(0, BLOCK_D)[None, :]
    here = row[:, None].to(tl.int64)
    at = d_query + batch * d_query_batch + head * d_query_head + here * d_query_row + wide
    tl.store(at, (d_q * scale).to(d_query.dtype.element_ty), mask=(row[:, None] < rows) & (wide < WIDTH))
