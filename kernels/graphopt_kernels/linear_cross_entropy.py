"""Linear layer and cross entropy in one operator: the logits exist for some of the rows at a time.

The tokens are cut into ``chunks`` of equally many rows. For each, the logits go into one buffer that all
chunks share, one kernel turns them into losses and writes their gradient over them, and two products
take that to the gradients of the input and of the weight. Whole logits, tokens by vocabulary, are
never in memory. Two ways to a gradient:

``graphopt::linear_cross_entropy_with_gradients``
    The forward computes the gradients as well, for a loss whose own gradient is 1, and the backward
    multiplies them by the one that comes: six FLOPs for each element of input times vocabulary, as
    without chunks (Hsu et al. 2024, "Liger Kernel"). They are held from forward to backward.

``graphopt::linear_cross_entropy``
    The forward keeps one log-sum-exp a row; the backward computes the logits again: eight FLOPs, and
    nothing held (after Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models").
    The log-sum-exps may be differentiated as well.

``graphopt_kernels.linear_cross_entropy_blocks`` cuts the classes instead.

Rounding: logits and their gradient are rounded to the dtype of the input, as separate operators do;
what happens in between is in float32 (float64 for float64). The gradient of the weight is summed over
chunks in its own dtype: each product is added in float32 and the sum rounded once a chunk, so that the
error by rounding is about sqrt((chunks + 1) / 2) times that of one product. The bias's is rounded once
a chunk and summed in float32. All results are the same in every run.

Rows whose target is ``ignore_index`` count neither in the loss nor in the mean and give no gradient. The
number of rows that count stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt_kernels.class_blocks import ALIGNED, empty_gradients
from graphopt_kernels.cross_entropy_rows import RowSettings, computes_in, cross_entropy_rows
from graphopt_kernels.held_gradients import scaled
from graphopt_kernels.linear_cross_entropy_reference import check_arguments

__all__ = [
    "ALIGNED",
    "keep_gradients",
    "keep_statistics",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_with_gradients",
    "recomputing_backward",
    "reduced",
    "scale_of",
    "scaling_backward",
]


@torch.library.custom_op("graphopt::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunks: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of ``input @ weight.T + bias``, and the log-sum-exp of each row.

    ``input`` [N, D], ``weight`` [V, D] and ``bias`` [V] are of one floating-point dtype, ``target`` [N] is
    int64; see ``RowSettings`` for ``logit_scale`` and ``softcap``. The loss, of ``dtype``, has shape [],
    or [N] with reduction "none"; log-sum-exps [N] are float32 (float64 for float64), those of rows that
    are ignored included. Both have a gradient.
    """
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    exact = computes_in(input.dtype)
    losses, log_sum_exp = (input.new_empty(input.shape[0], dtype=exact) for _ in range(2))

    def visit(part: slice, logits: torch.Tensor) -> None:
        cross_entropy_rows(logits, target[part], settings, log_sum_exp=log_sum_exp[part], losses=losses[part])

    _each_chunk(input, weight, bias, chunks, visit)
    return reduced(losses, target, reduction, ignore_index, dtype), log_sum_exp


@linear_cross_entropy.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunks: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(input, weight, bias, target, chunks, reduction)
    rows = input.shape[0]
    loss = input.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    return loss, input.new_empty(rows, dtype=computes_in(input.dtype))


