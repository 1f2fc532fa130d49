"""What the operators for linear + cross entropy share: autograd, and losses of rows as one.

Two ways to a gradient: the backward computes the logits again from what is kept of each row, or multiplies
gradients that the forward computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from graphopt_kernels.held_gradients import scaled

__all__ = [
    "keep_gradients",
    "keep_statistics",
    "recomputing_backward",
    "reduced",
    "scale_of",
    "scaling_backward",
    "weight_of_targets",
]


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
                kind = str(operator).rpartition(".")[2]
                raise RuntimeError(f"{kind}: output_mask lacks {name}, which requires a gradient")
        return *gradients, *(None,) * 9

    return backward


def weight_of_targets(class_weight: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The weight [N] of each row's class, 0 of rows that are ignored. Labels that name no class take that of
    another one: their losses are spoilt elsewhere."""
    ignored = target == ignore_index
    label = target.masked_fill(ignored, 0).clamp(0, class_weight.shape[0] - 1)
    return class_weight[label].masked_fill(ignored, 0)


def _counted(target: torch.Tensor, ignore_index: int, class_weight: torch.Tensor | None) -> torch.Tensor:
    """How many rows count, or the sum of their classes' weights, on the device."""
    if class_weight is not None:
        return weight_of_targets(class_weight, target, ignore_index).sum()
    return (target != ignore_index).sum()


def scale_of(
    grad: torch.Tensor,
    target: torch.Tensor,
    reduction: str,
    ignore_index: int,
    dtype: torch.dtype,
    class_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the loss of each row is multiplied by [N], of ``dtype``, where the whole loss has gradient
    ``grad``; ``class_weight`` [V] is of ``dtype``."""
    scale = grad.to(dtype)
    if reduction == "mean":
        scale = scale / _counted(target, ignore_index, class_weight)
    return scale.expand(target.shape[0])


def reduced(
    losses: torch.Tensor,
    target: torch.Tensor,
    reduction: str,
    ignore_index: int,
    dtype: torch.dtype,
    class_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss, of ``dtype``, of rows with ``losses`` [N], which are weighted already where there is a
    ``class_weight`` [V]."""
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "mean":
        counted = _counted(target, ignore_index, class_weight)
        total = total / counted
        if class_weight is not None:
            # Of classes that weigh nothing there is no mean, whatever the smoothing adds.
            total = total.masked_fill(counted == 0, math.nan)
    return total.to(dtype)
