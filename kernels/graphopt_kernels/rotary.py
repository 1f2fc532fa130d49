"""Rotary position embeddings of the heads of queries and keys, out of one packed projection or alone.

Pairs of elements of a head are turned by angles that grow with its position (Su et al. 2021, "RoFormer")::

    y_i = x_i * cos_i - x_j * sin_i          y_j = x_j * cos_j + x_i * sin_j

The first ``width`` elements of a head are turned, the others stay. ``i`` and ``j`` are ``width / 2`` apart
(GPT-NeoX, Llama), or next to each other where pairs are ``interleaved`` (GPT-J). With ``eps`` each head is
first divided by its root mean square and multiplied by a weight (QK-norm, Henry et al. 2020)::

    x = h / sqrt(mean(h^2) + eps) * (weight + weight_offset)

``input`` [B, S, N, D] is read by its strides: a view of what a projection gave will do. Its N heads are
``groups`` times ``queries`` heads of queries, ``keys`` of keys and ``values`` of values, in a row::

    heads = (1, 32, 8, 8)     q0 ... q31 k0 ... k7 v0 ... v7      Llama, Phi-3
    heads = (32, 1, 1, 1)     q0 k0 v0 q1 k1 v1 ...               GPT-NeoX
    heads = (32, 1, 0, 0)     queries (or keys) alone

The backward turns gradients the other way round and writes the gradient of ``input`` as a whole, so that
nothing has to be put together before the products that make the projection's gradients. Nothing is kept for
it but the tables and, with a norm, ``input``: the norm's statistics are made again from the rows, which are
read anyway.

Arithmetic is float32 (float64 for float64) and rounded once. Results are the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.rotary_launch import backward_rows, forward_rows, kernels_for
from graphopt_kernels.rotary_reference import (
    empty_weights,
    given_gradient,
    rotary_backward_reference,
    rotary_reference,
)

__all__ = [
    "rotary",
    "rotary_backward",
    "rotary_backward_supports",
    "rotary_supports",
    "supports_turn",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@torch.library.custom_op("graphopt::rotary", mutates_args=())
def rotary(
    input: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    copies_values: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turned queries and keys of ``dtype`` and, with ``copies_values``, values of the input's dtype,
    [B, S, heads, D] each and dense.

    ``cos`` and ``sin`` [S, R] or [B or 1, S, R] hold a number for each of the ``width`` elements or, with R =
    ``width / 2``, for each pair. ``eps``: ``None`` where there is no norm. Weights [D]. Parts that there are
    none of have no heads.
    """
    if (kernels := kernels_for(input, cos)) is not None:
        return forward_rows(
            kernels, input, cos, sin, query_weight, key_weight, heads, width, interleaved, eps, weight_offset,
            copies_values, dtype,
        )  # fmt: skip
    return rotary_reference(
        input, cos, sin, query_weight, key_weight, heads, width, interleaved, eps, weight_offset,
        copies_values, dtype,
    )  # fmt: skip