@torch.library.custom_op("graphopt::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    chunks: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    output_mask: Sequence[bool],
    sum_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias, for the gradient ``grad`` of the loss ([], or [N] with
    reduction "none") and ``sum_grad`` [N] of the log-sum-exps. Those that ``output_mask`` leaves out have
    no elements."""
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    scale = scale_of(grad, target, reduction, ignore_index, computes_in(input.dtype))
    gradients = _Gradients(input, weight, bias, output_mask)

    def visit(part: slice, logits: torch.Tensor) -> None:
        cross_entropy_rows(
            logits,
            target[part],
            settings,
            log_sum_exp=log_sum_exp[part],
            scale=scale[part],
            sum_scale=None if sum_grad is None else sum_grad[part],
        )
        gradients.add(part, logits)

    _each_chunk(input, weight, bias, chunks, visit)
    return gradients.results()


@linear_cross_entropy_backward.register_fake
def _(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    chunks: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    output_mask: Sequence[bool],
    sum_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_gradients(input, weight, bias, output_mask)


@torch.library.custom_op("graphopt::linear_cross_entropy_with_gradients", mutates_args=())
def linear_cross_entropy_with_gradients(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunks: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and the gradients of input, weight and bias where the loss has gradient 1.

    Arguments are those of ``linear_cross_entropy``; ``reduction`` is "mean" or "sum". Gradients that
    ``output_mask`` leaves out have no elements.
    """
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    exact = computes_in(input.dtype)
    rows = input.shape[0]
    losses, log_sum_exp = (input.new_empty(rows, dtype=exact) for _ in range(2))
    scale = scale_of(input.new_ones((), dtype=exact), target, reduction, ignore_index, exact)
    gradients = _Gradients(input, weight, bias, output_mask)

    def visit(part: slice, logits: torch.Tensor) -> None:
        cross_entropy_rows(
            logits,
            target[part],
            settings,
            log_sum_exp=log_sum_exp[part],
            losses=losses[part],
            scale=scale[part],
        )
        gradients.add(part, logits)

    _each_chunk(input, weight, bias, chunks, visit)
    return reduced(losses, target, reduction, ignore_index, dtype), *gradients.results()


@linear_cross_entropy_with_gradients.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunks: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_arguments(input, weight, bias, target, chunks, reduction)
    if reduction == "none":
        raise ValueError("linear_cross_entropy_with_gradients: reduction is 'none': expected 'mean' or 'sum'")
    return input.new_empty((), dtype=dtype), *empty_gradients(input, weight, bias, output_mask)


# --- autograd ----------------------------------------------------------------------------------


def keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Keep what computes the logits again, and their log-sum-exps."""
    input, weight, bias, target, *rest = inputs
    ctx.save_for_backward(input, weight, bias, target, output[1])
    ctx.settings = tuple(rest[:-1])
    ctx.set_materialize_grads(False)


def recomputing_backward(operator: Any) -> Callable[..., tuple[Any, ...]]:
    """A backward by ``operator``, which computes the logits again."""

    def backward(ctx: Any, grad: torch.Tensor | None, sum_grad: torch.Tensor | None) -> tuple[Any, ...]:
        input, weight, bias, target, log_sum_exp = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        if grad is None and sum_grad is None:
            return (None,) * 11
        if grad is None:
            by_row = ctx.settings[1] == "none"
            grad = log_sum_exp.new_zeros(log_sum_exp.shape if by_row else ())
        given = (grad, input, weight, bias, target, log_sum_exp, *ctx.settings, mask)
        found = operator(*given) if sum_grad is None else operator(*given, sum_grad)
        return *(g if wanted else None for g, wanted in zip(found, mask, strict=True)), *(None,) * 8

    return backward


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Keep the gradients for a loss whose own gradient is 1."""
    ctx.output_mask = tuple(inputs[-1])
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def scaling_backward(operator: Any) -> Callable[..., tuple[Any, ...]]:
    """A backward by the gradients that the forward of ``operator`` computed, times that of the loss."""

    def small() -> None:
        with torch.enable_grad():
            floats: Any = {"dtype": torch.float32, "device": "cpu", "requires_grad": True}
            leaves = [torch.ones(2, 2, **floats) for _ in range(2)]
            target = torch.zeros(2, dtype=torch.int64, device="cpu")
            settings = (1, "sum", -100, 0.0, 1.0, 0.0, torch.float32, [True, True, False])
            loss = operator(*leaves, None, target, *settings)[0]
            torch.autograd.grad(loss, leaves)

    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 12
        found = scaled(ctx.saved_tensors, grad, small)
        gradients = [g if has else None for g, has in zip(found, ctx.output_mask, strict=True)]
        for name, gradient, needed in zip(
            ("input", "weight", "bias"), gradients, ctx.needs_input_grad, strict=False
        ):
            if needed and gradient is None:
                kind = str(operator).removeprefix("graphopt.")
                raise RuntimeError(f"{kind}: output_mask lacks {name}, which requires a gradient")
        return *gradients, *(None,) * 9

    return backward


torch.library.register_autograd(
    "graphopt::linear_cross_entropy",
    recomputing_backward(torch.ops.graphopt.linear_cross_entropy_backward),
    setup_context=keep_statistics,
)
torch.library.register_autograd(
    "graphopt::linear_cross_entropy_with_gradients",
    scaling_backward(torch.ops.graphopt.linear_cross_entropy_with_gradients),
    setup_context=keep_gradients,
)


# --- chunks ------------------------------------------------------------------------------------


def _each_chunk(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    chunks: int,
    visit: Callable[[slice, torch.Tensor], None],
) -> None:
    """Call ``visit`` with the rows of each chunk and their logits, which the next chunk overwrites."""
    rows, columns = input.shape[0], weight.shape[0]
    step = max(1, -(-rows // chunks))
    width = -(-columns // ALIGNED) * ALIGNED if input.is_cuda else columns
    buffer = input.new_empty(min(step, rows), width)[:, :columns]
    # Within a region, autocast would take the products for its own.
    with torch.amp.autocast(input.device.type, enabled=False):
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            logits = buffer[: part.stop - start]
            if bias is None:
                torch.mm(input[part], weight.t(), out=logits)
            else:
                torch.addmm(bias, input[part], weight.t(), out=logits)
            visit(part, logits)


class _Gradients:
    """Gradients of input, weight and bias, as chunks of the logits' gradient come in."""

    def __init__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        output_mask: Sequence[bool],
    ) -> None:
        self._sources = (input, weight)
        self._bias = bias
        self._mask = output_mask
        self._input, self._weight, _ = empty_gradients(input, weight, None, output_mask)
        exact = computes_in(input.dtype)
        self._sums = weight.new_zeros(weight.shape[0] if output_mask[2] else 0, dtype=exact)
        self._is_first = True

    def add(self, part: slice, logits: torch.Tensor) -> None:
        input, weight = self._sources
        if self._mask[0]:
            torch.mm(logits, weight, out=self._input[part])
        if self._mask[1]:
            if self._is_first:
                torch.mm(logits.t(), input[part], out=self._weight)
            else:
                self._weight.addmm_(logits.t(), input[part])
        if self._mask[2]:
            self._sums += logits.sum(0)
        self._is_first = False

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._is_first and self._mask[1]:
            self._weight.zero_()
        sums = self._sums if self._bias is None else self._sums.to(self._bias.dtype)
        return self._input, self._weight, sums


def _counted(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """How many rows count, on the device."""
    return (target != ignore_index).sum()


def scale_of(
    grad: torch.Tensor, target: torch.Tensor, reduction: str, ignore_index: int, dtype: torch.dtype
) -> torch.Tensor:
    """What the loss of each row is multiplied by [N], of ``dtype``, where the whole loss has gradient
    ``grad``."""
    scale = grad.to(dtype)
    if reduction == "mean":
        scale = scale / _counted(target, ignore_index)
    return scale.expand(target.shape[0])


def reduced(
    losses: torch.Tensor, target: torch.Tensor, reduction: str, ignore_index: int, dtype: torch.dtype
) -> torch.Tensor:
    """The loss, of ``dtype``, of rows with ``losses`` [N]."""
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / _counted(target, ignore_index)
    return total.to(dtype)
