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

import torch

from graphopt_kernels import even_products
from graphopt_kernels.class_blocks import ALIGNED, empty_gradients
from graphopt_kernels.cross_entropy_rows import RowSettings, computes_in, cross_entropy_rows
from graphopt_kernels.linear_cross_entropy_arguments import check_arguments
from graphopt_kernels.linear_cross_entropy_autograd import (
    keep_gradients,
    keep_statistics,
    recomputing_backward,
    reduced,
    scale_of,
    scaling_backward,
)

__all__ = [
    "ALIGNED",
    "ChunkGradients",
    "backward_by_chunks",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_with_gradients",
    "with_gradients_reference",
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
    gradients = ChunkGradients(input, weight, bias, output_mask)
    backward_by_chunks(
        gradients, grad, input, weight, bias, target, log_sum_exp, chunks, reduction, settings, sum_grad
    )
    return gradients.results()


def backward_by_chunks(
    gradients: ChunkGradients,
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    chunks: int,
    reduction: str,
    settings: RowSettings,
    sum_grad: torch.Tensor | None,
) -> None:
    """Let ``gradients`` take in what is computed chunk by chunk; see ``linear_cross_entropy_backward``."""
    scale = scale_of(grad, target, reduction, settings.ignore_index, computes_in(input.dtype))

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
    gradients = ChunkGradients(input, weight, bias, output_mask)

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
    even = even_products.even_classes(columns, input.dtype, input.device)
    # Within a region, autocast would take the products for its own.
    with torch.amp.autocast(input.device.type, enabled=False):
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            logits = buffer[: part.stop - start]
            even_products.logits(input[part], weight, bias, logits, even)
            visit(part, logits)


class ChunkGradients:
    """Gradients of input, weight and bias, as chunks of the logits' gradient come in."""

    def __init__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        output_mask: Sequence[bool],
        into: torch.Tensor | None = None,
        *,
        is_new: bool = False,
    ) -> None:
        """``into``, where it is given, is what the gradient of the weight is added to, or is if it
        ``is_new``; that of ``output_mask`` is not wanted then."""
        self._sources = (input, weight)
        self._bias = bias
        self._mask = output_mask if into is None else (output_mask[0], True, output_mask[2])
        self._input, self._weight, _ = empty_gradients(input, weight, None, output_mask)
        self._adds = into is not None and not is_new
        if into is not None:
            self._weight = into
        exact = computes_in(input.dtype)
        self._sums = weight.new_zeros(weight.shape[0] if output_mask[2] else 0, dtype=exact)
        self._even = even_products.even_classes(weight.shape[0], weight.dtype, weight.device)
        self._is_first = True

    def add(self, part: slice, logits: torch.Tensor) -> None:
        input, weight = self._sources
        if self._mask[0]:
            even_products.gradient_of_input(logits, weight, self._input[part], self._even)
        if self._mask[1]:
            even_products.gradient_of_weight(
                logits, input[part], self._weight, self._even, adds=self._adds or not self._is_first
            )
        if self._mask[2]:
            self._sums += logits.sum(0)
        self._is_first = False

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._is_first and self._mask[1] and not self._adds:
            self._weight.zero_()
        sums = self._sums if self._bias is None else self._sums.to(self._bias.dtype)
        return self._input, self._weight, sums


# --- references --------------------------------------------------------------------------------


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
