"""Attention that holds no scores, with what libraries leave out: caps, windows, trained biases, groups.

For queries [B, H, M, D], keys [B, Hkv, N, D] and values [B, Hkv, N, Dv], ``Hkv`` a divisor of ``H``::

    s[i, j] = scale * q[i] . k[j]
    s[i, j] = softcap * tanh(s[i, j] / softcap)         where softcap is not 0
    s[i, j] = s[i, j] + bias[i, j]                      or -inf where a boolean bias is false
    s[i, j] = -inf                                      unless i - left <= j <= i + right
    output  = dropped(softmax(s)) @ v,   log_sum_exp[i] = log(sum(exp(s[i])))

``left`` and ``right`` bound how far a query sees, ``None`` where nothing does: ``right=0`` is a causal mask,
``right=N - M`` one that ends in the lower right corner, ``left=w - 1, right=0`` a window of the last ``w``
positions. Blocks of scores that lie outside are neither computed nor read.

Tiles of scores live in registers while maximum and sum of a row are kept up to date (Rabe and Staats 2021,
"Self-attention does not need O(n^2) memory"; Dao et al. 2022, "FlashAttention"). The backward computes them
again from the log-sum-exp (Dao 2023, "FlashAttention-2"): one kernel goes along the queries for keys and
values, one along the keys for queries, one for the bias, summed over what it is broadcast over. Nothing is
added to memory that another program writes: results are the same in every run.

A bias at or below -1e30 (-32752 in float16) hides as well: nothing is left of a score beside it. A row of
nothing else is even, as it is where such a number is added, its gradients good to a thousandth.

Dropout keeps a weight or not by a function of the seed, batch, head, row and column (``philox``), which both
kernels of the backward compute again: no mask is held, and results are the same for the same seed.

A row that is hidden whole by minus infinity, a boolean or its place gives zeros and a log-sum-exp of minus
infinity, as in ``scaled_dot_product_attention``, and no gradient. Keys and values outside of ``left`` and
``right`` are not read where a whole block of them is: infinities there do not show, as they do where the
softmax is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels import attention_launch
from graphopt_kernels.attention_reference import (
    arithmetic_in,
    attention_backward_reference,
    attention_reference,
    gradient_buffers,
    result_buffers,
)
from graphopt_kernels.philox import factors_of_scores, rate_reason, seed_reason

__all__ = [
    "attention",
    "attention_backward",
    "attention_backward_plain",
    "attention_backward_supports",
    "attention_plain",
    "attention_supports",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@torch.library.custom_op("graphopt::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, M, Dv] of the dtype of ``query`` and log-sum-exp [B, H, M] (see the module).

    ``query``, ``key`` and ``value`` are of one floating-point dtype; ``bias``, boolean or floating-point, is
    broadcast to [B, H, M, N]. ``scale`` is positive. Weights are dropped with probability ``dropout_p``, at
    least 0 and below 1, by the numbers of ``seed``, int64 of one element on the device of ``query``. Raises
    ``ValueError`` for other arguments.
    """
    settings = (scale, softcap, left, right, dropout_p, seed)
    if (kernels := attention_launch.kernels_for(query, value)) is not None:
        return attention_launch.forward(kernels, query, key, value, bias, *settings)
    return attention_plain(query, key, value, bias, *settings)


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    reason = attention_supports(query, key, value, bias, scale, softcap, left, right, dropout_p, seed)
    if reason is not None:
        raise ValueError(f"attention: {reason}")
    return result_buffers(query, value)


