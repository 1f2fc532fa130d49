"""Triton source of the forward of ``graphopt_kernels.attention``. Imports triton: import it lazily.

Kernel arguments are not annotated: triton evaluates annotations, and would take ``Any`` for a
global variable of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.philox_triton import factors_of_tile

__all__ = ["base_two_scores", "bias_of_tile", "forward_kernel", "only_visible", "place_of", "reach", "tile"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

HIDDEN = tl.constexpr(-16384.0)
"""Score in base 2 of what a finite bias hides (``attention_reference.HIDDEN``)."""

ADDED = tl.constexpr(1)
"""The bias is added; 2: it is boolean, and hides where it is false."""


@triton.jit  # type: ignore[untyped-decorator]
def tile(  # type: ignore[no-untyped-def]
    base,
    start,
    stride,
    rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """``ROWS`` rows from ``start`` on of a matrix of ``WIDTH`` columns, zeros beyond both; ``EDGE``: there
    may be fewer."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    # The start may lie beyond what 32 bits can tell, the place within a tile does not.
    place = base + tl.full((), start, tl.int64) * stride + row * stride + column
    if EDGE:
        if BLOCK > WIDTH:
            return tl.load(place, mask=(start + row < rows) & (column < WIDTH), other=0.0)
        return tl.load(place, mask=start + row < rows, other=0.0)
    if BLOCK > WIDTH:
        return tl.load(place, mask=column < WIDTH, other=0.0)
    return tl.load(place)


