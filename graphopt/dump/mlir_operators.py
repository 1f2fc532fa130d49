"""What operators of torch are taken apart into for MLIR where torch-mlir's own table does not do.

Attention on the CPU: torch's decomposition returns the weights of attention in the place of the logarithms
of their sums, so that no backward can follow it, and the backward has none. Here, for query [B, H, L, D],
key and value [B, G, S, D] with H a multiple of G::

    weights   = softmax(scale * query @ key.T + mask)             (float32 where inputs are half precision)
    output    = weights @ value
    gradients = those of Dao et al., "FlashAttention", 2022, appendix B.2, weights computed again

A view: values of MLIR have no strides, and what an operator is taken apart into may leave others than the
operator does, so that a view of its result is a reshape here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["operators_apart"]

_Optional = torch.Tensor | None


def operators_apart() -> dict[Any, Callable[..., Any]]:
    """Functions that do what operators do with others, by overload."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
        aten.view.default: _view,
    }


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: _Optional = None,
    scale: float | None = None,
) -> Any:
    """Attention and the logarithms [B, H, L] of the sums of its weights."""
    if dropout_p:
        return NotImplemented
    scores = _scores(query, key, is_causal, attn_mask, scale)
    most = scores.amax(-1, keepdim=True)
    weights = (scores - most).exp()
    total = weights.sum(-1, keepdim=True)
    output = ((weights / total) @ _as_many(value, query).to(weights.dtype)).to(query.dtype)
    return output, (most + total.log()).squeeze(-1)


def _attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: _Optional = None,
    scale: float | None = None,
) -> Any:
    """Gradients of query, key and value."""
    if dropout_p:
        return NotImplemented
    weights = (_scores(query, key, is_causal, attn_mask, scale) - logsumexp.unsqueeze(-1)).exp()
    given = grad_out.to(weights.dtype)
    towards = given @ _as_many(value, query).to(weights.dtype).transpose(-2, -1)
    mean = (given * out.to(weights.dtype)).sum(-1, keepdim=True)
    scores = weights * (towards - mean) * _factor(query, scale)
    of_query = scores @ _as_many(key, query).to(weights.dtype)
    of_key = scores.transpose(-2, -1) @ query.to(weights.dtype)
    of_value = weights.transpose(-2, -1) @ given
    return (
        of_query.to(query.dtype),
        _summed(of_key, key).to(key.dtype),
        _summed(of_value, value).to(value.dtype),
    )


def _scores(
    query: torch.Tensor, key: torch.Tensor, is_causal: bool, attn_mask: _Optional, scale: float | None
) -> torch.Tensor:
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    scores = query.to(dtype) @ _as_many(key, query).to(dtype).transpose(-2, -1) * _factor(query, scale)
    if is_causal:
        rows = torch.arange(query.shape[-2], device=query.device).unsqueeze(-1)
        columns = torch.arange(key.shape[-2], device=query.device).unsqueeze(0)
        scores = torch.where(columns <= rows, scores, -torch.inf)
    if attn_mask is not None:
        scores = scores + attn_mask.to(dtype)
    return scores


def _factor(query: torch.Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _as_many(few: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, G, S, D] as [B, H, S, D], each for the queries that share it."""
    batch, groups, length, width = few.shape
    shared = query.shape[1] // groups
    if shared == 1:
        return few
    return few.unsqueeze(2).expand(batch, groups, shared, length, width).reshape(batch, -1, length, width)


def _summed(gradient: torch.Tensor, few: torch.Tensor) -> torch.Tensor:
    """A gradient [B, H, S, D] summed over the queries that share a key or value [B, G, S, D]."""
    batch, groups, length, width = few.shape
    if gradient.shape[1] == groups:
        return gradient
    return gradient.reshape(batch, groups, -1, length, width).sum(2)


def _view(x: torch.Tensor, size: Any) -> Any:
    # The operator itself where it can be called; a copy without strides of its own where it might not.
    return NotImplemented if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format).view(size)
