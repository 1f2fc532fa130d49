"""What the operators for linear + cross entropy take, and what they compute with the whole logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.cross_entropy_rows import computes_in

__all__ = [
    "REDUCTIONS",
    "check_arguments",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_supports",
    "with_gradients_reference",
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


def linear_cross_entropy_reference(
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
    """What ``linear_cross_entropy`` computes, with the whole logits; differentiable."""
    logits = torch.nn.functional.linear(input, weight, bias).to(computes_in(input.dtype)) * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return loss.to(dtype), logits.logsumexp(1)


def with_gradients_reference(
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
    """What ``linear_cross_entropy_with_gradients`` computes, by differentiating the whole logits."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (input, weight, bias)]
    settings = (target, chunks, reduction, ignore_index, label_smoothing, logit_scale, softcap, dtype)
    assert leaves[0] is not None and leaves[1] is not None
    with torch.enable_grad():
        loss, _ = linear_cross_entropy_reference(leaves[0], leaves[1], leaves[2], *settings)
        wanted = [leaf for leaf, has in zip(leaves, output_mask, strict=True) if has and leaf is not None]
        found = iter(torch.autograd.grad(loss, wanted) if wanted else ())
    gradients = [
        next(found) if has and leaf is not None else input.new_empty(0)
        for leaf, has in zip(leaves, output_mask, strict=True)
    ]
    return loss.detach(), gradients[0], gradients[1], gradients[2]