@rotary.register_fake
def _(
    input: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    copies_values: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    reason = rotary_supports(input, cos, sin, query_weight, key_weight, heads, width, interleaved, eps)
    if reason is not None:
        raise ValueError(f"rotary: {reason}")
    batch, length, _, size = input.shape
    groups, queries, keys, values = heads
    return (
        input.new_empty((batch, length, groups * queries, size), dtype=dtype),
        input.new_empty((batch, length, groups * keys, size), dtype=dtype),
        input.new_empty((batch, length, groups * values if copies_values else 0, size)),
    )


@torch.library.custom_op("graphopt::rotary_backward", mutates_args=())
def rotary_backward(
    d_query: torch.Tensor | None,
    d_key: torch.Tensor | None,
    d_value: torch.Tensor | None,
    input: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input [B, S, N, D], of ``dtype`` and dense, and of both weights.

    Gradients [B, S, heads, D] that are ``None`` are zero; one is given. ``input`` is needed with ``eps``
    alone. Gradients that ``output_mask`` leaves out, or that have no weight, have no elements.
    """
    if (kernels := kernels_for(given_gradient(d_query, d_key, d_value), cos, dtype)) is not None:
        return backward_rows(
            kernels, d_query, d_key, d_value, input, cos, sin, query_weight, key_weight, heads, width,
            interleaved, eps, weight_offset, dtype, output_mask,
        )  # fmt: skip
    return rotary_backward_reference(
        d_query, d_key, d_value, input, cos, sin, query_weight, key_weight, heads, width, interleaved, eps,
        weight_offset, dtype, output_mask,
    )  # fmt: skip


@rotary_backward.register_fake
def _(
    d_query: torch.Tensor | None,
    d_key: torch.Tensor | None,
    d_value: torch.Tensor | None,
    input: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    reason = rotary_backward_supports(
        d_query, d_key, d_value, input, cos, sin, query_weight, key_weight, heads, width, interleaved, eps
    )
    if reason is not None:
        raise ValueError(f"rotary_backward: {reason}")
    given = given_gradient(d_query, d_key, d_value)
    batch, length, _, size = given.shape
    whole = (batch, length, heads[0] * sum(heads[1:]), size)
    return (
        given.new_empty(whole if output_mask[0] else (0,), dtype=dtype),
        *empty_weights(given, query_weight, key_weight, output_mask),
    )


# --- autograd ----------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    input, cos, sin, query_weight, key_weight, *settings = inputs
    heads, width, interleaved, eps, weight_offset, copies_values, _ = settings
    ctx.copies_values = copies_values
    ctx.save_for_backward(None if eps is None else input, cos, sin, query_weight, key_weight)
    ctx.settings = (heads, width, interleaved, eps, weight_offset, input.dtype)
    ctx.set_materialize_grads(False)


def _turn_back(
    ctx: Any, d_query: torch.Tensor | None, d_key: torch.Tensor | None, d_value: torch.Tensor | None
) -> tuple[Any, ...]:
    of_input, of_cos, of_sin, of_query, of_key = ctx.needs_input_grad[:5]
    if of_cos or of_sin:
        raise NotImplementedError(
            "rotary: cos and sin are tables without a gradient, got tables that require one; detach them"
        )
    if not ctx.copies_values:
        d_value = None
    if d_query is None and d_key is None and d_value is None:
        return (None,) * 12
    input, cos, sin, query_weight, key_weight = ctx.saved_tensors
    mask = [of_input, of_query, of_key]
    found = torch.ops.graphopt.rotary_backward(
        d_query, d_key, d_value, input, cos, sin, query_weight, key_weight, *ctx.settings, mask
    )
    d_input, d_query_weight, d_key_weight = (
        gradient if wanted else None for gradient, wanted in zip(found, mask, strict=True)
    )
    return d_input, None, None, d_query_weight, d_key_weight, *(None,) * 7


torch.library.register_autograd("graphopt::rotary", _turn_back, setup_context=_keep)


# --- what is taken -----------------------------------------------------------------------------


def rotary_supports(
    input: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    *_: Any,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if input.dim() != 4:
        return Reason(f"takes heads [B, S, N, D], got {input.dim()} dimensions")
    if input.dtype not in _DTYPES:
        return Reason(f"takes floating-point heads, got {input.dtype}")
    if len(heads) != 4 or heads[0] * sum(heads[1:]) != input.shape[2]:
        return Reason(
            f"groups, queries, keys and values {list(heads)} are not the {input.shape[2]} heads of the input"
        )
    return supports_turn(input, cos, sin, query_weight, key_weight, width, eps)


def rotary_backward_supports(
    d_query: torch.Tensor | None,
    d_key: torch.Tensor | None,
    d_value: torch.Tensor | None,
    input: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    *_: Any,
) -> Reason | None:
    """As ``rotary_supports``; gradients have the shapes of the results."""
    gradients = [gradient for gradient in (d_query, d_key, d_value) if gradient is not None]
    if not gradients:
        return Reason("takes one gradient or more, got none")
    given = gradients[0]
    if given.dim() != 4:
        return Reason(f"takes gradients [B, S, heads, D], got {given.dim()} dimensions")
    for name, gradient, count in zip(
        ("queries", "keys", "values"), (d_query, d_key, d_value), heads[1:], strict=True
    ):
        shape = (*given.shape[:2], heads[0] * count, given.shape[3])
        if gradient is not None and gradient.shape != shape:
            return Reason(f"the gradient of {name} has shape {list(gradient.shape)}: expected {list(shape)}")
    if eps is not None and input is None:
        return Reason("the gradient of a norm takes its input, got none")
    return supports_turn(given, cos, sin, query_weight, key_weight, width, eps)


def supports_turn(
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    width: int,
    eps: float | None,
) -> Reason | None:
    """``None``, or why heads ``rows`` [B, S, N, D] are not turned with these tables and weights."""
    batch, length, _, size = rows.shape
    if width % 2 or not 0 < width <= size:
        return Reason(f"turns an even number of up to {size} elements of a head, got {width}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in _DTYPES:
            return Reason(f"takes floating-point tables, got {name} of {table.dtype}")
        if (
            table.dim() not in (2, 3)
            or table.shape[-2] != length
            or table.shape[-1] not in (width, width // 2)
        ):
            return Reason(
                f"{name} has shape {list(table.shape)}: expected [{length}, {width}] or "
                f"[{length}, {width // 2}], for each sample or for all"
            )
        if table.dim() == 3 and table.shape[0] != batch and table.shape[0] != 1:
            return Reason(f"{name} is of {table.shape[0]} samples: expected {batch} or 1")
    if cos.shape[-1] != sin.shape[-1] or cos.dtype is not sin.dtype:
        return Reason(f"cos and sin differ: {cos.dtype} {list(cos.shape)} and {sin.dtype} {list(sin.shape)}")
    for name, weight in (("queries", query_weight), ("keys", key_weight)):
        if weight is not None and eps is None:
            return Reason(f"there is a weight of {name} and no norm")
        if weight is not None and (weight.dim() != 1 or weight.shape[0] != size):
            return Reason(f"the weight of {name} has shape {list(weight.shape)}: expected [{size}]")
        if weight is not None and weight.dtype not in _DTYPES:
            return Reason(f"takes a floating-point weight of {name}, got {weight.dtype}")
    return None
