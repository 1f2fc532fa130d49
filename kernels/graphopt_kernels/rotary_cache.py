"""Rotary embeddings of a packed projection, its keys and values written where a cache holds them.

``graphopt::rotary_to_cache`` turns queries and keys as ``graphopt::rotary`` does
(``graphopt_kernels.rotary``) and writes keys and values into caches [B, heads, L, D] in place, at the
positions that it is given: a decoder in inference neither writes keys anywhere else first nor copies values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.rotary import rotary_supports
from graphopt_kernels.rotary_launch import cached_rows, kernels_for
from graphopt_kernels.rotary_reference import rotary_reference
from graphopt_kernels.stated_operator import state_operator

__all__ = ["rotary_to_cache", "rotary_to_cache_reference", "rotary_to_cache_supports"]


def rotary_to_cache_supports(
    input: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
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
    reason = rotary_supports(input, cos, sin, query_weight, key_weight, heads, width, interleaved, eps)
    if reason is not None:
        return reason
    (batch, length), size = input.shape[:2], input.shape[3]
    groups, keys, values = heads[0], *heads[2:]
    for name, cache, count in (("keys", key_cache, keys), ("values", value_cache, values)):
        if cache.dim() != 4 or [*cache.shape[:2], cache.shape[3]] != [batch, groups * count, size]:
            return Reason(
                f"the cache of {name} has shape {list(cache.shape)}: "
                f"expected [{batch}, {groups * count}, positions, {size}]"
            )
    if key_cache.shape[2] != value_cache.shape[2]:
        return Reason(
            f"caches hold {key_cache.shape[2]} and {value_cache.shape[2]} positions: expected as many"
        )
    if not key_cache.is_floating_point():
        return Reason(f"takes a floating-point cache of keys, got {key_cache.dtype}")
    if value_cache.dtype is not input.dtype:
        return Reason(f"the cache of values is {value_cache.dtype}: expected {input.dtype}")
    if positions.dtype not in (torch.int64, torch.int32) or tuple(positions.shape) != (length,):
        return Reason(
            f"positions are {positions.dtype} {list(positions.shape)}: expected integers of shape [{length}]"
        )
    return None


def rotary_to_cache_reference(
    input: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
) -> torch.Tensor:
    """Turned queries [B, S, heads, D] of the dtype of ``key_cache``, dense.

    Keys and values of position ``s`` go to ``positions[s]`` of the caches [B, heads, L, D]; ``positions`` [S]
    are different integers. One outside of the cache raises on the CPU; on CUDA nothing is written, and its
    queries are NaN. Other arguments as for ``graphopt::rotary``. There is no gradient.
    """
    query, key, value = rotary_reference(
        input, cos, sin, query_weight, key_weight, heads, width, interleaved, eps, weight_offset, True,
        key_cache.dtype,
    )  # fmt: skip
    key_cache.index_copy_(2, positions.long(), key.transpose(1, 2))
    value_cache.index_copy_(2, positions.long(), value.transpose(1, 2))
    return query


def _launch(*given: Any) -> torch.Tensor | None:
    input, key_cache, value_cache, _, cos = given[:5]
    kernels = kernels_for(input, cos, key_cache.dtype)
    if kernels is None or not key_cache.stride(3) == value_cache.stride(3) == 1:
        return None
    return cached_rows(kernels, *given)


def _output(input: torch.Tensor, key_cache: torch.Tensor, *rest: Any) -> torch.Tensor:
    heads = rest[6]
    batch, length, _, size = input.shape
    return input.new_empty((batch, length, heads[0] * heads[1], size), dtype=key_cache.dtype)


rotary_to_cache = state_operator(
    "rotary_to_cache",
    rotary_to_cache_reference,
    mutates=("key_cache", "value_cache"),
    refuses=rotary_to_cache_supports,
    output=_output,
    launch=_launch,
)
