"""Backwards of linear + cross entropy that add the gradient of the weight to a matrix as they make it.

``graphopt::linear_cross_entropy_add_backward`` and ``linear_cross_entropy_blocks_add_backward`` compute what
the backwards without ``add`` do, but every product that makes the gradient of the weight, of a chunk of rows
or a block of classes, is added to ``into``: the gradient that is there from earlier steps, as large as the
weight, has none beside it. Where ``into`` has a shape but no memory it becomes the gradient.

A block of classes adds to rows that no other block adds to, so every sum is rounded once. Chunks of rows all
add to the whole of it: a sum is rounded once a chunk. In blocks the sum of the input's gradient has memory of
its own, since that of the weight's is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.add_product import memory_of
from graphopt_kernels.cross_entropy_rows import RowSettings
from graphopt_kernels.linear_cross_entropy import (
    ChunkGradients,
    backward_by_chunks,
    linear_cross_entropy_reference,
)
from graphopt_kernels.linear_cross_entropy_arguments import linear_cross_entropy_supports
from graphopt_kernels.linear_cross_entropy_blocks import backward_by_blocks, blocks_supports

__all__ = [
    "add_backward_reference",
    "add_backward_supports",
    "blocks_add_backward_supports",
    "linear_cross_entropy_add_backward",
    "linear_cross_entropy_blocks_add_backward",
]


@torch.library.custom_op("graphopt::linear_cross_entropy_add_backward", mutates_args=("into",))
def linear_cross_entropy_add_backward(
    into: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and bias; that of the weight is added to ``into`` [V, D], of the weight's dtype, or
    of float32 with a weight of bfloat16 on CUDA. Other arguments are those of
    ``linear_cross_entropy_backward``; raises ``ValueError`` for an ``into`` that does not fit."""
    _check(add_backward_supports(into, grad, input, weight, bias, target, log_sum_exp, chunks, reduction))
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    made = memory_of(into)
    mask = (output_mask[0], False, output_mask[2])
    gradients = ChunkGradients(input, weight, bias, mask, made, is_new=made is not into)
    backward_by_chunks(
        gradients, grad, input, weight, bias, target, log_sum_exp, chunks, reduction, settings, sum_grad
    )
    of_input, _, of_bias = gradients.results()
    _hand_over(into, made)
    return of_input, of_bias


@torch.library.custom_op("graphopt::linear_cross_entropy_blocks_add_backward", mutates_args=("into",))
def linear_cross_entropy_blocks_add_backward(
    into: torch.Tensor,
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    block: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    output_mask: Sequence[bool],
    sum_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``linear_cross_entropy_add_backward``, with the classes in blocks of ``block``."""
    _check(
        blocks_add_backward_supports(into, grad, input, weight, bias, target, log_sum_exp, block, reduction)
    )
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    made = memory_of(into)
    mask = (output_mask[0], False, output_mask[2])
    of_input, _, of_bias = backward_by_blocks(
        grad,
        input,
        weight,
        bias,
        target,
        log_sum_exp,
        block,
        reduction,
        settings,
        mask,
        sum_grad,
        made,
        is_new=made is not into,
    )
    _hand_over(into, made)
    return of_input, of_bias


def _check(reason: Reason | None) -> None:
    if reason is not None:
        raise ValueError(f"linear_cross_entropy: {reason}")


def _hand_over(into: torch.Tensor, made: torch.Tensor) -> None:
    """Let ``into`` have the memory of what was made for it."""
    if made is not into:
        into.set_(made.untyped_storage(), 0, made.shape, made.stride())


def _empty(
    into: torch.Tensor,
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    cuts: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    output_mask: Sequence[bool],
    sum_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wants_bias = output_mask[2] and bias is not None
    return (
        input.new_empty(input.shape if output_mask[0] else (0,)),
        weight.new_empty(weight.shape[0] if wants_bias else 0),
    )


linear_cross_entropy_add_backward.register_fake(_empty)
linear_cross_entropy_blocks_add_backward.register_fake(_empty)


# --- what is taken -----------------------------------------------------------------------------


def add_backward_supports(
    into: torch.Tensor,
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    chunks: int,
    reduction: str,
    *_: Any,
) -> Reason | None:
    """As ``linear_cross_entropy_supports``; ``into`` is like the weight, or wider."""
    reason = linear_cross_entropy_supports(input, weight, bias, target, chunks, reduction)
    return reason or _into_refused(into, weight)


def blocks_add_backward_supports(
    into: torch.Tensor,
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    block: int,
    reduction: str,
    *_: Any,
) -> Reason | None:
    """As ``blocks_supports``; ``into`` is like the weight, or wider."""
    return blocks_supports(input, weight, bias, target, block, reduction) or _into_refused(into, weight)


def _into_refused(into: torch.Tensor, weight: torch.Tensor) -> Reason | None:
    if into.shape != weight.shape:
        return Reason(f"the weight is {list(weight.shape)}, what is added to {list(into.shape)}")
    if into.device != weight.device:
        return Reason(f"the weight is on {weight.device}, what is added to on {into.device}")
    widens = into.is_cuda and (into.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
    if into.dtype is not weight.dtype and not widens:
        return Reason(f"the weight is {weight.dtype}, what is added to {into.dtype}")
    return None


# --- reference ---------------------------------------------------------------------------------


def add_backward_reference(
    into: torch.Tensor,
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    cuts: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    output_mask: Sequence[bool],
    sum_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What both operators compute of an ``into`` that has memory, by differentiating the whole logits."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (input, weight, bias)]
    settings = (target, cuts, reduction, ignore_index, label_smoothing, logit_scale, softcap, grad.dtype)
    assert leaves[0] is not None and leaves[1] is not None
    with torch.enable_grad():
        loss, sums = linear_cross_entropy_reference(leaves[0], leaves[1], leaves[2], *settings)
        outputs = [(loss, grad)] if sum_grad is None else [(loss, grad), (sums, sum_grad)]
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad([o for o, _ in outputs], wanted, [g for _, g in outputs])
    into += found[1].to(into.dtype)
    return (
        found[0] if output_mask[0] else input.new_empty(0),
        found[2] if output_mask[2] and bias is not None else input.new_empty(0),
    )
