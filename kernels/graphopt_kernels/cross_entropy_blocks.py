"""Losses and log-sum-exps of rows whose logits come a block of classes at a time.

What is known of a row between blocks is three numbers: the maximum so far, the sum of exponentials beside
that maximum, and what label and smoothing add to the loss (Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax"). On CUDA one Triton kernel folds a block in, a row a program, in one reading;
elsewhere ATen operators do, on parts of rows that stay in a core's cache. In float32 (float64 for float64).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from graphopt_kernels.cross_entropy_rows import BLOCK_ELEMENTS, RowSettings, computes_in, launch_size

__all__ = ["check_labels", "fold_block"]


def fold_block(
    logits: torch.Tensor,
    target: torch.Tensor,
    settings: RowSettings,
    *,
    losses: torch.Tensor,
    log_sum_exp: torch.Tensor,
    totals: torch.Tensor,
    first: int,
    classes: int,
    begins: bool,
    ends: bool,
    keeps: bool = False,
) -> None:
    """Take in ``logits`` [n, v] of classes ``first`` to ``first + v``, of ``classes`` in all.

    Blocks come in any order. ``losses``, ``log_sum_exp`` and ``totals`` [n], of
    ``computes_in(logits.dtype)``, carry what is known from one to the next: whatever they held before the
    one that ``begins`` is overwritten, and after the one that ``ends`` the former two are results. Rows that
    are ignored have loss 0 and the log-sum-exp that they have. On CUDA a ``target`` that names no class gives
    NaN; on the CPU see ``check_labels``. Unless it ``keeps`` them, ``logits`` may be overwritten.
    """
    if logits.is_cuda and logits.dtype is not torch.float64 and (kernel := _kernel()) is not None:
        _launch(kernel, logits, target, settings, losses, log_sum_exp, totals, first, classes, begins, ends)
        return
    rows, columns = logits.shape
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        _fold(
            logits[part],
            target[part],
            settings,
            losses[part],
            log_sum_exp[part],
            totals[part],
            first,
            classes,
            begins,
            ends,
            keeps,
        )


def check_labels(target: torch.Tensor, ignore_index: int, classes: int) -> None:
    """Raise ``RuntimeError`` where a label on the CPU names no class. On CUDA that would wait for the
    device: rows turn NaN there instead."""
    if target.is_cuda:
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(wrong.any()):
        label = int(target[wrong][0])
        raise RuntimeError(f"target {label} is out of bounds for {classes} classes")


def _fold(
    logits: torch.Tensor,
    target: torch.Tensor,
    settings: RowSettings,
    losses: torch.Tensor,
    log_sum_exp: torch.Tensor,
    totals: torch.Tensor,
    first: int,
    classes: int,
    begins: bool,
    ends: bool,
    keeps: bool,
) -> None:
    dtype = computes_in(logits.dtype)
    z = logits.to(dtype, copy=keeps)
    columns = logits.shape[1]
    if settings.logit_scale != 1.0:
        z.mul_(settings.logit_scale)
    if settings.softcap:
        z.div_(settings.softcap).tanh_().mul_(settings.softcap)
    if begins:
        # The maximum starts finite: a block of nothing but -inf makes no NaN.
        log_sum_exp.fill_(torch.finfo(dtype).min)
        totals.zero_()
        losses.zero_()
    smoothing = settings.label_smoothing
    elsewhere = (target < first) | (target >= first + columns)
    label = (target - first).masked_fill_(elsewhere, 0)[:, None]
    losses.add_(z.gather(1, label).squeeze(1).masked_fill_(elsewhere, 0), alpha=smoothing - 1)
    if smoothing:
        losses.sub_(z.sum(1), alpha=smoothing / classes)
    peak = torch.maximum(log_sum_exp, z.amax(1))
    totals.mul_(log_sum_exp.sub_(peak).exp_())
    totals.add_(z.sub_(peak[:, None]).exp_().sum(1))
    log_sum_exp.copy_(peak)
    if ends:
        log_sum_exp.add_(totals.log_())
        losses.add_(log_sum_exp).masked_fill_(target == settings.ignore_index, 0)


def _launch(
    kernel: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    settings: RowSettings,
    losses: torch.Tensor,
    log_sum_exp: torch.Tensor,
    totals: torch.Tensor,
    first: int,
    classes: int,
    begins: bool,
    ends: bool,
) -> None:
    rows, columns = logits.shape
    if not rows:
        return
    block, warps = launch_size(columns, logits.element_size())
    with torch.cuda.device(logits.device):
        kernel[(rows,)](
            logits,
            target.contiguous(),
            losses,
            log_sum_exp,
            totals,
            logits.stride(0),
            first,
            classes,
            settings.ignore_index,
            settings.label_smoothing,
            settings.logit_scale,
            settings.softcap,
            BEGINS=begins,
            ENDS=ends,
            SMOOTHED=settings.label_smoothing != 0,
            SOFTCAPPED=settings.softcap != 0,
            COLUMNS=columns,
            BLOCK=block,
            num_warps=warps,
        )


@functools.cache
def _kernel() -> Any:
    """The jitted kernel, or ``None`` without triton."""
    try:
        from graphopt_kernels import cross_entropy_blocks_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return cross_entropy_blocks_triton.fold_kernel
