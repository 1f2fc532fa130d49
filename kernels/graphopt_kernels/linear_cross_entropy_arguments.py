"""What the operators for linear + cross entropy take."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.candidate import Reason

__all__ = [
    "REDUCTIONS",
    "check_arguments",
    "linear_cross_entropy_supports",
    "with_gradients_supports",
]

REDUCTIONS = ("none", "mean", "sum")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def linear_cross_entropy_supports(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunks: int,
    reduction: str,
    *_: Any,
) -> Reason | None:
    """``None``, or why the operators do not take these arguments."""
    if input.dim() != 2 or weight.dim() != 2 or target.dim() != 1:
        return Reason("takes a matrix of inputs, a matrix of weights and a vector of targets")
    if input.shape[1] != weight.shape[1] or input.shape[0] != target.shape[0]:
        return Reason(
            f"sizes do not match: input {list(input.shape)}, weight {list(weight.shape)}, "
            f"target {list(target.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        return Reason(f"the bias has shape {list(bias.shape)}: expected [{weight.shape[0]}]")
    dtypes = {tensor.dtype for tensor in (input, weight, bias) if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        return Reason("takes input, weight and bias of one floating-point dtype")
    if target.dtype is not torch.int64:
        return Reason(f"takes int64 targets, got {target.dtype}")
    if chunks < 1:
        return Reason(f"takes one chunk or more, got {chunks}")
    if reduction not in REDUCTIONS:
        return Reason(f"reduction is {reduction!r}: expected one of {', '.join(map(repr, REDUCTIONS))}")
    return None


def with_gradients_supports(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunks: int,
    reduction: str,
    *_: Any,
) -> Reason | None:
    """As ``linear_cross_entropy_supports``; losses of single rows have no single gradient."""
    if reduction == "none":
        return Reason("gradients that are computed in the forward need a loss that is one number")
    return linear_cross_entropy_supports(input, weight, bias, target, chunks, reduction)


def check_arguments(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunks: int,
    reduction: str,
) -> None:
    """Raise ``ValueError`` for arguments that ``linear_cross_entropy`` does not take."""
    reason = linear_cross_entropy_supports(input, weight, bias, target, chunks, reduction)
    if reason is not None:
        raise ValueError(f"linear_cross_entropy: {reason}")
