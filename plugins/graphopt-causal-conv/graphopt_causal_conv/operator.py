"""``causal_conv::forward``: a depthwise convolution of which no value looks ahead, with its activation.

For ``input`` [B, C, L], ``weight`` [C, 1, K] and ``bias`` [C]::

    z[b, c, t] = bias[c] + sum_k weight[c, 0, k] * input[b, c, t - (K - 1) + k]        y = silu(z) or z

Values before the first count as 0. With ``reverse`` it runs the other way in time, which is its own gradient
with respect to the input. Sums are float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.candidate import Reason

__all__ = ["WIDEST", "block_for", "convolve", "forward", "reference", "supports"]

WIDEST = 16
"""Elements of a filter that a program unrolls."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@torch.library.custom_op("causal_conv::forward", mutates_args=())
def forward(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool, reverse: bool
) -> torch.Tensor:
    """The convolution of ``input`` [B, C, L], contiguous and of its dtype."""
    kernels = _kernels() if input.is_cuda and input.dtype is not torch.float64 else None
    if kernels is None:
        return reference(input, weight, bias, silu, reverse)
    return convolve(kernels, input, weight, bias, silu, reverse)


@forward.register_fake
def _(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool, reverse: bool
) -> torch.Tensor:
    reason = supports(input, weight, bias, silu, reverse)
    if reason is not None:
        raise ValueError(f"causal_conv::forward: {reason}")
    return input.new_empty(input.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, weight, bias, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(input, weight, bias)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    input, weight, bias = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    if ctx.silu:
        before = forward(input, weight, bias, False, ctx.reverse)
        grad = torch.ops.aten.silu_backward(grad, before)
    d_input = forward(grad, weight, None, False, not ctx.reverse) if needs_input else None
    d_weight = _weight_gradient(grad, input, weight, ctx.reverse) if needs_weight else None
    d_bias = grad.sum((0, 2), dtype=_wide(grad.dtype)).to(bias.dtype) if needs_bias else None
    return d_input, d_weight, d_bias, None, None


torch.library.register_autograd("causal_conv::forward", _backward, setup_context=_keep)


def _weight_gradient(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, reverse: bool
) -> torch.Tensor:
    """Operators of torch: code generators make few kernels of them."""
    wide = _wide(grad.dtype)
    early, late = (input, grad) if not reverse else (grad, input)
    taps, length = weight.shape[-1], input.shape[-1]
    padded, sums = F.pad(early, (taps - 1, 0)), []
    for k in range(taps):
        sums.append((late.to(wide) * padded[..., k : k + length].to(wide)).sum((0, 2)))
    return torch.stack(sums, -1).unsqueeze(1).to(weight.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def reference(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool, reverse: bool
) -> torch.Tensor:
    """What ``forward`` computes, with operators of torch; differentiable."""
    if not input.shape[-1]:
        # Libraries refuse rows that are shorter than the filter even with their padding.
        return input.clone(memory_format=torch.contiguous_format)
    wide = _wide(input.dtype)
    x, w = input.to(wide), weight.to(wide)
    before = weight.shape[-1] - 1
    padded = F.pad(x, (0, before) if reverse else (before, 0))
    w = w.flip(-1) if reverse else w
    z = F.conv1d(padded, w, None if bias is None else bias.to(wide), groups=weight.shape[0])
    return (F.silu(z) if silu else z).to(input.dtype).contiguous()


def supports(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool, reverse: bool
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if input.dim() != 3:
        return Reason(f"takes [batch, channels, length], got {input.dim()} dimensions")
    if input.dtype not in _DTYPES:
        return Reason(f"takes floating-point values, got {input.dtype}")
    if weight.dim() != 3 or weight.shape[1] != 1 or weight.shape[0] != input.shape[1]:
        return Reason(f"takes a filter [{input.shape[1]}, 1, K], got {list(weight.shape)}")
    if not 1 <= weight.shape[-1] <= WIDEST:
        return Reason(f"takes filters of 1 to {WIDEST} elements, got {weight.shape[-1]}")
    if weight.dtype is not input.dtype:
        return Reason(f"takes a filter of {input.dtype}, got {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype is not input.dtype):
        given = f"{list(bias.shape)} of {bias.dtype}"
        return Reason(f"takes a bias [{input.shape[1]}] of {input.dtype}, got {given}")
    return None


def block_for(length: int) -> int:
    """Elements of a row for each program: short rows whole, a power of two."""
    return min(1024, max(32, 1 << (length - 1).bit_length())) if length else 32


def convolve(
    kernels: Any,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    reverse: bool,
) -> torch.Tensor:
    """``forward`` by ``kernels``, the module of the jitted function."""
    data = input.contiguous()
    result = torch.empty_like(data)
    if not data.numel():
        return result
    batch, channels, length = data.shape
    block = block_for(length)
    with torch.cuda.device(data.device) if data.is_cuda else contextlib.nullcontext():
        kernels.forward_kernel[(batch * channels, -(-length // block))](
            data,
            weight.contiguous(),
            data if bias is None else bias.contiguous(),
            result,
            channels,
            length,
            TAPS=weight.shape[-1],
            BLOCK=block,
            BIAS=bias is not None,
            SILU=silu,
            REVERSE=reverse,
            num_warps=4 if block > 256 else 1,
        )
    return result


@functools.cache
def _kernels() -> Any:
    """The module of the jitted kernel, or ``None`` without triton."""
    try:
        from graphopt_causal_conv import kernel
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return kernel