@triton.jit
def place_of(item, heads, group):  # type: ignore[no-untyped-def]
    """Batch, head of queries and head of keys of an item, counted over batch and heads of queries."""
    batch = (item // heads).to(tl.int64)
    head = item % heads
    return batch, head.to(tl.int64), (head // group).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _tanh(x, APPROXIMATE: tl.constexpr):  # type: ignore[no-untyped-def]
    if APPROXIMATE:
        # One instruction, 11 bits: scores of bfloat16 have 8.
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    # Exact in the limits, and needs no device library.
    return 1.0 - 2.0 / (tl.exp2((2.0 * LOG2E) * x) + 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def bias_of_tile(  # type: ignore[no-untyped-def]
    bias, row, column, stride_row, stride_column, rows, columns, BY_ROW: tl.constexpr
):
    """The bias of queries ``row`` and keys ``column``, zero beyond both. Programs that are written out may
    have another function here, which computes it."""
    place = bias + column.to(tl.int64) * stride_column
    inside = column < columns
    if BY_ROW:
        place = place + row.to(tl.int64) * stride_row
        inside = inside & (row < rows)
    return tl.load(place, mask=inside, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def base_two_scores(  # type: ignore[no-untyped-def]
    products,
    row,
    column,
    bias,
    stride_row,
    stride_column,
    rows,
    columns,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BIAS: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """Scores times log2(e) from ``products`` of queries ``row`` and keys ``column``, two vectors that
    broadcast to the tile, and the slope of the cap. ``BY_ROW``: the bias depends on the query."""
    slope = products
    if CAPPED:
        bent = _tanh(products * (scale / softcap), APPROXIMATE)
        scores = bent * (softcap * LOG2E)
        slope = 1.0 - bent * bent
    else:
        scores = products * (scale * LOG2E)
    if BIAS:
        given = bias_of_tile(bias, row, column, stride_row, stride_column, rows, columns, BY_ROW)
        if BIAS == ADDED:
            low: tl.constexpr = -32752.0 if given.dtype == tl.float16 else -1e30
            added = given.to(tl.float32)
            # Nothing is left of a score beside a number so low, and base 2 has none for it.
            hidden = tl.where(added == -float("inf"), -float("inf"), HIDDEN)
            scores = tl.where(added <= low, hidden, scores + added * LOG2E)
        else:
            scores = tl.where(given != 0, scores, -float("inf"))
    return scores, slope


@triton.jit  # type: ignore[untyped-decorator]
def only_visible(scores, row, column, columns, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """``scores``, minus infinity where their place hides them or lies beyond the keys."""
    visible = column < columns
    if LEFT:
        visible = visible & (column >= row - left)
    if RIGHT:
        visible = visible & (column <= row + right)
    return tl.where(visible, scores, -float("inf"))


@triton.jit  # type: ignore[untyped-decorator]
def reach(  # type: ignore[no-untyped-def]
    begin, end, size, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, STEP: tl.constexpr
):
    """The blocks of ``STEP``, of ``size`` places in all, that what stands at ``begin`` to ``end`` sees, each
    from ``before`` its place to ``after`` it: those from the first number returned to the fourth. All of it
    sees all of the blocks from the second to the third."""
    first = 0
    whole = 0
    if BEFORE:
        first = tl.maximum(begin - before, 0) // STEP * STEP
        whole = tl.cdiv(tl.maximum(end - before, 0), STEP) * STEP
    last = size
    broken = size
    if AFTER:
        last = tl.maximum(tl.minimum(size, end + after + 1), 0)
        broken = tl.maximum(tl.minimum(size, begin + after + 1), 0)
    return first, whole, broken // STEP * STEP, last


@triton.jit  # type: ignore[untyped-decorator]
def _along_keys(  # type: ignore[no-untyped-def]
    total,
    most,
    result,
    q,
    first,
    last,
    row,
    key,
    value,
    bias,
    stride_key,
    stride_value,
    stride_row,
    stride_column,
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
    """Take the keys from ``first`` to ``last`` into the running softmax."""
    for start in range(first, last, COLUMNS):
        k = tile(key, start, stride_key, columns, COLUMNS, WIDTH, BLOCK_D, MASKED)
        column = start + tl.arange(0, COLUMNS)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, _ = base_two_scores(
            products, row[:, None], column[None, :], bias, stride_row, stride_column, rows, columns, scale,
            softcap, CAPPED, APPROXIMATE, BIAS, BY_ROW,
        )  # fmt: skip
        if MASKED:
            scores = only_visible(scores, row[:, None], column[None, :], columns, left, right, LEFT, RIGHT)
        highest = tl.maximum(most, tl.max(scores, axis=1))
        # Rows of which nothing was seen yet: what is minus infinity has to stay so.
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(most - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        if DROPS:
            weights *= factors_of_tile(number, item, begin, start, cut, kept, ROWS, COLUMNS, False)
        v = tile(value, start, stride_value, columns, COLUMNS, VALUE_WIDTH, BLOCK_V, MASKED)
        result = result * shrink[:, None]
        result = tl.dot(weights.to(v.dtype), v, result, input_precision=PRECISION)
        most = highest
    return total, most, result


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    bias,
    seed,
    output,
    log_sum_exp,
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
    output_batch,
    output_head,
    output_row,
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
    """``ROWS`` queries of a head for each program. Strides are named after tensor and dimension; the last of
    each is 1. Rows that see most go first."""
    blocks = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    block = program % blocks
    if RIGHT:
        block = blocks - 1 - block
    place = program // blocks
    batch, head, shared = place_of(place, heads, group)
    begin = block * ROWS
    end = tl.minimum(begin + ROWS, rows) - 1
    query += batch * query_batch + head * query_head
    key += batch * key_batch + shared * key_head
    value += batch * value_batch + shared * value_head
    bias += batch * bias_batch + head * bias_head
    output += batch * output_batch + head * output_head
    q = tile(query, begin, query_row, rows, ROWS, WIDTH, BLOCK_D, True)
    row = begin + tl.arange(0, ROWS)
    first, whole, broken, last = reach(begin, end, columns, left, right, LEFT, RIGHT, COLUMNS)
    number = 0
    if DROPS:
        number = tl.load(seed)
    total = tl.zeros([ROWS], tl.float32)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    result = tl.zeros([ROWS, BLOCK_V], tl.float32)
    if LEFT:
        total, most, result = _along_keys(
            total, most, result, q, first, tl.minimum(whole, last), row, key, value, bias, key_row, value_row,
            bias_row, bias_column, rows, columns, scale, softcap, left, right, number, place, begin, cut,
            kept, DROPS, CAPPED, APPROXIMATE, BIAS, BY_ROW, LEFT, RIGHT, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V,
            ROWS, COLUMNS, PRECISION, True,
        )  # fmt: skip
    total, most, result = _along_keys(
        total, most, result, q, whole, broken, row, key, value, bias, key_row, value_row,
        bias_row, bias_column, rows, columns, scale, softcap, left, right, number, place, begin, cut,
        kept, DROPS, CAPPED, APPROXIMATE, BIAS, BY_ROW, LEFT, RIGHT, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V,
        ROWS, COLUMNS, PRECISION, False,
    )  # fmt: skip
    total, most, result = _along_keys(
        total, most, result, q, tl.maximum(whole, broken), last, row, key, value, bias, key_row, value_row,
        bias_row, bias_column, rows, columns, scale, softcap, left, right, number, place, begin, cut,
        kept, DROPS, CAPPED, APPROXIMATE, BIAS, BY_ROW, LEFT, RIGHT, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V,
        ROWS, COLUMNS, PRECISION, True,
    )  # fmt: skip
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    sums = most * LN2 + tl.log(total)
    tl.store(log_sum_exp + place.to(tl.int64) * rows + row, sums, mask=row < rows)
    wide = tl.arange(0, BLOCK_V)[None, :]
    at = output + row[:, None].to(tl.int64) * output_row + wide
    tl.store(at, result.to(output.dtype.element_ty), mask=(row[:, None] < rows) & (wide < VALUE_WIDTH))
