"""Softmax of rows, or its logarithm, in one reading.

``graphopt::softmax`` holds a row in registers from its maximum to its result, whatever its width, where code
generators read rows again that are not a power of two or longer than a few elements a thread. The gradient is
ATen's own: ``_softmax_backward_data`` and ``_log_softmax_backward_data``, of which code generators make one
kernel, which reads the result and its gradient and may be written over either.

Arithmetic is float32 (float64 for float64), rounded once. Rows that hold NaN or infinity, or nothing but
minus infinity, are NaN as in torch. Results are the same in every run.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.row_norm_launch import WIDEST, tile

__all__ = [
    "SoftmaxLaunch",
    "softmax",
    "softmax_launch",
    "softmax_reference",
    "softmax_rows",
    "softmax_supports",
]

_aten = torch.ops.aten

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@torch.library.custom_op("graphopt::softmax", mutates_args=())
def softmax(input: torch.Tensor, logarithm: bool, dtype: torch.dtype) -> torch.Tensor:
    """The softmax of ``input`` [..., D] over its last dimension, or the ``logarithm`` of it, of ``dtype``."""
    if (kernels := _kernels_for(input)) is not None:
        return softmax_rows(kernels, input, logarithm, dtype)
    return softmax_reference(input, logarithm, dtype).contiguous()


@softmax.register_fake
def _(input: torch.Tensor, logarithm: bool, dtype: torch.dtype) -> torch.Tensor:
    reason = softmax_supports(input, logarithm, dtype)
    if reason is not None:
        raise ValueError(f"softmax: {reason}")
    return input.new_empty(input.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, ctx.logarithm, _ = inputs
    ctx.dtype = input.dtype
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (output,) = ctx.saved_tensors
    data = _aten._log_softmax_backward_data if ctx.logarithm else _aten._softmax_backward_data
    return data(grad, output, -1, output.dtype).to(ctx.dtype), None, None


torch.library.register_autograd("graphopt::softmax", _backward, setup_context=_keep)


class SoftmaxLaunch(NamedTuple):
    """``block`` elements that hold a row, a power of two, and so many ``rows`` a program."""

    block: int
    rows: int
    warps: int


def softmax_launch(width: int) -> SoftmaxLaunch:
    """As for norms, whose launches were measured: many small programs hide each other's loads. The longest
    rows take more warps, so that their elements fit the registers."""
    block, rows = tile(width)
    return SoftmaxLaunch(block, rows, 4 if block < WIDEST else 8)


def softmax_rows(
    kernels: Any,
    input: torch.Tensor,
    logarithm: bool,
    dtype: torch.dtype,
    *,
    launch: SoftmaxLaunch | None = None,
) -> torch.Tensor:
    """``graphopt::softmax`` by ``kernels``, the module of the jitted function."""
    result = torch.empty(input.shape, dtype=dtype, device=input.device)
    if not input.numel():
        return result
    width = input.shape[-1]
    rows = input.numel() // width
    launch = launch or softmax_launch(width)
    with torch.cuda.device(input.device) if input.is_cuda else contextlib.nullcontext():
        kernels.forward_kernel[(-(-rows // launch.rows),)](
            input.contiguous(),
            result,
            rows,
            LOG=logarithm,
            WIDTH=width,
            BLOCK=launch.block,
            ROWS=launch.rows,
            num_warps=launch.warps,
        )
    return result


def _kernels_for(input: torch.Tensor) -> Any:
    """The kernels where they take rows of ``input``, else ``None``."""
    if not input.is_cuda or input.dtype is torch.float64 or input.shape[-1] > WIDEST:
        return None
    return _kernels()


@functools.cache
def _kernels() -> Any:
    """The module of the jitted kernel, or ``None`` without triton."""
    try:
        from graphopt_kernels import softmax_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return softmax_triton


def softmax_supports(input: torch.Tensor, logarithm: bool, dtype: torch.dtype) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if not input.dim():
        return Reason("takes rows, got a number")
    if input.dtype not in _DTYPES:
        return Reason(f"takes floating-point rows, got {input.dtype}")
    if torch.promote_types(input.dtype, dtype) is not dtype:
        return Reason(f"gives results of {input.dtype} or wider, not {dtype}")
    return None


def softmax_reference(input: torch.Tensor, logarithm: bool, dtype: torch.dtype) -> torch.Tensor:
    """What ``softmax`` computes, with operators of torch; differentiable."""
    function = torch.log_softmax if logarithm else torch.softmax
    return function(input.to(dtype), -1)
