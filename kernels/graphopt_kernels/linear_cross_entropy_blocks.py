"""Linear layer and cross entropy in one operator: the logits exist for some of the classes at a time.

``graphopt::linear_cross_entropy_blocks`` computes what ``graphopt::linear_cross_entropy`` does, a block of
classes after the other (after Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
with products of the library in place of one kernel)::

    forward     logits = input @ weight[block].T      one buffer [N, block]
                fold them into what is known of each row: maximum, sum of exponentials, the label's logit
    backward    logits = input @ weight[block].T
                their gradient, written over them
                sum of d input += logits @ weight[block]
                d weight[block] = logits.T @ input

Eight FLOPs for each element of input times vocabulary, as with chunks of rows that are computed again, but
the weight's gradient is written once: all gradients are rounded as with whole logits. The weight is read once
a pass whatever the size of the blocks, and what grows with their number is the reading and writing of the
input's sum. ``graphopt_kernels.class_blocks`` says where that is held.

``graphopt::linear_cross_entropy_blocks_with_gradients`` computes the gradients in the forward, for a loss
whose own gradient is 1. A block's gradient needs the log-sum-exps and so all other blocks, but until it is
written the memory of the weight's gradient is free: it holds the logits of as many classes as fit, a share
D / N of them, and these are not computed again. That makes between six FLOPs and eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.class_blocks import BlockGradients, ClassBlocks, HeldLogits, empty_gradients
from graphopt_kernels.cross_entropy_blocks import check_labels, fold_block
from graphopt_kernels.cross_entropy_rows import RowSettings, computes_in, cross_entropy_rows
from graphopt_kernels.linear_cross_entropy import linear_cross_entropy_reference, with_gradients_reference
from graphopt_kernels.linear_cross_entropy_arguments import (
    linear_cross_entropy_supports,
    with_gradients_supports,
)
from graphopt_kernels.linear_cross_entropy_autograd import (
    keep_gradients,
    keep_statistics,
    recomputing_backward,
    reduced,
    scale_of,
    scaling_backward,
)

__all__ = [
    "backward_by_blocks",
    "blocks_reference",
    "blocks_supports",
    "blocks_with_gradients_reference",
    "blocks_with_gradients_supports",
    "linear_cross_entropy_blocks",
    "linear_cross_entropy_blocks_backward",
    "linear_cross_entropy_blocks_with_gradients",
]


@torch.library.custom_op("graphopt::linear_cross_entropy_blocks", mutates_args=())
def linear_cross_entropy_blocks(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    block: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``graphopt::linear_cross_entropy``, with the classes in blocks of ``block``."""
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    # Within a region, autocast would take the products for its own.
    with torch.amp.autocast(input.device.type, enabled=False):
        blocks = ClassBlocks(input, weight, bias, block)
        classes = weight.shape[0]
        losses, log_sum_exp = _losses(blocks, blocks.within(0, classes), target, settings, classes, None)
        # The block is not to be held while losses are summed up.
        del blocks
    return reduced(losses, target, reduction, ignore_index, dtype), log_sum_exp


