"""Attention over a store that keeps every position.

``graphopt::attend_full`` writes the keys and values of new rows into the stores at their positions, in place,
and attends with the queries of these rows over what the stores then hold (``attend_reference`` says what that
is). Positions are in a tensor: a step of decoding is the same launch at every position, with no word from the
host.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.operator_scratch import state_scratch
from graphopt_kernels.attend_launch import attend_on_gpu, attend_scratch, kernels_for
from graphopt_kernels.attend_reference import (
    allowed_keys,
    asked_at,
    attend_supports,
    attention_over,
    places_of,
)

__all__ = ["attend_full", "attend_full_reference", "attend_full_supports"]


@torch.library.custom_op("graphopt::attend_full", mutates_args=("key_store", "value_store"))
def attend_full(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
) -> torch.Tensor:
    """[B, H, n, Dv] of ``query`` [B, H, n, D] over what the stores hold, dense.

    ``query`` may be of the last row alone, [B, H, 1, D], of several new ones.
    ``key`` [B, Hkv, n, D] and ``value`` [B, Hkv, n, Dv] go to ``positions`` int64 [n], which ascend, of the
    stores [at least B, Hkv, capacity, D or Dv]; ``None``: they are there already, as where layers share a
    store. ``valid`` bool [at least B, capacity]: which positions are no padding. ``length``: no position is
    at or beyond it, so that no more of the store needs to be read. ``slopes``, ``sinks`` [H]. There is no
    gradient.
    """
    kernels = None
    if query.shape[2] == positions.shape[0]:
        kernels = kernels_for(query, key_store, value_store)
    if kernels is not None:
        return attend_on_gpu(
            kernels, query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale,
            softcap, window, length, ring=False,
        )  # fmt: skip
    return attend_full_reference(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window,
        length,
    )  # fmt: skip


state_scratch("graphopt::attend_full", attend_scratch)


@attend_full.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
) -> torch.Tensor:
    reason = attend_full_supports(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window
    )
    if reason is not None:
        raise ValueError(f"attend_full: {reason}")
    return query.new_empty((*query.shape[:3], value_store.shape[3]))


def attend_full_supports(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    *_: Any,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    return attend_supports(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window
    )


def attend_full_reference(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
) -> torch.Tensor:
    """What ``attend_full`` does, with ATen operators."""
    batch = query.shape[0]
    keys, values = key_store[:batch], value_store[:batch]
    if key is not None and value is not None:
        keys.index_copy_(2, positions, key.to(keys.dtype))
        values.index_copy_(2, positions, value.to(values.dtype))
    if positions.device.type == "cpu":
        # Free to look at here; on an accelerator it would hold up the host.
        length = min(length, int(positions[-1]) + 1)
    keys, values = keys[:, :, :length], values[:, :, :length]
    key_positions = torch.arange(length, device=positions.device)
    allowed = allowed_keys(asked_at(query, positions), key_positions, valid, batch, window)
    bias = None
    if slopes is not None:
        bias = slopes.float()[None, :, None, None] * places_of(key_positions, valid, batch)[:, None, None]
    return attention_over(
        query, keys.to(query.dtype), values.to(query.dtype), allowed, bias, sinks, scale, softcap
    )
