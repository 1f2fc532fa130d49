"""RMSNorm and LayerNorm of rows in one operator each way, and the residual sum that comes before them.

For each row of the last dimension, ``m`` its mean (0 unless ``centered``)::

    rstd = 1 / sqrt(mean((x - m)^2) + eps)
    y    = (x - m) * rstd * (weight + weight_offset) + bias

(Ba et al. 2016, "Layer Normalization"; Zhang and Sennrich 2019, "Root Mean Square Layer Normalization").
Forward and backward read each row once: it stays in registers between its statistics and their use. Beside
the output, the forward gives ``mean`` and ``rstd``, a float32 a row each; the backward gives the gradients of
input, weight and bias in one pass, sums over rows kept by each program and added up by a second small kernel.

``graphopt::add_row_norm`` normalizes a sum and gives the sum as well. The backward takes the gradient that
comes to it another way (``passed``), as the residual's does, and adds it before rounding.

Rounding: arithmetic is float32 (float64 for float64). With ``rounds_first`` ``(x - m) * rstd`` is rounded to
the dtype of the input before the weight, as models that cast back before it do; the backward takes no
notice of that rounding. Results are the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.row_norm_launch import WIDEST, backward_rows, forward_rows, norm_kernels
from graphopt_kernels.row_norm_reference import (
    add_row_norm_reference,
    empty_gradients,
    empty_statistics,
    row_norm_backward_reference,
    row_norm_reference,
)

__all__ = [
    "add_row_norm",
    "add_row_norm_supports",
    "row_norm",
    "row_norm_backward",
    "row_norm_backward_supports",
    "row_norm_supports",
]


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@torch.library.custom_op("graphopt::row_norm", mutates_args=())
def row_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalized rows of ``input`` [..., D], of ``dtype``, with their mean and rstd [..., 1].

    ``weight`` and ``bias`` [D] are floating-point tensors of any dtype. Without ``centered`` the mean has no
    elements.
    """
    if (kernels := _kernels_for(input)) is not None:
        results = forward_rows(
            kernels, input, None, weight, bias, eps, centered, weight_offset, rounds_first, dtype
        )
        return results[0], results[2], results[3]
    return row_norm_reference(input, weight, bias, eps, centered, weight_offset, rounds_first, dtype)


@row_norm.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check("row_norm", input, weight, bias)
    return input.new_empty(input.shape, dtype=dtype), *empty_statistics(input, centered)


@torch.library.custom_op("graphopt::add_row_norm", mutates_args=())
def add_row_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of ``input`` and ``residual``, both [..., D] and of one dtype, after its normalized rows and
    before their statistics; the rest as ``row_norm``."""
    if (kernels := _kernels_for(input)) is not None:
        return forward_rows(
            kernels, input, residual, weight, bias, eps, centered, weight_offset, rounds_first, dtype
        )
    return add_row_norm_reference(
        input, residual, weight, bias, eps, centered, weight_offset, rounds_first, dtype
    )


@add_row_norm.register_fake
def _(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check("add_row_norm", input, weight, bias, residual)
    result = input.new_empty(input.shape, dtype=dtype)
    return result, input.new_empty(input.shape), *empty_statistics(input, centered)


@torch.library.custom_op("graphopt::row_norm_backward", mutates_args=())
def row_norm_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    passed: torch.Tensor | None,
    centered: bool,
    weight_offset: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias for ``grad`` [..., D] of the output; ``passed``, of the input's
    shape, is added to the first. Those that ``output_mask`` leaves out have no elements."""
    if (kernels := _kernels_for(input)) is not None:
        return backward_rows(
            kernels, grad, input, weight, bias, mean, rstd, passed, centered, weight_offset, output_mask
        )
    return row_norm_backward_reference(
        grad, input, weight, bias, mean, rstd, passed, centered, weight_offset, output_mask
    )


@row_norm_backward.register_fake
def _(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    passed: torch.Tensor | None,
    centered: bool,
    weight_offset: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_gradients(input, weight, bias, output_mask)


# --- autograd ----------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    input, weight, bias, _, centered, offset, *_ = inputs
    ctx.save_for_backward(input, weight, bias, *output[1:])
    ctx.settings = (centered, offset)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    input, weight, bias, mean, rstd = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    operator = torch.ops.graphopt.row_norm_backward
    found = operator(grad, input, weight, bias, mean, rstd, None, *ctx.settings, mask)
    return *(g if wanted else None for g, wanted in zip(found, mask, strict=True)), *(None,) * 5


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, weight, bias, _, centered, offset, *_ = inputs
    ctx.save_for_backward(output[1], weight, bias, *output[2:])
    ctx.settings = (centered, offset)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _sum_backward(
    ctx: Any, grad: torch.Tensor | None, passed: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    of_input, of_residual, of_weight, of_bias = ctx.needs_input_grad[:4]
    if grad is None:
        return passed if of_input else None, passed if of_residual else None, *(None,) * 7
    total, weight, bias, mean, rstd = ctx.saved_tensors
    mask = [of_input or of_residual, of_weight, of_bias]
    operator = torch.ops.graphopt.row_norm_backward
    found = operator(grad, total, weight, bias, mean, rstd, passed, *ctx.settings, mask)
    return (
        found[0] if of_input else None,
        found[0] if of_residual else None,
        found[1] if of_weight else None,
        found[2] if of_bias else None,
        *(None,) * 5,
    )


torch.library.register_autograd("graphopt::row_norm", _norm_backward, setup_context=_keep)
torch.library.register_autograd("graphopt::add_row_norm", _sum_backward, setup_context=_keep_sum)


def _kernels_for(input: torch.Tensor) -> Any:
    """The kernels where they take rows of ``input``, else ``None``."""
    if not input.is_cuda or input.dtype is torch.float64 or not input.dim() or input.shape[-1] > WIDEST:
        return None
    return norm_kernels()


# --- what is taken -----------------------------------------------------------------------------


def row_norm_supports(
    input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *_: Any
) -> Reason | None:
    """``None``, or why the operators do not take these arguments."""
    if not input.dim():
        return Reason("takes rows, got a number")
    if input.dtype not in _DTYPES:
        return Reason(f"takes floating-point rows, got {input.dtype}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.dim() != 1 or vector.shape[0] != input.shape[-1]):
            return Reason(f"the {name} has shape {list(vector.shape)}: expected [{input.shape[-1]}]")
        if vector is not None and vector.dtype not in _DTYPES:
            return Reason(f"takes a floating-point {name}, got {vector.dtype}")
    return None


def add_row_norm_supports(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *_: Any,
) -> Reason | None:
    """As ``row_norm_supports``; both terms are alike."""
    if residual.shape != input.shape or residual.dtype is not input.dtype:
        return Reason(
            f"the residual is {residual.dtype} {list(residual.shape)}: "
            f"expected {input.dtype} {list(input.shape)}"
        )
    return row_norm_supports(input, weight, bias)


def row_norm_backward_supports(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    passed: torch.Tensor | None,
    *_: Any,
) -> Reason | None:
    """As ``row_norm_supports``; gradients have the input's shape."""
    for name, gradient in (("gradient", grad), ("gradient that passes by", passed)):
        if gradient is not None and gradient.shape != input.shape:
            return Reason(f"the {name} has shape {list(gradient.shape)}: expected {list(input.shape)}")
    return row_norm_supports(input, weight, bias)


def _check(
    name: str,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
) -> None:
    if residual is None:
        reason = row_norm_supports(input, weight, bias)
    else:
        reason = add_row_norm_supports(input, residual, weight, bias)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
