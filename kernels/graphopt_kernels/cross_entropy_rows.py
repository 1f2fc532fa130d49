"""Softmax cross entropy of rows of logits: losses, log-sum-exps, and the gradient written over the logits.

All arithmetic is in float32 (float64 for float64 logits); the gradient is rounded once, when stored.
On CUDA one Triton kernel handles a row a program: the maximum and the sum in one reading (Milakov
and Gimelshein 2018, "Online normalizer calculation for softmax"), the gradient in a second one. Elsewhere
ATen operators work on blocks of rows that stay in a core's cache.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.tuning.lookup import Choice, rows_class

__all__ = [
    "ROWS",
    "RowLaunch",
    "RowSettings",
    "RowsProblem",
    "check_launch",
    "computes_in",
    "cross_entropy_rows",
    "cross_entropy_rows_reference",
    "launch_rows",
    "launch_size",
    "rows_launch",
]

BLOCK_ELEMENTS = 2**18
"""Elements that the reference handles at a time: 1 MiB in float32."""

_BLOCK_BYTES = 2**14
_ELEMENTS_PER_WARP = 512
"""16 for each thread: two loads of 16 bytes in flight or more, and no register spilled."""

_MANY = 4096
"""Rows from which on more are alike for a launch: some for every program that a device holds."""


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What the loss of a row is.

    Of logits ``z`` first comes ``logit_scale * z``, then ``softcap * tanh(z / softcap)`` unless that
    is 0, then the cross entropy with ``label_smoothing``. Rows whose target is ``ignore_index``
    have loss 0 and gradient 0, whatever their logits are.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float = 0.0


def computes_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that rows of ``dtype`` are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def cross_entropy_rows(
    logits: torch.Tensor,
    target: torch.Tensor,
    settings: RowSettings,
    *,
    log_sum_exp: torch.Tensor,
    losses: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    sum_scale: torch.Tensor | None = None,
    first: int = 0,
    classes: int | None = None,
) -> None:
    """Losses and the gradient of rows ``logits`` [n, V], which are scratch and are overwritten.

    With ``losses`` [n], writes each row's loss there and its log-sum-exp to ``log_sum_exp`` [n]; without,
    reads ``log_sum_exp``. With ``scale`` [n] (it may be expanded), leaves the gradient of
    ``(scale * losses).sum()`` in ``logits``, with ``sum_scale`` [n] beside it that of
    ``(scale * losses + sum_scale * log_sum_exp).sum()``. All four are of ``computes_in(logits.dtype)``;
    ``target`` [n] is int64. A target outside of [0, V) raises ``RuntimeError`` on the CPU and gives NaN
    on CUDA. Where both losses and gradient are computed, rows that are ignored have log-sum-exp 0.

    Without ``losses``, ``logits`` may be the columns from ``first`` on of rows of ``classes`` columns.
    """
    if losses is not None and (sum_scale is not None or first or classes is not None):
        raise ValueError("cross_entropy_rows: losses need whole rows and come before their gradient")
    whole = logits.shape[1] if classes is None else classes
    if logits.is_cuda and logits.dtype is not torch.float64 and (kernel := _kernel()) is not None:
        launch_rows(kernel, logits, target, settings, log_sum_exp, losses, scale, sum_scale, first, whole)
    else:
        cross_entropy_rows_reference(
            logits,
            target,
            settings,
            log_sum_exp=log_sum_exp,
            losses=losses,
            scale=scale,
            sum_scale=sum_scale,
            first=first,
            classes=whole,
        )


def cross_entropy_rows_reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    settings: RowSettings,
    *,
    log_sum_exp: torch.Tensor,
    losses: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    sum_scale: torch.Tensor | None = None,
    first: int = 0,
    classes: int | None = None,
    class_weight: torch.Tensor | None = None,
) -> None:
    """``cross_entropy_rows`` with ATen operators, in place, some rows at a time.

    With ``class_weight`` [V], of ``computes_in(logits.dtype)``, losses are weighted as torch does; the rows
    are then whole, and losses come before their gradient.
    """
    rows, columns = logits.shape
    whole = columns if classes is None else classes
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        _block(
            logits[part],
            target[part],
            settings,
            log_sum_exp[part],
            None if losses is None else losses[part],
            None if scale is None else scale[part],
            None if sum_scale is None else sum_scale[part],
            first,
            whole,
            class_weight,
        )


def _block(
    logits: torch.Tensor,
    target: torch.Tensor,
    settings: RowSettings,
    log_sum_exp: torch.Tensor,
    losses: torch.Tensor | None,
    scale: torch.Tensor | None,
    sum_scale: torch.Tensor | None,
    first: int,
    classes: int,
    class_weight: torch.Tensor | None,
) -> None:
    dtype = computes_in(logits.dtype)
    z = logits if logits.dtype is dtype else logits.to(dtype)
    columns = logits.shape[1]
    ignored = target == settings.ignore_index
    is_part = columns != classes
    # A label in another block of the columns is none of these rows' business.
    elsewhere = ignored | (target < first) | (target >= first + columns) if is_part else ignored
    label = (target - first if first else target).masked_fill(elsewhere, 0)[:, None]
    smoothing = settings.label_smoothing
    slope = None
    if settings.logit_scale != 1.0:
        z.mul_(settings.logit_scale)
    if settings.softcap:
        z.div_(settings.softcap).tanh_()
        slope = z.square().neg_().add_(1) if scale is not None else None
        z.mul_(settings.softcap)
    if losses is not None:
        value = z.gather(1, label).squeeze(1).mul_(smoothing - 1)
        if class_weight is not None:
            value.mul_(class_weight[label.squeeze(1)])
        if smoothing and class_weight is not None:
            value.add_((z * class_weight).sum(1), alpha=-smoothing / classes)
        elif smoothing:
            value.add_(z.mean(1), alpha=-smoothing)
        top = z.amax(1, keepdim=True)
        z.sub_(top).exp_()
        total = z.sum(1, keepdim=True)
        log_sum_exp.copy_((top + total.log()).squeeze(1))
        if class_weight is None:
            value.add_(log_sum_exp)
        else:
            value.add_(log_sum_exp * _taken(class_weight, label.squeeze(1), smoothing))
        losses.copy_(value.masked_fill_(ignored, 0))
        if scale is not None:
            log_sum_exp.masked_fill_(ignored, 0)
    else:
        z.sub_(log_sum_exp[:, None]).exp_()
        total = torch.ones_like(log_sum_exp)[:, None]
    if scale is None:
        return
    weight = scale[:, None]
    if sum_scale is not None:
        weight = weight.masked_fill(ignored[:, None], 0)
    share = weight if class_weight is None else weight * _taken(class_weight, label, smoothing)
    z.mul_(share / total if sum_scale is None else share + sum_scale[:, None])
    hot = weight * (smoothing - 1)
    if class_weight is not None:
        hot = hot * class_weight[label]
    z.scatter_add_(1, label, hot.masked_fill(elsewhere[:, None], 0) if is_part else hot.expand_as(label))
    if smoothing:
        even = weight * (smoothing / classes)
        z.sub_(even if class_weight is None else even * class_weight)
    if slope is not None:
        z.mul_(slope)
    if settings.logit_scale != 1.0:
        z.mul_(settings.logit_scale)
    if sum_scale is None:
        z.masked_fill_(ignored[:, None], 0)
    if z is not logits:
        logits.copy_(z)


def _taken(class_weight: torch.Tensor, label: torch.Tensor, smoothing: float) -> torch.Tensor:
    """How often the log-sum-exp of a row is in its weighted loss."""
    taken = class_weight[label] * (1 - smoothing)
    return taken + class_weight.sum() * (smoothing / class_weight.shape[0]) if smoothing else taken


class RowsProblem(NamedTuple):
    """What the kernel is launched for: ``rows`` by their class (``rows_class``); ``aligned``: each row begins
    on 16 bytes; whether losses, the gradient and that of the log-sum-exp are asked; which settings are
    there."""

    rows: int
    columns: int
    dtype: torch.dtype
    aligned: bool
    statistics: bool
    gradient: bool
    summed: bool
    smoothed: bool
    softcapped: bool


class RowLaunch(NamedTuple):
    """How the kernel is started: elements of a row that are read at a time, a power of two."""

    block: int
    warps: int


def launch_size(columns: int, itemsize: int) -> tuple[int, int]:
    """Elements that a program handles at a time, and its warps, for rows of ``columns``."""
    block = min(_BLOCK_BYTES // itemsize, 1 << (columns - 1).bit_length())
    return block, max(1, block // _ELEMENTS_PER_WARP)


def rows_launch(problem: RowsProblem) -> RowLaunch:
    """Blocks of 16 KiB, 16 elements a thread."""
    return RowLaunch(*launch_size(problem.columns, problem.dtype.itemsize))


def check_launch(problem: RowsProblem, launch: RowLaunch) -> Reason | None:
    """``None``, or why the kernel would not compute the same with ``launch``."""
    for name, value, most in (("elements", launch.block, 2**16), ("warps", launch.warps, 32)):
        if not 1 <= value <= most or value & (value - 1):
            return Reason(f"{value} {name} are no power of two up to {most}")
    return None


ROWS = Choice(
    "cross-entropy-rows", ("graphopt_kernels.cross_entropy_rows_triton",), rows_launch, check_launch
)


def launch_rows(
    kernel: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    settings: RowSettings,
    log_sum_exp: torch.Tensor,
    losses: torch.Tensor | None,
    scale: torch.Tensor | None,
    sum_scale: torch.Tensor | None = None,
    first: int = 0,
    classes: int | None = None,
    *,
    launch: RowLaunch | None = None,
) -> None:
    """``cross_entropy_rows`` by the jitted ``kernel``; ``launch`` is looked up where it is not given."""
    rows, columns = logits.shape
    if not rows or not columns:
        return
    if launch is None:
        problem = RowsProblem(
            rows_class(rows, _MANY),
            columns,
            logits.dtype,
            logits.stride(0) * logits.element_size() % 16 == 0,
            losses is not None,
            scale is not None,
            sum_scale is not None,
            settings.label_smoothing != 0,
            settings.softcap != 0,
        )
        launch = ROWS(problem, logits.device)
    if losses is None:
        log_sum_exp = log_sum_exp.contiguous()
    unused = log_sum_exp
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        kernel[(rows,)](
            logits,
            target.contiguous(),
            unused if losses is None else losses,
            log_sum_exp,
            unused if scale is None else scale,
            unused if sum_scale is None else sum_scale,
            logits.stride(0),
            0 if scale is None else scale.stride(0),
            0 if sum_scale is None else sum_scale.stride(0),
            first,
            columns if classes is None else classes,
            settings.ignore_index,
            settings.label_smoothing,
            settings.logit_scale,
            settings.softcap,
            STATISTICS=losses is not None,
            GRADIENT=scale is not None,
            SUMMED=sum_scale is not None,
            SMOOTHED=settings.label_smoothing != 0,
            SOFTCAPPED=settings.softcap != 0,
            COLUMNS=columns,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )


@functools.cache
def _kernel() -> Any:
    """The jitted kernel, or ``None`` without triton."""
    try:
        from graphopt_kernels import cross_entropy_rows_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return cross_entropy_rows_triton.rows_kernel
