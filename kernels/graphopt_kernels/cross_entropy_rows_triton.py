"""Triton source of ``graphopt_kernels.cross_entropy_rows``. Imports triton: import it lazily.

Kernel arguments are not annotated: triton evaluates annotations, and would take ``Any`` for a
global variable of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["exponential", "gradient_of", "rows_kernel", "transformed"]


@triton.jit
def exponential(x):  # type: ignore[no-untyped-def]
    """One instruction beside the product, where that of ``tl.exp`` has three more for results below 1e-38."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def transformed(z, logit_scale, softcap, SOFTCAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    z = z.to(tl.float32) * logit_scale
    if SOFTCAPPED:
        # tanh(u) = 1 - 2 / (exp(2 u) + 1): exact in the limits, and needs no device library.
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    return z


@triton.jit  # type: ignore[untyped-decorator]
def gradient_of(  # type: ignore[no-untyped-def]
    z,
    log_sum_exp,
    is_label,
    scale,
    share,
    smoothing,
    classes,
    softcap,
    SUMMED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    even=0.0,
    WEIGHTED: tl.constexpr = False,
):
    """The gradient of logits that became ``z``, for that of their row's loss, ``scale``, and with ``SUMMED``
    that of the log-sum-exp as well: ``share`` is the sum of both. With ``WEIGHTED`` the smoothing takes
    ``even`` from each logit; ``share`` is then the sum of all that is taken."""
    if WEIGHTED:
        gradient = tl.exp(z - log_sum_exp) * share - tl.where(is_label, scale * (1.0 - smoothing), 0.0) - even
    elif SUMMED:
        gradient = tl.exp(z - log_sum_exp) * share - tl.where(is_label, scale * (1.0 - smoothing), 0.0)
        if SMOOTHED:
            gradient -= scale * (smoothing / classes)
    else:
        gradient = tl.exp(z - log_sum_exp) - tl.where(is_label, 1.0 - smoothing, 0.0)
        if SMOOTHED:
            gradient -= smoothing / classes
        gradient *= scale
    if SOFTCAPPED:
        gradient *= 1.0 - (z / softcap) * (z / softcap)
    return gradient


@triton.jit  # type: ignore[untyped-decorator]
def rows_kernel(  # type: ignore[no-untyped-def]
    logits,
    target,
    losses,
    log_sum_exps,
    scales,
    sum_scales,
    row_stride,
    scale_stride,
    sum_scale_stride,
    first,
    classes,
    ignore_index,
    smoothing,
    logit_scale,
    softcap,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SUMMED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of logits for each program.

    ``STATISTICS``: write the row's loss and log-sum-exp, else read the latter. ``GRADIENT``: write
    the gradient over the logits; ``SUMMED``: that of the log-sum-exp as well. The second loop runs
    backwards, since what the first has read last is what the cache still holds. ``first`` is the class of
    the first column, of ``classes`` in all; with ``STATISTICS`` the columns are all classes.
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    label = tl.load(target + row)
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    ignored = label == ignore_index
    # Whoever asks for the log-sum-exp alone gets that of every row.
    if ignored & (GRADIENT and not SUMMED):
        if STATISTICS:
            tl.store(losses + row, 0.0)
            tl.store(log_sum_exps + row, 0.0)
        for block in range(blocks):
            at = block * BLOCK + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
            tl.store(start + at, zeros, mask=at < COLUMNS)
    else:
        if STATISTICS:
            # Each lane keeps its own maximum and sum: one exponential an element. The maximum starts
            # finite, so that lanes which see nothing but -inf make no NaN.
            top = tl.full([BLOCK], -3.0e38, tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
            plain = tl.zeros([BLOCK], tl.float32)
            for block in range(blocks):
                at = block * BLOCK + tl.arange(0, BLOCK)
                inside = at < COLUMNS
                z = tl.load(start + at, mask=inside, other=0.0, eviction_policy="evict_last")
                z = transformed(z, logit_scale, softcap, SOFTCAPPED)
                if SMOOTHED:
                    plain += tl.where(inside, z, 0.0)
                z = tl.where(inside, z, float("-inf"))
                gap = z - top
                share = tl.exp(-tl.abs(gap))
                total = tl.where(gap > 0, total * share + 1.0, total + share)
                top = tl.maximum(top, z)
            named = (label >= 0) & (label < COLUMNS)
            picked = tl.load(start + label, mask=named, other=float("nan"))
            picked = transformed(picked, logit_scale, softcap, SOFTCAPPED)
            peak = tl.max(top, axis=0)
            log_sum_exp = peak + tl.log(tl.sum(total * tl.exp(top - peak), axis=0))
            loss = log_sum_exp - (1.0 - smoothing) * picked
            if SMOOTHED:
                loss -= smoothing / classes * tl.sum(plain, axis=0)
            tl.store(losses + row, tl.where(ignored, 0.0, loss))
            # A label that names no column spoils its row, instead of passing for a right one.
            log_sum_exp = tl.where(named | ignored, log_sum_exp, float("nan"))
            tl.store(log_sum_exps + row, log_sum_exp)
        else:
            log_sum_exp = tl.load(log_sum_exps + row)
        if GRADIENT:
            # Every thread has read the target's logit before any writes over it.
            tl.debug_barrier()
            scale = tl.load(scales + row * scale_stride) * logit_scale
            share = scale
            if SUMMED:
                scale = tl.where(ignored, 0.0, scale)
                share = scale + tl.load(sum_scales + row * sum_scale_stride) * logit_scale
            hot = (label - first).to(tl.int32)
            for back in range(blocks):
                at = (blocks - 1 - back) * BLOCK + tl.arange(0, BLOCK)
                inside = at < COLUMNS
                z = tl.load(start + at, mask=inside, other=0.0, eviction_policy="evict_first")
                z = transformed(z, logit_scale, softcap, SOFTCAPPED)
                gradient = gradient_of(
                    z, log_sum_exp, at == hot, scale, share, smoothing, classes, softcap,
                    SUMMED, SMOOTHED, SOFTCAPPED,
                )  # fmt: skip
                tl.store(start + at, gradient.to(logits.dtype.element_ty), mask=inside)
