"""Triton source of ``graphopt_kernels.row_norm``. Imports triton: import it lazily.

Kernel arguments are not annotated: triton evaluates annotations, and would take ``Any`` for a
global variable of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "columns_kernel", "forward_kernel", "normalized"]


@triton.jit  # type: ignore[untyped-decorator]
def _summands(  # type: ignore[no-untyped-def]
    group,
    data,
    added,
    rows,
    ADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the forward reads of a group of rows, as it is stored; zeros beyond the last row."""
    row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < WIDTH)
    place = row * WIDTH + at
    x = tl.load(data + place, mask=inside, other=0.0)
    beside = x
    if ADDED:
        beside = tl.load(added + place, mask=inside, other=0.0)
    return x, beside


@triton.jit
def _both(one, other, one_more, other_more):  # type: ignore[no-untyped-def]
    return one + one_more, other + other_more


@triton.jit  # type: ignore[untyped-decorator]
def normalized(  # type: ignore[no-untyped-def]
    x,
    inside,
    at,
    weight,
    bias,
    factor,
    shift,
    eps,
    offset,
    CENTERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    ROUNDED: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
):
    """Rows ``x``, as they are stored, over their norm, with mean and rstd: float32. ``OFFSET``: one is added
    to the weight. ``HELD``: weight and bias are in registers, as ``factor`` and ``shift``."""
    dtype = x.dtype
    x = x.to(tl.float32)
    mean = 0.0
    if CENTERED:
        mean = tl.sum(x, axis=1, keep_dims=True) / WIDTH
        x = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(x * x, axis=1, keep_dims=True) / WIDTH
    scale = 1.0 / tl.sqrt(variance + eps)
    y = x * scale
    if ROUNDED:
        y = y.to(dtype).to(tl.float32)
    if WEIGHTED:
        if not HELD:
            factor = tl.load(weight + at, mask=at < WIDTH, other=0.0)
        factor = factor.to(tl.float32) + offset if OFFSET else factor.to(tl.float32)
        y *= factor
    if BIASED:
        if not HELD:
            shift = tl.load(bias + at, mask=at < WIDTH, other=0.0)
        y += shift.to(tl.float32)
    return y, mean, scale


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    data,
    added,
    weight,
    bias,
    result,
    total,
    means,
    scales,
    rows,
    eps,
    offset,
    ADDED: tl.constexpr,
    CENTERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    ROUNDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    HELD: tl.constexpr,
):
    """Every so many groups of ``ROWS`` rows for each program; a row stays in registers between its statistics
    and their use.

    ``ADDED``: what is normalized is the sum of two tensors, which goes to ``total``. ``AHEAD``: the next rows
    are on their way while these are computed, for more registers. ``HELD``: weight and bias stay in them.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    at = tl.arange(0, BLOCK)[None, :]
    within = at < WIDTH
    factor = 0.0
    shift = 0.0
    if WEIGHTED and HELD:
        factor = tl.load(weight + at, mask=within, other=0.0)
    if BIASED and HELD:
        shift = tl.load(bias + at, mask=within, other=0.0)
    groups = tl.cdiv(rows, ROWS)
    if AHEAD:
        x_next, beside_next = _summands(program, data, added, rows, ADDED, WIDTH, BLOCK, ROWS)
    for group in range(program, groups, programs):
        if AHEAD:
            x, beside = x_next, beside_next
            x_next, beside_next = _summands(group + programs, data, added, rows, ADDED, WIDTH, BLOCK, ROWS)
        else:
            x, beside = _summands(group, data, added, rows, ADDED, WIDTH, BLOCK, ROWS)
        row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & within
        place = row * WIDTH + at
        if ADDED:
            # What is normalized is the sum as it is stored.
            x = (x.to(tl.float32) + beside.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + place, x, mask=inside)
        y, mean, scale = normalized(
            x, inside, at, weight, bias, factor, shift, eps, offset,
            CENTERED, WEIGHTED, BIASED, ROUNDED, True, WIDTH, HELD,
        )  # fmt: skip
        if CENTERED:
            tl.store(means + row, mean, mask=row < rows)
        tl.store(scales + row, scale, mask=row < rows)
        tl.store(result + place, y.to(result.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_of_group(  # type: ignore[no-untyped-def]
    group,
    grad,
    data,
    means,
    scales,
    passed,
    rows,
    PASSED: tl.constexpr,
    CENTERED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the backward reads of a group of rows, as it is stored; zeros beyond the last row."""
    row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < WIDTH)
    place = row * WIDTH + at
    dy = tl.load(grad + place, mask=inside, other=0.0)
    x = tl.load(data + place, mask=inside, other=0.0)
    scale = tl.load(scales + row, mask=row < rows, other=0.0)
    mean = scale
    if CENTERED:
        mean = tl.load(means + row, mask=row < rows, other=0.0)
    beside = dy
    if PASSED:
        beside = tl.load(passed + place, mask=inside, other=0.0)
    return dy, x, beside, mean, scale


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    data,
    weight,
    means,
    scales,
    passed,
    d_data,
    d_weights,
    d_biases,
    rows,
    offset,
    PASSED: tl.constexpr,
    CENTERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    D_DATA: tl.constexpr,
    D_WEIGHT: tl.constexpr,
    D_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    HELD: tl.constexpr,
):
    """Every so many rows for each program, which keeps its sums over rows in registers.

    A row of ``grad`` and ``data`` is read once: it gives the gradient of the row and its share of the
    weight's. ``PASSED``: the gradient that comes to ``data`` another way is added. ``AHEAD``: the next rows
    are on their way while these are computed, for more registers; of ``STAGES`` all but one are, through
    shared memory. ``HELD``: the weight stays in registers.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    at = tl.arange(0, BLOCK)[None, :]
    within = at < WIDTH
    if WEIGHTED and HELD:
        factor = tl.load(weight + at, mask=within, other=0.0)
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    groups = tl.cdiv(rows, ROWS)
    if AHEAD:
        dy_next, x_next, beside_next, mean_next, scale_next = _rows_of_group(
            program, grad, data, means, scales, passed, rows, PASSED, CENTERED, WIDTH, BLOCK, ROWS
        )
    for group in tl.range(program, groups, programs, num_stages=STAGES):
        if AHEAD:
            dy, x, beside, mean, scale = dy_next, x_next, beside_next, mean_next, scale_next
            dy_next, x_next, beside_next, mean_next, scale_next = _rows_of_group(
                group + programs,
                grad,
                data,
                means,
                scales,
                passed,
                rows,
                PASSED,
                CENTERED,
                WIDTH,
                BLOCK,
                ROWS,
            )
        else:
            dy, x, beside, mean, scale = _rows_of_group(
                group, grad, data, means, scales, passed, rows, PASSED, CENTERED, WIDTH, BLOCK, ROWS
            )
        row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & within
        place = row * WIDTH + at
        dy = dy.to(tl.float32)
        x = x.to(tl.float32)
        if CENTERED:
            # Beyond the row this is not zero, but what it is multiplied by is.
            x -= mean
        x *= scale
        if D_WEIGHT:
            d_weight += dy * x
        if D_BIAS:
            d_bias += dy
        if D_DATA:
            if WEIGHTED:
                if not HELD:
                    factor = tl.load(weight + at, mask=within, other=0.0, eviction_policy="evict_last")
                dy *= factor.to(tl.float32) + offset
            if CENTERED:
                # Both sums in one exchange between warps.
                along, level = tl.reduce((dy * x, dy), 1, _both, keep_dims=True)
                dx = dy - (along / WIDTH) * x - level / WIDTH
            else:
                dx = dy - (tl.sum(dy * x, axis=1, keep_dims=True) / WIDTH) * x
            dx *= scale
            if PASSED:
                dx += beside.to(tl.float32)
            tl.store(d_data + place, dx.to(d_data.dtype.element_ty), mask=inside)
    columns = tl.arange(0, BLOCK)
    if D_WEIGHT:
        tl.store(d_weights + program * WIDTH + columns, tl.sum(d_weight, axis=0), mask=columns < WIDTH)
    if D_BIAS:
        tl.store(d_biases + program * WIDTH + columns, tl.sum(d_bias, axis=0), mask=columns < WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def columns_kernel(  # type: ignore[no-untyped-def]
    d_weights,
    d_biases,
    d_weight,
    d_bias,
    programs,
    D_WEIGHT: tl.constexpr,
    D_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums over programs of ``COLUMNS`` columns, always in the same order."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    weights = tl.zeros([ROWS, COLUMNS], tl.float32)
    biases = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < programs) & (at < WIDTH)
        if D_WEIGHT:
            weights += tl.load(d_weights + row * WIDTH + at, mask=inside, other=0.0)
        if D_BIAS:
            biases += tl.load(d_biases + row * WIDTH + at, mask=inside, other=0.0)
    if D_WEIGHT:
        found = tl.sum(weights, axis=0, keep_dims=True)
        tl.store(d_weight + at, found.to(d_weight.dtype.element_ty), mask=at < WIDTH)
    if D_BIAS:
        found = tl.sum(biases, axis=0, keep_dims=True)
        tl.store(d_bias + at, found.to(d_bias.dtype.element_ty), mask=at < WIDTH)