def _losses(
    blocks: ClassBlocks,
    parts: Sequence[slice],
    target: torch.Tensor,
    settings: RowSettings,
    classes: int,
    held: HeldLogits | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and log-sum-exps of rows, from the blocks ``parts``, some of which are held."""
    check_labels(target, settings.ignore_index, classes)
    losses, log_sum_exp, totals = (blocks.of_rows() for _ in range(3))
    for index, part in enumerate(parts):
        place = None if held is None else held.place(part)
        fold_block(
            blocks.logits(part, place),
            target,
            settings,
            losses=losses,
            log_sum_exp=log_sum_exp,
            totals=totals,
            first=part.start,
            classes=classes,
            begins=index == 0,
            ends=index == len(parts) - 1,
            keeps=held is not None and (place is not None or part == held.at_hand),
        )
    return losses, log_sum_exp


@linear_cross_entropy_blocks.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    block: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    reason = blocks_supports(input, weight, bias, target, block, reduction)
    if reason is not None:
        raise ValueError(f"linear_cross_entropy_blocks: {reason}")
    rows = input.shape[0]
    loss = input.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    return loss, input.new_empty(rows, dtype=computes_in(input.dtype))


@torch.library.custom_op("graphopt::linear_cross_entropy_blocks_backward", mutates_args=())
def linear_cross_entropy_blocks_backward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``graphopt::linear_cross_entropy_backward``, with the classes in blocks of ``block``."""
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    return backward_by_blocks(
        grad, input, weight, bias, target, log_sum_exp, block, reduction, settings, output_mask, sum_grad
    )


def backward_by_blocks(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    block: int,
    reduction: str,
    settings: RowSettings,
    output_mask: Sequence[bool],
    sum_grad: torch.Tensor | None,
    into: torch.Tensor | None = None,
    *,
    is_new: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``linear_cross_entropy_blocks_backward``; see ``BlockGradients`` for ``into``."""
    scale = scale_of(grad, target, reduction, settings.ignore_index, computes_in(input.dtype))
    with torch.amp.autocast(input.device.type, enabled=False):
        blocks = ClassBlocks(input, weight, bias, block)
        gradients = BlockGradients(blocks, input, weight, bias, output_mask, into, is_new=is_new)

        def gradient(part: slice) -> torch.Tensor:
            logits = blocks.logits(part)
            cross_entropy_rows(
                logits,
                target,
                settings,
                log_sum_exp=log_sum_exp,
                scale=scale,
                sum_scale=sum_grad,
                first=part.start,
                classes=weight.shape[0],
            )
            return logits

        gradients.finish(gradient)
    return gradients.results


@linear_cross_entropy_blocks_backward.register_fake
def _(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_gradients(input, weight, bias, output_mask)


@torch.library.custom_op("graphopt::linear_cross_entropy_blocks_with_gradients", mutates_args=())
def linear_cross_entropy_blocks_with_gradients(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    block: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``graphopt::linear_cross_entropy_with_gradients``, with the classes in blocks of ``block``."""
    settings = RowSettings(ignore_index, label_smoothing, logit_scale, softcap)
    exact = computes_in(input.dtype)
    scale = scale_of(input.new_ones((), dtype=exact), target, reduction, ignore_index, exact)
    with torch.amp.autocast(input.device.type, enabled=False):
        losses, gradients = _losses_and_gradients(
            ClassBlocks(input, weight, bias, block), input, weight, bias, target, scale, settings, output_mask
        )
    return reduced(losses, target, reduction, ignore_index, dtype), *gradients


def _losses_and_gradients(
    blocks: ClassBlocks,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    scale: torch.Tensor,
    settings: RowSettings,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Losses of rows, and the gradients of ``(scale * losses).sum()``."""
    classes = weight.shape[0]
    gradients = BlockGradients(blocks, input, weight, bias, output_mask)
    held = HeldLogits(blocks, gradients, output_mask)
    losses, log_sum_exp = _losses(blocks, held.arrival(classes), target, settings, classes, held)

    def gradient(part: slice) -> torch.Tensor:
        logits = held.place(part)
        if part == held.at_hand:
            logits = blocks.buffer(part)
        elif logits is None:
            logits = blocks.logits(part)
        elif held.is_in_the_way(part):
            logits = blocks.buffer(part).copy_(logits)
        cross_entropy_rows(
            logits,
            target,
            settings,
            log_sum_exp=log_sum_exp,
            scale=scale,
            first=part.start,
            classes=classes,
        )
        return logits

    if any(output_mask):
        gradients.finish(gradient, held.order())
    return losses, gradients.results


@linear_cross_entropy_blocks_with_gradients.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    block: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    reason = blocks_with_gradients_supports(input, weight, bias, target, block, reduction)
    if reason is not None:
        raise ValueError(f"linear_cross_entropy_blocks_with_gradients: {reason}")
    return input.new_empty((), dtype=dtype), *empty_gradients(input, weight, bias, output_mask)


torch.library.register_autograd(
    "graphopt::linear_cross_entropy_blocks_with_gradients",
    scaling_backward(torch.ops.graphopt.linear_cross_entropy_blocks_with_gradients),
    setup_context=keep_gradients,
)
torch.library.register_autograd(
    "graphopt::linear_cross_entropy_blocks",
    recomputing_backward(torch.ops.graphopt.linear_cross_entropy_blocks_backward),
    setup_context=keep_statistics,
)


def blocks_supports(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    block: int,
    reduction: str,
    *_: Any,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if block < 1:
        return Reason(f"takes blocks of one class or more, got {block}")
    reason = linear_cross_entropy_supports(input, weight, bias, target, 1, reduction)
    if reason is None and weight.shape[0] == 0:
        return Reason("the weight has no classes")
    return reason


def blocks_with_gradients_supports(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    block: int,
    reduction: str,
    *_: Any,
) -> Reason | None:
    """As ``blocks_supports``; losses of single rows have no single gradient."""
    if reason := blocks_supports(input, weight, bias, target, block, reduction):
        return reason
    return with_gradients_supports(input, weight, bias, target, 1, reduction)


def blocks_reference(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    block: int,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``linear_cross_entropy_blocks`` computes, with the whole logits; differentiable."""
    return linear_cross_entropy_reference(input, weight, bias, target, 1, *settings)


def blocks_with_gradients_reference(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    block: int,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``linear_cross_entropy_blocks_with_gradients`` computes, by differentiating the whole logits."""
    return with_gradients_reference(input, weight, bias, target, 1, *settings)
