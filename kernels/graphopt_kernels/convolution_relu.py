"""A convolution with what comes right behind it in one kernel of cuDNN: bias, residual sum, ReLU.

::

    out = relu(conv2d(input, weight, bias) + residual)

Libraries keep a tile of a convolution's result in registers until it is finished: there the rest is free.
Separate operators write the result, read it and the residual, and write it again. For inference: there is no
backward. Source: cuDNN's documentation, ``cudnnConvolutionBiasActivationForward`` (of which ``alpha2`` is the
residual's factor).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from graphopt.candidate import Reason

__all__ = ["convolution_relu", "convolution_relu_reference", "convolution_relu_supports"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.library.custom_op("graphopt::convolution_relu", mutates_args=())
def convolution_relu(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """``relu(conv2d(input, weight, bias) + residual)``, an image of [N, K, P, Q].

    ``input`` [N, C, H, W], ``weight`` [K, C / groups, R, S], ``bias`` [K]; ``residual`` looks like the
    result. ``stride``, ``padding`` and ``dilation`` are two numbers each. The result is laid out in memory as
    that of ``conv2d``. On CUDA it is rounded once; NaN and infinity come out as of separate operators. Raises
    ``ValueError`` for operands that do not fit together.
    """
    reason = convolution_relu_supports(input, weight, bias, residual, stride, padding, dilation, groups)
    if reason is not None:
        raise ValueError(f"convolution_relu: {reason}")
    if not input.is_cuda or not input.numel():
        return convolution_relu_reference(input, weight, bias, residual, stride, padding, dilation, groups)
    # The library reads an operand of another layout wrong, or not at all.
    layout = _layout(input, weight)
    input, weight = (x.contiguous(memory_format=layout) for x in (input, weight))
    where = tuple(stride), tuple(padding), tuple(dilation), groups
    if residual is None:
        return torch.cudnn_convolution_relu(input, weight, bias, *where)
    residual = residual.contiguous(memory_format=layout)
    return torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, bias, *where)


@convolution_relu.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    made = F.conv2d(input, weight, bias, list(stride), list(padding), list(dilation), groups)
    return made.new_empty(made.shape).contiguous(memory_format=_layout(input, weight))


def convolution_relu_reference(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """What ``convolution_relu`` computes, with ATen operators."""
    made = F.conv2d(input, weight, bias, list(stride), list(padding), list(dilation), groups)
    if residual is not None:
        made = made + residual
    return torch.relu(made).contiguous(memory_format=_layout(input, weight))


def convolution_relu_supports(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Reason | None:
    """Images in batches, all of one dtype that cuDNN has such kernels for."""
    if input.dim() != 4 or weight.dim() != 4:
        return Reason(
            f"an input of {input.dim()} and a weight of {weight.dim()} dimensions: expected 4 and 4"
        )
    if input.dtype not in _DTYPES:
        return Reason(f"no kernel takes {str(input.dtype).removeprefix('torch.')}")
    others = [x for x in (weight, bias, residual) if x is not None]
    if any(x.dtype is not input.dtype for x in others):
        return Reason("operands are of several dtypes")
    if any(len(numbers) != 2 for numbers in (stride, padding, dilation)):
        return Reason("stride, padding and dilation are two numbers each")
    if residual is not None:
        sizes = (
            (size + 2 * pad - step * (kernel - 1) - 1) // every + 1
            for size, kernel, every, pad, step in zip(
                input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        )
        if tuple(residual.shape) != (input.shape[0], weight.shape[0], *sizes):
            return Reason(f"the residual {list(residual.shape)} does not look like the result")
    return None


def _layout(input: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """That of the result of ``conv2d``: channels last if an operand is laid out so and in no other way."""
    for operand in (input, weight):
        last = operand.is_contiguous(memory_format=torch.channels_last)
        if last and not operand.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format
