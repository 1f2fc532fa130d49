"""What norms of rows compute, with ATen operators: what the kernels are held to (``row_norm``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = [
    "add_row_norm_reference",
    "empty_gradients",
    "empty_statistics",
    "row_norm_backward_reference",
    "row_norm_reference",
    "statistics_in",
]

def statistics_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics of rows of ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def empty_statistics(input: torch.Tensor, centered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for mean (without elements unless ``centered``) and rstd [..., 1] of the rows of ``input``."""
    shape, dtype = (*input.shape[:-1], 1), statistics_in(input.dtype)
    return input.new_empty(shape if centered else (0,), dtype=dtype), input.new_empty(shape, dtype=dtype)


def empty_gradients(
    input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, output_mask: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for the gradients of input, weight and bias; those that ``output_mask`` leaves out have no
    elements."""
    like = [input.new_empty(input.shape if output_mask[0] else (0,))]
    for vector, wanted in ((weight, output_mask[1]), (bias, output_mask[2])):
        source = input if vector is None else vector
        like.append(source.new_empty(input.shape[-1:] if wanted and vector is not None else (0,)))
    return like[0], like[1], like[2]


def row_norm_reference(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``row_norm`` computes, with ATen operators."""
    exact = statistics_in(input.dtype)
    x = input.to(exact)
    if centered:
        mean = x.mean(-1, keepdim=True)
        x = x - mean
    else:
        mean = x.new_empty(0)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = x * rstd
    if rounds_first:
        y = y.to(input.dtype).to(exact)
    if weight is not None:
        factor = weight.to(exact)
        y = y * (factor + weight_offset if weight_offset else factor)
    if bias is not None:
        y = y + bias.to(exact)
    return y.to(dtype), mean, rstd


def add_row_norm_reference(
    input: torch.Tensor, residual: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``add_row_norm`` computes, with ATen operators."""
    total = input + residual
    result, mean, rstd = row_norm_reference(total, *settings)
    return result, total, mean, rstd


def row_norm_backward_reference(
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
    """What ``row_norm_backward`` computes, with ATen operators."""
    exact = statistics_in(input.dtype)
    d_input, d_weight, d_bias = empty_gradients(input, weight, bias, output_mask)
    dy = grad.to(exact)
    x = input.to(exact)
    x = (x - mean if centered else x) * rstd
    rows = tuple(range(input.dim() - 1))
    if output_mask[1] and weight is not None:
        d_weight = (dy * x).sum(rows).to(weight.dtype) if rows else (dy * x).to(weight.dtype)
    if output_mask[2] and bias is not None:
        d_bias = dy.sum(rows).to(bias.dtype) if rows else dy.to(bias.dtype, copy=True)
    if output_mask[0]:
        if weight is not None:
            factor = weight.to(exact)
            dy = dy * (factor + weight_offset if weight_offset else factor)
        dx = dy - x * (dy * x).mean(-1, keepdim=True)
        if centered:
            dx = dx - dy.mean(-1, keepdim=True)
        dx = dx * rstd
        if passed is not None:
            dx = dx + passed.to(exact)
        d_input = dx.to(input.dtype)
    return d_input, d_weight, d_bias
