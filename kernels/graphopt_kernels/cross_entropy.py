"""Softmax cross entropy of logits that exist: one reading each way.

``graphopt::cross_entropy`` reads the logits once and keeps a log-sum-exp for each row::

    maximum, sum of exponentials of a part of a row     a program each
    log-sum-exp, loss of a row, their mean or sum        a second small kernel (a third, for many rows)

(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). Rows are cut into parts, since
a program a row leaves most of a device idle at the end. With the log-sum-exp the gradient of a logit needs
nothing else of its row, where that of ``log_softmax`` needs a sum over it::

    d logits = (exp(z - log_sum_exp) - one_hot(target)) * scale of the row

That is ``graphopt::cross_entropy_backward``. With ``written_out`` autograd computes it in operators of ATen
instead: a code generator makes one elementwise kernel of them, which may write over the logits where nobody
needs them any more. What is the same for a whole row is computed before, by ``cross_entropy_row_terms``:
within that kernel it would be computed for each logit.

Arithmetic is float32 (float64 for float64) and each result is rounded once. All results are the same in every
run. Rows whose target is ``ignore_index`` count neither in the loss nor in the mean and have a gradient of
exactly zero. A target that is no class raises ``RuntimeError`` on the CPU and gives NaN on CUDA.

Classes may weigh differently, as in ``torch.nn.functional.cross_entropy``: a row's loss is multiplied by the
weight of its target, the smoothing's share of each class by that of the class, and the mean is over the
targets' weights. Without smoothing a weight is a number of its row, and the logits are read as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.cross_entropy_launch import gradient_of_rows, losses_of_rows
from graphopt_kernels.cross_entropy_rows import (
    BLOCK_ELEMENTS,
    RowSettings,
    computes_in,
    cross_entropy_rows_reference,
)
from graphopt_kernels.linear_cross_entropy_arguments import REDUCTIONS
from graphopt_kernels.linear_cross_entropy_autograd import reduced, scale_of, weight_of_targets

__all__ = [
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_backward_reference",
    "cross_entropy_backward_supports",
    "cross_entropy_reference",
    "cross_entropy_supports",
    "row_terms",
    "row_terms_reference",
    "row_terms_supports",
    "written_gradient",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@torch.library.custom_op("graphopt::cross_entropy", mutates_args=())
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
    written_out: bool = False,
    class_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of ``logits`` [N, V] with ``target`` [N] (int64), and the log-sum-exp of each row.

    Of logits ``z`` first comes ``logit_scale * z``, then ``softcap * tanh(z / softcap)`` unless that is 0.
    The loss, of ``dtype``, has shape [], or [N] with reduction "none"; log-sum-exps [N] are float32 (float64
    for float64), those of rows that are ignored included. Both have a gradient. ``class_weight`` [V] of any
    floating-point dtype has none.
    """
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    exact = computes_in(logits.dtype)
    weights = None if class_weight is None else class_weight.to(exact)
    if (kernels := _kernels_for(logits)) is not None:
        return losses_of_rows(kernels, logits, target, settings, reduction, dtype, weights)
    losses, log_sum_exp = (logits.new_empty(logits.shape[0], dtype=exact) for _ in range(2))
    step = max(1, BLOCK_ELEMENTS // max(logits.shape[1], 1))
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        # What computes losses in place is given a copy of some rows at a time.
        cross_entropy_rows_reference(
            logits[part].to(exact, copy=True),
            target[part],
            settings,
            log_sum_exp=log_sum_exp[part],
            losses=losses[part],
            class_weight=weights,
        )
    return reduced(losses, target, reduction, ignore_index, dtype, weights), log_sum_exp


@cross_entropy.register_fake
def _(
    logits: torch.Tensor,
    target: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
    written_out: bool = False,
    class_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    reason = cross_entropy_supports(logits, target, reduction, class_weight=class_weight)
    if reason is not None:
        raise ValueError(f"cross_entropy: {reason}")
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty(rows, dtype=computes_in(logits.dtype))


@torch.library.custom_op("graphopt::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    sum_grad: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of ``logits`` for ``grad`` of the loss ([], or [N] with reduction "none") and
    ``sum_grad`` [N] of the log-sum-exps."""
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    exact = computes_in(logits.dtype)
    weights = None if class_weight is None else class_weight.to(exact)
    scale = scale_of(grad, target, reduction, ignore_index, exact, weights)
    if (kernels := _kernels_for(logits)) is not None:
        return gradient_of_rows(kernels, logits, target, log_sum_exp, scale, sum_grad, settings, weights)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format).copy_(logits)
    cross_entropy_rows_reference(
        gradient,
        target,
        settings,
        log_sum_exp=log_sum_exp,
        scale=scale,
        sum_scale=sum_grad,
        class_weight=weights,
    )
    return gradient


@cross_entropy_backward.register_fake
def _(
    grad: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    sum_grad: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# --- autograd ----------------------------------------------------------------------------------


Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of each row [N]: what its probabilities are multiplied by, what its target has less, what every class has
less (times its weight; of no elements without smoothing), and its target, -1 where it is ignored."""


def row_terms_reference(
    grad: torch.Tensor,
    target: torch.Tensor,
    classes: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    sum_grad: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
) -> Terms:
    """What the gradient of logits needs of each row beside its log-sum-exp; three of ``dtype``, the last
    int32."""
    ignored = target == ignore_index
    weights = None if class_weight is None else class_weight.to(dtype)
    scale = scale_of(grad, target, reduction, ignore_index, dtype, weights).masked_fill(ignored, 0)
    even = scale * (label_smoothing / classes) if label_smoothing else scale.new_empty(0)
    share = one = scale
    if weights is not None:
        one = scale * weight_of_targets(weights, target, ignore_index)
        share = one * (1 - label_smoothing)
        if label_smoothing:
            share = share + even * weights.sum()
    if sum_grad is not None:
        share = share + sum_grad
    return share, one * (1 - label_smoothing), even, target.masked_fill(ignored, -1).to(torch.int32)


@torch.library.custom_op("graphopt::cross_entropy_row_terms", mutates_args=())
def row_terms(
    grad: torch.Tensor,
    target: torch.Tensor,
    classes: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    sum_grad: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
) -> Terms:
    """``row_terms_reference`` as one call, which code generators do not compute again for every element."""
    reason = row_terms_supports(grad, target, classes, reduction)
    if reason is not None:
        raise RuntimeError(f"cross_entropy_row_terms: {reason}")
    return row_terms_reference(
        grad, target, classes, reduction, ignore_index, label_smoothing, dtype, sum_grad, class_weight
    )


@row_terms.register_fake
def _(
    grad: torch.Tensor,
    target: torch.Tensor,
    classes: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    sum_grad: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
) -> Terms:
    rows = target.shape[0]
    share, label = (target.new_empty(rows, dtype=dtype) for _ in range(2))
    even = target.new_empty(rows if label_smoothing else 0, dtype=dtype)
    return share, label, even, target.new_empty(rows, dtype=torch.int32)


def written_gradient(
    grad: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    sum_grad: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    *,
    terms_of_rows: Callable[..., Terms] = row_terms,
) -> torch.Tensor:
    """What ``cross_entropy_backward`` computes, in operators of ATen but for ``terms_of_rows``."""
    exact = computes_in(logits.dtype)
    share, label, even, place = terms_of_rows(
        grad, target, logits.shape[1], reduction, ignore_index, label_smoothing, exact, sum_grad, class_weight
    )
    z = logits.to(exact) * logit_scale if logit_scale != 1.0 else logits.to(exact)
    capped = torch.tanh(z / softcap) if softcap else None
    z = z if capped is None else capped * softcap
    columns = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)
    gradient = torch.exp(z - log_sum_exp[:, None]) * share[:, None]
    gradient = gradient - torch.where(columns == place[:, None], label[:, None], 0.0)
    if label_smoothing:
        each = even[:, None]
        gradient = gradient - (each if class_weight is None else each * class_weight.to(exact))
    if capped is not None:
        gradient = gradient * (1 - capped * capped)
    if logit_scale != 1.0:
        gradient = gradient * logit_scale
    if sum_grad is None:
        # Whatever its logits are.
        gradient = gradient.masked_fill((place < 0)[:, None], 0)
    return gradient.to(logits.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, *settings, _, written_out, class_weight = inputs
    ctx.save_for_backward(logits, target, output[1], class_weight)
    ctx.settings = tuple(settings)
    ctx.written_out = written_out
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, sum_grad: torch.Tensor | None) -> tuple[Any, ...]:
    if grad is None and sum_grad is None:
        return (None,) * 10
    logits, target, log_sum_exp, class_weight = ctx.saved_tensors
    if grad is None:
        grad = log_sum_exp.new_zeros(log_sum_exp.shape if ctx.settings[0] == "none" else ())
    function: Any = written_gradient if ctx.written_out else torch.ops.graphopt.cross_entropy_backward
    given = (grad, logits, target, log_sum_exp, *ctx.settings)
    beside = () if sum_grad is None and class_weight is None else (sum_grad,)
    weights = () if class_weight is None else (class_weight,)
    return function(*given, *beside, *weights), *(None,) * 9


torch.library.register_autograd("graphopt::cross_entropy", _backward, setup_context=_keep)


# --- what is taken -----------------------------------------------------------------------------


def _kernels_for(logits: torch.Tensor) -> Any:
    """The kernels where they take ``logits``, else ``None``."""
    if not logits.is_cuda or logits.dtype is torch.float64:
        return None
    return _kernels()


@functools.cache
def _kernels() -> Any:
    """The module of the jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels import cross_entropy_parts_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return cross_entropy_parts_triton


def cross_entropy_supports(
    logits: torch.Tensor,
    target: torch.Tensor,
    reduction: str,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
    written_out: bool = False,
    class_weight: torch.Tensor | None = None,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if logits.dim() != 2 or target.dim() != 1 or logits.shape[0] != target.shape[0]:
        return Reason(
            f"takes logits [N, V] and targets [N], got {list(logits.shape)} and {list(target.shape)}"
        )
    if logits.shape[1] == 0:
        return Reason("takes one class or more, got none")
    if logits.dtype not in _DTYPES:
        return Reason(f"takes floating-point logits, got {logits.dtype}")
    if target.dtype is not torch.int64:
        return Reason(f"takes int64 targets, got {target.dtype}")
    if reduction not in REDUCTIONS:
        return Reason(f"reduction is {reduction!r}: expected one of {', '.join(map(repr, REDUCTIONS))}")
    return None if class_weight is None else _weights_refused(logits, class_weight)


def _weights_refused(logits: torch.Tensor, class_weight: torch.Tensor) -> Reason | None:
    if tuple(class_weight.shape) != (logits.shape[1],):
        return Reason(
            f"the class weights have shape {list(class_weight.shape)}: expected [{logits.shape[1]}]"
        )
    if class_weight.dtype not in _DTYPES:
        return Reason(f"takes floating-point class weights, got {class_weight.dtype}")
    if class_weight.device != logits.device:
        return Reason(f"the class weights are on {class_weight.device}, the logits on {logits.device}")
    return None


def row_terms_supports(
    grad: torch.Tensor, target: torch.Tensor, classes: int, reduction: str, *settings: Any
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if target.dim() != 1:
        return Reason(f"takes targets [N], got {list(target.shape)}")
    if not 0 < classes < 2**31:
        return Reason(f"counts classes in 32 bits, got {classes}")
    if reduction not in REDUCTIONS:
        return Reason(f"knows the reductions {', '.join(REDUCTIONS)}, got {reduction!r}")
    return None


def cross_entropy_backward_supports(
    grad: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    reduction: str,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    sum_grad: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
) -> Reason | None:
    """As ``cross_entropy_supports``; log-sum-exps are those of the rows."""
    if log_sum_exp.shape != target.shape:
        return Reason(f"log-sum-exps have shape {list(log_sum_exp.shape)}: expected {list(target.shape)}")
    return cross_entropy_supports(logits, target, reduction, class_weight=class_weight)


# --- references --------------------------------------------------------------------------------


def cross_entropy_reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
    written_out: bool = False,
    class_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``cross_entropy`` computes, with operators of torch; differentiable."""
    z = logits.to(computes_in(logits.dtype)) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(
        z,
        target,
        None if class_weight is None else class_weight.to(z.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.to(dtype), z.logsumexp(1)


cross_entropy_backward_reference = functools.partial(written_gradient, terms_of_rows=row_terms_reference)
"""What ``cross_entropy_backward`` computes, with ATen operators."""
