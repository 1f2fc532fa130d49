"""Triton source of ``graphopt_kernels.cross_entropy``. Imports triton: import it lazily.

Kernel arguments are not annotated: triton evaluates annotations, and would take ``Any`` for a
global variable of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.cross_entropy_rows_triton import exponential, gradient_of, transformed

__all__ = ["finish_kernel", "gradient_kernel", "joined_kernel", "parts_kernel", "total_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def _part(  # type: ignore[no-untyped-def]
    logits,
    tops,
    totals,
    plains,
    class_weights,
    row_stride,
    logit_scale,
    softcap,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STREAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take in this program's part of a row; see ``parts_kernel``."""
    program = tl.program_id(0).to(tl.int64)
    at = (program % PARTS).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = at < COLUMNS
    place = logits + program // PARTS * row_stride + at
    if STREAMS:
        z = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        z = tl.load(place, mask=inside, other=0.0)
    z = transformed(z, logit_scale, softcap, SOFTCAPPED) if SCALED or SOFTCAPPED else z.to(tl.float32)
    if SMOOTHED:
        plain = tl.where(inside, z, 0.0)
        if WEIGHTED:
            plain *= tl.load(class_weights + at, mask=inside, other=0.0)
        tl.store(plains + program, tl.sum(plain, axis=0))
    z = tl.where(inside, z, float("-inf"))
    # Finite, so that a part of nothing but -inf makes no NaN.
    top = tl.maximum(tl.max(z, axis=0), -3.0e38)
    tl.store(tops + program, top)
    tl.store(totals + program, tl.sum(exponential(z - top), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def parts_kernel(  # type: ignore[no-untyped-def]
    logits,
    tops,
    totals,
    plains,
    class_weights,
    row_stride,
    logit_scale,
    softcap,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STREAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``BLOCK`` columns of a row for each program, ``PARTS`` programs a row, held in registers: their maximum
    and the sum of exponentials below it; with ``SMOOTHED`` their plain sum as well, or with ``WEIGHTED`` that
    of products with their classes' weights. ``STREAMS``: logits are the first to leave caches."""
    _part(
        logits, tops, totals, plains, class_weights, row_stride, logit_scale, softcap,
        SCALED, SMOOTHED, SOFTCAPPED, WEIGHTED, STREAMS, COLUMNS, PARTS, BLOCK,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _finished(  # type: ignore[no-untyped-def]
    row,
    logits,
    target,
    tops,
    totals,
    plains,
    class_weights,
    weight_sum,
    log_sum_exps,
    rows,
    row_stride,
    ignore_index,
    smoothing,
    logit_scale,
    softcap,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Losses of some rows, and how much each counts; their log-sum-exps are written. What other programs
    wrote is read from where they all see it."""
    within = row < rows
    lane = tl.arange(0, LANES)
    place = row.to(tl.int64)[:, None] * PARTS + lane[None, :]
    inside = within[:, None] & (lane < PARTS)[None, :]
    label = tl.load(target + row, mask=within, other=0)
    named = (label >= 0) & (label < COLUMNS)
    start = logits + row.to(tl.int64) * row_stride
    picked = tl.load(start + label, mask=within & named, other=float("nan"))
    top = tl.load(tops + place, mask=inside, other=-3.0e38, cache_modifier=".cg")
    total = tl.load(totals + place, mask=inside, other=0.0, cache_modifier=".cg")
    picked = transformed(picked, logit_scale, softcap, SOFTCAPPED)
    peak = tl.max(top, axis=1)
    log_sum_exp = peak + tl.log(tl.sum(total * tl.exp(top - peak[:, None]), axis=1))
    counted = within & (label != ignore_index)
    if WEIGHTED:
        weight = tl.load(class_weights + label, mask=within & named, other=0.0)
        found = weight * (log_sum_exp - picked)
        if SMOOTHED:
            plain = tl.load(plains + place, mask=inside, other=0.0, cache_modifier=".cg")
            beside = tl.load(weight_sum) * log_sum_exp - tl.sum(plain, axis=1)
            found = (1.0 - smoothing) * found + smoothing / COLUMNS * beside
    else:
        found = log_sum_exp - (1.0 - smoothing) * picked
        if SMOOTHED:
            plain = tl.load(plains + place, mask=inside, other=0.0, cache_modifier=".cg")
            found -= smoothing / COLUMNS * tl.sum(plain, axis=1)
    found = tl.where(counted, found, 0.0)
    # A label that names no column spoils its row, instead of passing for a right one.
    log_sum_exp = tl.where(named | (label == ignore_index), log_sum_exp, float("nan"))
    tl.store(log_sum_exps + row, log_sum_exp, mask=within)
    weight = tl.where(counted, weight, 0.0) if WEIGHTED else counted.to(tl.float32)
    return found, weight


@triton.jit  # type: ignore[untyped-decorator]
def _mean(total, count, WEIGHTED: tl.constexpr):  # type: ignore[no-untyped-def]
    result = total / count
    if WEIGHTED:
        # Of classes that weigh nothing there is no mean, whatever the smoothing adds.
        result = tl.where(count == 0.0, float("nan"), result)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _summed(losses, counts, groups, MEAN: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The loss, from the sums of ``groups`` of rows, always added up in the same order."""
    found = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.float32)
    for first in range(0, groups, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found += tl.load(losses + at, mask=at < groups, other=0.0, cache_modifier=".cg")
        counted += tl.load(counts + at, mask=at < groups, other=0.0, cache_modifier=".cg")
    result = tl.sum(found, axis=0)
    if MEAN:
        result = _mean(result, tl.sum(counted, axis=0), WEIGHTED)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def finish_kernel(  # type: ignore[no-untyped-def]
    logits,
    target,
    tops,
    totals,
    plains,
    class_weights,
    weight_sum,
    losses,
    log_sum_exps,
    counts,
    loss,
    rows,
    row_stride,
    ignore_index,
    smoothing,
    logit_scale,
    softcap,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    REDUCED: tl.constexpr,
    MEAN: tl.constexpr,
    ALONE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Losses and log-sum-exps of ``ROWS`` rows for each program, of ``PARTS`` parts in ``LANES``.

    With ``REDUCED`` the rows' losses are summed up: the program's sum goes to ``losses``, and how many rows
    count to ``counts``; if it is ``ALONE``, that is the ``loss``. With ``WEIGHTED`` each row counts as often
    as its target's class weighs, and the smoothing's share of a class likewise.
    """
    group = tl.program_id(0)
    row = group * ROWS + tl.arange(0, ROWS)
    found, weight = _finished(
        row, logits, target, tops, totals, plains, class_weights, weight_sum, log_sum_exps, rows, row_stride,
        ignore_index, smoothing, logit_scale, softcap, SMOOTHED, SOFTCAPPED, WEIGHTED, COLUMNS, PARTS, LANES,
    )  # fmt: skip
    if REDUCED:
        result = tl.sum(found, axis=0)
        count = tl.sum(weight, axis=0)
        if ALONE:
            if MEAN:
                result = _mean(result, count, WEIGHTED)
            tl.store(loss, result.to(loss.dtype.element_ty))
        else:
            tl.store(losses + group, result)
            tl.store(counts + group, count)
    else:
        tl.store(losses + row, found.to(losses.dtype.element_ty), mask=row < rows)


@triton.jit  # type: ignore[untyped-decorator]
def total_kernel(  # type: ignore[no-untyped-def]
    losses, counts, loss, groups, MEAN: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """The loss, from the sums of ``groups`` of rows."""
    result = _summed(losses, counts, groups, MEAN, WEIGHTED, BLOCK)
    tl.store(loss, result.to(loss.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def joined_kernel(  # type: ignore[no-untyped-def]
    logits,
    target,
    tops,
    totals,
    plains,
    class_weights,
    weight_sum,
    losses,
    log_sum_exps,
    counts,
    loss,
    arrivals,
    rows,
    row_stride,
    ignore_index,
    smoothing,
    logit_scale,
    softcap,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STREAMS: tl.constexpr,
    REDUCED: tl.constexpr,
    MEAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """``parts_kernel``, ``finish_kernel`` and ``total_kernel`` in one launch: the last program of a row to
    arrive finishes the row, the last row to be finished the loss.

    ``arrivals`` [rows + 1] are 0 before. Who comes last differs from run to run; what it adds up, and in
    which order, does not.
    """
    _part(
        logits, tops, totals, plains, class_weights, row_stride, logit_scale, softcap,
        SCALED, SMOOTHED, SOFTCAPPED, WEIGHTED, STREAMS, COLUMNS, PARTS, BLOCK,
    )  # fmt: skip
    number = tl.program_id(0) // PARTS
    # What this program wrote is seen before its arrival is, and what others wrote after theirs was.
    tl.debug_barrier()
    if tl.atomic_add(arrivals + number, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
        tl.debug_barrier()
        row = number + tl.arange(0, 1)
        found, weight = _finished(
            row, logits, target, tops, totals, plains, class_weights, weight_sum, log_sum_exps, rows,
            row_stride, ignore_index, smoothing, logit_scale, softcap,
            SMOOTHED, SOFTCAPPED, WEIGHTED, COLUMNS, PARTS, LANES,
        )  # fmt: skip
        tl.store(losses + row, found.to(losses.dtype.element_ty))
        if REDUCED:
            tl.store(counts + row, weight)
            tl.debug_barrier()
            if tl.atomic_add(arrivals + rows, 1, sem="acq_rel", scope="gpu") == rows - 1:
                tl.debug_barrier()
                result = _summed(losses, counts, rows, MEAN, WEIGHTED, TOGETHER)
                tl.store(loss, result.to(loss.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    target,
    log_sum_exps,
    scales,
    sum_scales,
    class_weights,
    weight_sum,
    gradients,
    row_stride,
    scale_stride,
    sum_scale_stride,
    ignore_index,
    smoothing,
    logit_scale,
    softcap,
    SUMMED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STREAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of ``BLOCK`` columns of a row for each program, ``PARTS`` programs a row.

    ``WEIGHTED``: the smoothing is of classes that weigh differently. Without smoothing the weights are in
    ``scales``. ``STREAMS``: logits and gradients are the first to leave caches.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // PARTS
    first = (program % PARTS).to(tl.int32) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < COLUMNS
    label = tl.load(target + row)
    ignored = label == ignore_index
    scale = tl.load(scales + row * scale_stride) * logit_scale
    share = scale
    even = 0.0
    if SUMMED:
        scale = tl.where(ignored, 0.0, scale)
        beside = tl.load(sum_scales + row * sum_scale_stride) * logit_scale
        share = scale + beside
    if WEIGHTED:
        named = (label >= 0) & (label < COLUMNS)
        smooth = scale * (smoothing / COLUMNS)
        even = smooth * tl.load(class_weights + at, mask=inside, other=0.0)
        scale *= tl.load(class_weights + label, mask=named, other=0.0)
        share = scale * (1.0 - smoothing) + smooth * tl.load(weight_sum)
        if SUMMED:
            share += beside
    hot = label.to(tl.int32) - first
    log_sum_exp = tl.load(log_sum_exps + row)
    place = logits + row * row_stride + at
    if STREAMS:
        z = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        z = tl.load(place, mask=inside, other=0.0)
    z = transformed(z, logit_scale, softcap, SOFTCAPPED)
    gradient = gradient_of(
        z, log_sum_exp, tl.arange(0, BLOCK) == hot, scale, share, smoothing, COLUMNS, softcap,
        SUMMED, SMOOTHED, SOFTCAPPED, even, WEIGHTED,
    )  # fmt: skip
    if not SUMMED:
        # Whatever its logits are.
        gradient = tl.where(ignored, 0.0, gradient)
    gradient = gradient.to(gradients.dtype.element_ty)
    if STREAMS:
        tl.store(gradients + row * COLUMNS + at, gradient, mask=inside, cache_modifier=".cs")
    else:
        tl.store(gradients + row * COLUMNS + at, gradient, mask=inside)
