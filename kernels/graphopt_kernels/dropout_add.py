"""Dropout and the sum with a residual behind it, of which only a seed is kept.

``graphopt::dropout_add`` gives, with numbers of ``seed`` (``graphopt_kernels.philox``)::

    output = input * factor + residual      factor: 0 with probability p, else 1 / (1 - p)

(Srivastava et al. 2014). The gradient of the input is the same operator on that of the output: no mask is
written or read, and what runs again drops the same. The seed is a tensor that was drawn before
(``philox.drawn_seed``), so the operator itself is a function of its arguments: it may be run again, or
replayed in a CUDA graph, whatever the generator has done in between.

Arithmetic is float32 (float64 where either operand is), rounded once. What is dropped is multiplied by 0: NaN
and infinity show, as in ``torch.nn.functional.dropout``.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.philox import cut_of, factors_of_elements, rate_reason, seed_reason

__all__ = ["BLOCK", "dropout_add", "dropout_add_elements", "dropout_add_reference", "dropout_add_supports"]

BLOCK = 2048
"""Elements of a program, of four warps."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SLICE_ELEMENTS = 2**17


@torch.library.custom_op("graphopt::dropout_add", mutates_args=())
def dropout_add(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    p: float,
    seed: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``input`` [...] of a floating-point dtype, dropped out with probability ``p``, at least 0 and below 1,
    plus ``residual`` [...] of the same shape. ``seed`` is int64 of one element. The result is contiguous,
    of ``dtype`` or else of that which the sum of both has. Raises ``ValueError`` for other arguments."""
    if (kernels := _kernels_for(input, residual)) is not None:
        return dropout_add_elements(kernels, input, residual, p, seed, dtype)
    return dropout_add_reference(input, residual, p, seed, dtype)


@dropout_add.register_fake
def _(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    p: float,
    seed: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    reason = dropout_add_supports(input, residual, p, seed, dtype)
    if reason is not None:
        raise ValueError(f"dropout_add: {reason}")
    return input.new_empty(input.shape, dtype=_result(input, residual, dtype))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, residual, ctx.p, seed, _ = inputs
    ctx.dtypes = input.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    of_input, of_residual = ctx.dtypes
    d_input = d_residual = None
    if ctx.needs_input_grad[0]:
        d_input = torch.ops.graphopt.dropout_add(grad, None, ctx.p, seed, of_input)
    if ctx.needs_input_grad[1]:
        d_residual = grad.to(of_residual)
    return d_input, d_residual, None, None, None


torch.library.register_autograd("graphopt::dropout_add", _backward, setup_context=_keep)


def dropout_add_elements(
    kernels: Any,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    p: float,
    seed: torch.Tensor,
    dtype: torch.dtype | None,
    *,
    block: int = BLOCK,
) -> torch.Tensor:
    """``graphopt::dropout_add`` by ``kernels``, the module of the jitted function."""
    result = torch.empty(input.shape, dtype=_result(input, residual, dtype), device=input.device)
    if not input.numel():
        return result
    with torch.cuda.device(input.device) if input.is_cuda else contextlib.nullcontext():
        kernels.dropout_add_kernel[(-(-input.numel() // block),)](
            input.contiguous(),
            # Without one the kernel does not look at it.
            input if residual is None else residual.contiguous(),
            result,
            seed,
            input.numel(),
            cut_of(p),
            1.0 / (1.0 - p),
            ADDS=residual is not None,
            BLOCK=block,
            num_warps=4,
        )
    return result


def _kernels_for(input: torch.Tensor, residual: torch.Tensor | None) -> Any:
    """The kernels where they take these operands, else ``None``."""
    if not input.is_cuda or torch.float64 in (input.dtype, None if residual is None else residual.dtype):
        return None
    return _kernels()


@functools.cache
def _kernels() -> Any:
    """The module of the jitted kernel, or ``None`` without triton."""
    try:
        from graphopt_kernels import dropout_add_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return dropout_add_triton


def dropout_add_supports(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    p: float,
    seed: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    for tensor in (input, *([] if residual is None else [residual])):
        if tensor.dtype not in _DTYPES:
            return Reason(f"takes floating-point tensors, got {tensor.dtype}")
    if dtype is not None and dtype not in _DTYPES:
        return Reason(f"gives floating-point results, not {dtype}")
    if residual is not None and residual.shape != input.shape:
        return Reason(f"a residual of shape {list(residual.shape)} is added to {list(input.shape)}")
    wrong = rate_reason(p) or seed_reason(seed, input.device)
    return Reason(wrong) if wrong else None


def _result(input: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)


def dropout_add_reference(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    p: float,
    seed: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What ``dropout_add`` computes, with ATen operators, some elements at a time."""
    result = torch.empty(input.shape, dtype=_result(input, residual, dtype), device=input.device)
    exact = torch.float32
    if torch.float64 in (input.dtype, result.dtype, None if residual is None else residual.dtype):
        exact = torch.float64
    flat, into = input.reshape(-1), result.view(-1)
    beside = None if residual is None else residual.reshape(-1)
    for start in range(0, flat.numel(), _SLICE_ELEMENTS):
        stop = min(start + _SLICE_ELEMENTS, flat.numel())
        made = factors_of_elements(seed, p, start, stop, exact)
        made *= flat[start:stop]
        if beside is not None:
            made += beside[start:stop]
        into[start:stop] = made
    return result
