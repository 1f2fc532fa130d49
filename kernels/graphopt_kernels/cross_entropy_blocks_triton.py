"""Triton source of ``graphopt_kernels.cross_entropy_blocks``. Imports triton: import it lazily."""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.cross_entropy_rows_triton import transformed

__all__ = ["fold_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def fold_kernel(  # type: ignore[no-untyped-def]
    logits,
    target,
    losses,
    log_sum_exps,
    totals,
    row_stride,
    first,
    classes,
    ignore_index,
    smoothing,
    logit_scale,
    softcap,
    BEGINS: tl.constexpr,
    ENDS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The columns from class ``first`` on of one row of logits for each program.

    Between blocks ``log_sum_exps`` holds the maximum so far, ``totals`` the sum of exponentials beside it
    and ``losses`` what the label and the smoothing add. The block that ``ENDS`` turns them into results.
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    label = tl.load(target + row)
    ignored = label == ignore_index
    if BEGINS:
        # The maximum starts finite: a block of nothing but -inf makes no NaN.
        top = -3.0e38
        total = 0.0
        value = 0.0
    else:
        top = tl.load(log_sum_exps + row)
        total = tl.load(totals + row)
        value = tl.load(losses + row)
    for block in range((COLUMNS + BLOCK - 1) // BLOCK):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < COLUMNS
        z = tl.load(start + at, mask=inside, other=0.0)
        z = transformed(z, logit_scale, softcap, SOFTCAPPED)
        if SMOOTHED:
            value -= smoothing / classes * tl.sum(tl.where(inside, z, 0.0), axis=0)
        z = tl.where(inside, z, float("-inf"))
        peak = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - peak) + tl.sum(tl.exp(z - peak), axis=0)
        top = peak
    column = label - first
    picked = tl.load(start + column, mask=(column >= 0) & (column < COLUMNS), other=0.0)
    picked = transformed(picked, logit_scale, softcap, SOFTCAPPED)
    # Where the label is elsewhere nothing is read, and the logit 0 adds nothing.
    value -= (1.0 - smoothing) * picked
    if ENDS:
        log_sum_exp = top + tl.log(total)
        # A label that names no class spoils its row, instead of passing for a right one.
        named = (label >= 0) & (label < classes)
        tl.store(losses + row, tl.where(ignored, 0.0, tl.where(named, log_sum_exp + value, float("nan"))))
        tl.store(log_sum_exps + row, tl.where(named | ignored, log_sum_exp, float("nan")))
    else:
        tl.store(log_sum_exps + row, top)
        tl.store(totals + row, total)
        tl.store(losses + row, value)