@torch.library.custom_op("graphopt::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    output_mask: Sequence[bool],
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and bias for ``grad`` [B, H, M, Dv] of the output. Those that
    ``output_mask`` leaves out have no elements; a boolean bias has none. ``dropout_p`` and ``seed`` are
    those of the forward."""
    settings = (scale, softcap, left, right, output_mask, dropout_p, seed)
    if (kernels := attention_launch.kernels_for(query, value)) is not None:
        return attention_launch.backward(
            kernels, grad, query, key, value, bias, output, log_sum_exp, *settings
        )
    return attention_backward_plain(grad, query, key, value, bias, output, log_sum_exp, *settings)


@attention_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    output_mask: Sequence[bool],
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return gradient_buffers(query, key, value, bias, output_mask)


# --- without kernels ---------------------------------------------------------------------------


def attention_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``attention`` computes, with ATen operators."""
    settings = (scale, softcap, left, right, _factors(query, dropout_p, seed))
    return attention_reference(query, key, value, bias, *settings)


def attention_backward_plain(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    output_mask: Sequence[bool],
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``attention_backward`` computes, with ATen operators."""
    settings = (scale, softcap, left, right, output_mask, _factors(query, dropout_p, seed))
    return attention_backward_reference(grad, query, key, value, bias, output, log_sum_exp, *settings)


def _factors(
    query: torch.Tensor, dropout_p: float, seed: torch.Tensor | None
) -> Callable[[slice, slice], torch.Tensor] | None:
    if dropout_p == 0.0 or seed is None:
        return None
    batch, heads = query.shape[:2]
    dtype = arithmetic_in(query.dtype)

    def factors(rows: slice, columns: slice) -> torch.Tensor:
        found = factors_of_scores(seed, dropout_p, batch * heads, rows, columns, dtype)
        return found.view(batch, heads, *found.shape[1:])

    return factors


# --- autograd ----------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output, inputs[9])
    ctx.settings = inputs[4:9]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    mask = list(ctx.needs_input_grad[:4])
    *saved, seed = ctx.saved_tensors
    *settings, dropout_p = ctx.settings
    operator = torch.ops.graphopt.attention_backward
    found = operator(grad, *saved, *settings, mask, dropout_p, seed)
    return *(g if wanted else None for g, wanted in zip(found, mask, strict=True)), *(None,) * 6


torch.library.register_autograd("graphopt::attention", _backward, setup_context=_keep)


# --- what is taken -----------------------------------------------------------------------------


def attention_supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int | None = None,
    right: int | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> Reason | None:
    """``None``, or why the operators do not take these arguments."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if tensor.dim() != 4:
            return Reason(f"the {name} has shape {list(tensor.shape)}: expected [B, heads, length, width]")
        if tensor.dtype not in _DTYPES or tensor.dtype is not query.dtype:
            return Reason(f"takes floating-point tensors of one dtype, got {tensor.dtype} for the {name}")
    batch, heads, rows, width = query.shape
    few, columns = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != width:
        return Reason(f"keys {list(key.shape)} do not fit queries {list(query.shape)}")
    if value.shape[:3] != key.shape[:3]:
        return Reason(f"values {list(value.shape)} do not fit keys {list(key.shape)}")
    if few == 0 or heads % few:
        return Reason(f"{heads} heads of queries cannot share {few} of keys evenly")
    if not width or not value.shape[3]:
        return Reason("heads have no elements")
    if not 0.0 < scale < float("inf"):
        return Reason(f"takes a scale above zero, got {scale:g}")
    if not 0.0 <= softcap < float("inf"):
        return Reason(f"takes a cap above zero, or 0 for none, got {softcap:g}")
    if wrong := rate_reason(dropout_p) or seed_reason(seed if dropout_p else None, query.device):
        return Reason(wrong)
    if dropout_p and seed is None:
        return Reason("dropout takes a seed")
    return None if bias is None else _bias_supports(bias, (batch, heads, rows, columns))


def _bias_supports(bias: torch.Tensor, whole: tuple[Any, ...]) -> Reason | None:
    if bias.dtype is not torch.bool and bias.dtype not in _DTYPES:
        return Reason(f"takes a boolean or floating-point bias, got {bias.dtype}")
    ends = whole[4 - bias.dim() :] if bias.dim() <= 4 else ()
    if bias.dim() > 4 or any(size not in (1, end) for size, end in zip(bias.shape, ends, strict=True)):
        return Reason(f"a bias of shape {list(bias.shape)} cannot be broadcast to {list(whole)}")
    return None


def attention_backward_supports(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    scale: float,
    softcap: float,
    left: int | None = None,
    right: int | None = None,
    output_mask: Sequence[bool] = (),
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> Reason | None:
    """As ``attention_supports``; gradient and output are alike."""
    expected = (*query.shape[:-1], value.shape[-1])
    for name, tensor in (("gradient", grad), ("output", output)):
        if tuple(tensor.shape) != expected:
            return Reason(f"the {name} has shape {list(tensor.shape)}: expected {list(expected)}")
    return attention_supports(query, key, value, bias, scale, softcap, left, right, dropout_p, seed)
