"""Makes the two operators of a scheme: what unpacks a weight, and the product that reads it packed.

Every scheme has the same: a fake result, a gradient for the input and the bias, none for packed tensors, an
implementation for every device. Only arithmetic differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.operator_scratch import state_scratch

__all__ = ["define_operators"]


def define_operators(
    name: str,
    tensors: Sequence[str],
    constants: Sequence[str],
    *,
    unpack: Callable[..., torch.Tensor],
    linear: Callable[..., torch.Tensor],
    shape: Callable[..., tuple[Any, Any]],
    scratch: Callable[..., int],
    unpack_scratch: Callable[..., int] | None = None,
) -> None:
    """Registers ``graphopt::unpack_<name>`` and ``graphopt::linear_<name>``.

    ``tensors`` are the names of packed tensors, ``constants`` the schemas of what else the operators take
    (``"int group"``). ``unpack(*tensors, *constants, dtype)`` gives the weight [N, K], contiguous;
    ``linear(x, *tensors, bias, *constants)`` the product [..., N] of the dtype of ``x``, contiguous, of
    memory of its own, for any number of rows, none included, and any strides of ``x``; ``shape(*tensors,
    *constants)`` is N and K, of fake tensors too; ``scratch`` is told to ``graphopt.operator_scratch`` of the
    product, ``unpack_scratch`` of unpacking where that takes memory beside the weight. The gradient with
    respect to x is that of the unpacked weight: ``grad @ unpack(...)``, in the dtype of ``grad``.
    """
    packed = [f"Tensor {tensor}" for tensor in tensors]
    count = len(tensors)
    unpack_name, linear_name = f"graphopt::unpack_{name}", f"graphopt::linear_{name}"
    state_scratch(linear_name, scratch)
    if unpack_scratch is not None:
        state_scratch(unpack_name, unpack_scratch)
    unpack_schema = ", ".join([*packed, *constants, "ScalarType dtype"])
    linear_schema = ", ".join(["Tensor x", *packed, "Tensor? bias", *constants])
    unpack_op = torch.library.custom_op(
        unpack_name, unpack, mutates_args=(), schema=f"({unpack_schema}) -> Tensor"
    )
    linear_op = torch.library.custom_op(
        linear_name, linear, mutates_args=(), schema=f"({linear_schema}) -> Tensor"
    )

    @unpack_op.register_fake
    def _(*arguments: Any) -> torch.Tensor:
        *inner, dtype = arguments
        first: torch.Tensor = inner[0]
        return first.new_empty(shape(*inner), dtype=dtype)

    @linear_op.register_fake
    def _(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        inner = (*arguments[:count], *arguments[count + 1 :])
        return x.new_empty((*x.shape[:-1], shape(*inner)[0]))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[1 : 1 + count])
        ctx.biased, ctx.constants = inputs[1 + count] is not None, inputs[2 + count :]

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            overload = getattr(torch.ops.graphopt, f"unpack_{name}").default
            d_x = grad @ overload(*ctx.saved_tensors, *ctx.constants, grad.dtype)
        if ctx.biased and ctx.needs_input_grad[1 + count]:
            d_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        return d_x, *(None,) * count, d_bias, *(None,) * len(constants)

    torch.library.register_autograd(linear_name, backward, setup_context=keep)
