"""Triton source of the backward of normed heads in ``graphopt_kernels.rotary``. Imports triton: import it
lazily. Tiles are those of ``rotary_triton``."""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.rotary_triton import (
    factors,
    heads_of,
    load_pairs,
    load_rest,
    load_table,
    norm_scale,
    store_pairs,
    store_rest,
    tile_of,
    turn,
    turn_part,
)

__all__ = ["norm_backward_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def _norm_part_back(  # type: ignore[no-untyped-def]
    data,
    data_batch,
    data_position,
    data_head,
    grad,
    grad_batch,
    grad_position,
    grad_head,
    d_data,
    weight,
    sums,
    cos,
    sin,
    cos_batch,
    cos_position,
    sin_batch,
    sin_position,
    start,
    positions,
    length,
    eps,
    offset,
    TOTAL: tl.constexpr,
    EACH: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    ALL: tl.constexpr,
    GIVEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUMMED: tl.constexpr,
    D_DATA: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALVED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Every so many tiles of some heads of one part; sums for its weight stay in registers."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    head, index, known = heads_of(start, TOTAL, EACH, FIRST, STEP, HEADS)
    factor_first, factor_second, factor_rest = factors(
        weight, offset, WEIGHTED, INTERLEAVED, SIZE, WIDTH, HALF, REST
    )
    sum_first = tl.zeros([POSITIONS, HEADS, HALF], tl.float32)
    sum_second = tl.zeros([POSITIONS, HEADS, HALF], tl.float32)
    sum_rest = tl.zeros([POSITIONS, HEADS, REST], tl.float32)
    for group in range(program, tl.cdiv(positions, POSITIONS), programs):
        batch, at, present = tile_of(group, positions, length, POSITIONS)
        inside = present & known
        there = inside
        if not GIVEN:
            there = inside & (head < 0)
        grads = grad + (batch * grad_batch + at * grad_position) + head * grad_head
        rows = data + (batch * data_batch + at * data_position) + index * data_head
        dy_first, dy_second = load_pairs(grads, there, WIDTH, HALF, INTERLEAVED)
        x_first, x_second = load_pairs(rows, inside, WIDTH, HALF, INTERLEAVED)
        cos_rows = cos + (batch * cos_batch + at * cos_position)
        sin_rows = sin + (batch * sin_batch + at * sin_position)
        cos_first, cos_second = load_table(cos_rows, present, WIDTH, HALF, INTERLEAVED, HALVED, HEADS)
        sin_first, sin_second = load_table(sin_rows, present, WIDTH, HALF, INTERLEAVED, HALVED, HEADS)
        if SIZE > WIDTH:
            dy_rest = load_rest(grads, there, WIDTH, SIZE, REST).to(tl.float32)
            x_rest = load_rest(rows, inside, WIDTH, SIZE, REST).to(tl.float32)
        else:
            dy_rest, x_rest = dy_first, x_first
        scale = norm_scale(x_first, x_second, x_rest, eps, SIZE, WIDTH)
        x_first *= scale
        x_second *= scale
        dy_first, dy_second = turn(dy_first, dy_second, cos_first, cos_second, sin_first, sin_second, True)
        if SUMMED:
            sum_first += dy_first * x_first
            sum_second += dy_second * x_second
        dy_first *= factor_first
        dy_second *= factor_second
        along = tl.sum(dy_first * x_first + dy_second * x_second, axis=2, keep_dims=True)
        if SIZE > WIDTH:
            x_rest *= scale
            if SUMMED:
                sum_rest += dy_rest * x_rest
            dy_rest *= factor_rest
            along += tl.sum(dy_rest * x_rest, axis=2, keep_dims=True)
        if D_DATA:
            along = along / SIZE
            target = d_data + ((batch * length + at) * (ALL * SIZE) + index * SIZE)
            dx_first = scale * (dy_first - x_first * along)
            dx_second = scale * (dy_second - x_second * along)
            store_pairs(target, inside, dx_first, dx_second, WIDTH, HALF, INTERLEAVED)
            if SIZE > WIDTH:
                store_rest(target, inside, scale * (dy_rest - x_rest * along), WIDTH, SIZE, REST)
    if SUMMED:
        # A row for each program that has heads of this part, in the order of blocks.
        row = sums + ((start // HEADS) * programs + program) * SIZE + tl.zeros([1, 1, 1], tl.int32)
        always = tl.full([1, 1, 1], 1, tl.int1)
        total_first = tl.sum(tl.sum(sum_first, axis=1, keep_dims=True), axis=0, keep_dims=True)
        total_second = tl.sum(tl.sum(sum_second, axis=1, keep_dims=True), axis=0, keep_dims=True)
        store_pairs(row, always, total_first, total_second, WIDTH, HALF, INTERLEAVED)
        if SIZE > WIDTH:
            total_rest = tl.sum(tl.sum(sum_rest, axis=1, keep_dims=True), axis=0, keep_dims=True)
            store_rest(row, always, total_rest, WIDTH, SIZE, REST)


@triton.jit  # type: ignore[untyped-decorator]
def norm_backward_kernel(  # type: ignore[no-untyped-def]
    data,
    query,
    key,
    value,
    d_data,
    cos,
    sin,
    query_weight,
    key_weight,
    query_sums,
    key_sums,
    data_batch,
    data_position,
    data_head,
    query_batch,
    query_position,
    query_head,
    key_batch,
    key_position,
    key_head,
    value_batch,
    value_position,
    value_head,
    cos_batch,
    cos_position,
    sin_batch,
    sin_position,
    positions,
    length,
    eps,
    offset,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    QUERY_GIVEN: tl.constexpr,
    KEY_GIVEN: tl.constexpr,
    VALUE_GIVEN: tl.constexpr,
    QUERY_WEIGHTED: tl.constexpr,
    KEY_WEIGHTED: tl.constexpr,
    QUERY_SUMMED: tl.constexpr,
    KEY_SUMMED: tl.constexpr,
    D_DATA: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALVED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of normed and turned parts, for ``data`` and the weights, in one reading of both.

    The second dimension of the grid is blocks of ``HEADS`` heads: of queries, then of keys, then of values
    (with ``D_DATA``); the first, programs that share their positions. ``d_data`` is dense.
    """
    STEP: tl.constexpr = QUERIES + KEYS + VALUES
    QUERY_BLOCKS: tl.constexpr = (GROUPS * QUERIES + HEADS - 1) // HEADS
    KEY_BLOCKS: tl.constexpr = (GROUPS * KEYS + HEADS - 1) // HEADS
    block = tl.program_id(1)
    if block < QUERY_BLOCKS:
        if QUERIES > 0:
            _norm_part_back(
                data, data_batch, data_position, data_head, query, query_batch, query_position, query_head,
                d_data, query_weight, query_sums, cos, sin, cos_batch, cos_position, sin_batch, sin_position,
                block * HEADS, positions, length, eps, offset,
                GROUPS * QUERIES, QUERIES, 0, STEP, GROUPS * STEP, QUERY_GIVEN, QUERY_WEIGHTED, QUERY_SUMMED,
                D_DATA, INTERLEAVED, HALVED, SIZE, WIDTH, HALF, REST, POSITIONS, HEADS,
            )  # fmt: skip
    elif block < QUERY_BLOCKS + KEY_BLOCKS:
        if KEYS > 0:
            _norm_part_back(
                data, data_batch, data_position, data_head, key, key_batch, key_position, key_head,
                d_data, key_weight, key_sums, cos, sin, cos_batch, cos_position, sin_batch, sin_position,
                (block - QUERY_BLOCKS) * HEADS, positions, length, eps, offset,
                GROUPS * KEYS, KEYS, QUERIES, STEP, GROUPS * STEP, KEY_GIVEN, KEY_WEIGHTED, KEY_SUMMED,
                D_DATA, INTERLEAVED, HALVED, SIZE, WIDTH, HALF, REST, POSITIONS, HEADS,
            )  # fmt: skip
    else:
        if VALUES > 0:
            for group in range(tl.program_id(0), tl.cdiv(positions, POSITIONS), tl.num_programs(0)):
                batch, at, present = tile_of(group, positions, length, POSITIONS)
                turn_part(
                    d_data + (batch * length + at) * (GROUPS * STEP * SIZE), SIZE,
                    value + (batch * value_batch + at * value_position), value_head,
                    query_weight, (block - QUERY_BLOCKS - KEY_BLOCKS) * HEADS, present, present,
                    0.0, 0.0, 0.0, 0.0, eps, offset, GROUPS * VALUES, VALUES, QUERIES + KEYS, STEP, False,
                    False, VALUE_GIVEN, True, False, False, INTERLEAVED, SIZE, WIDTH, HALF, REST, HEADS,
                )  # fmt: skip
