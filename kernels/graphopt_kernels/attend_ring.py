"""Attention with a sliding window over a store that keeps the last positions alone.

Position p is kept in slot ``p % W`` until position ``p + W`` takes its place. ``graphopt::attend_ring``
computes what ``graphopt::attend_full`` computes with the same window; W is at least the window, so nothing
that a row may read is gone, however long the sequence is.
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

__all__ = ["attend_ring", "attend_ring_reference", "attend_ring_supports"]


@torch.library.custom_op("graphopt::attend_ring", mutates_args=("key_store", "value_store"))
def attend_ring(
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
    """[B, H, n, Dv] of ``query`` [B, H, n, D] over the last positions, dense.

    ``key`` [B, Hkv, n, D] and ``value`` [B, Hkv, n, Dv] are of consecutive ``positions`` int64 [n], those
    right behind what the stores [at least B, Hkv, W, D or Dv] hold; they are written where they are not
    overtaken by later ones of the same call. ``None``, for one row alone: they are there already, the newest
    that the stores hold. ``valid`` is by position, as for ``graphopt::attend_full``; 0 < ``window`` <= W.
    There is no gradient.
    """
    kernels = None
    if query.shape[2] == positions.shape[0]:
        kernels = kernels_for(query, key_store, value_store)
    if kernels is not None:
        return attend_on_gpu(
            kernels, query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale,
            softcap, window, length, ring=True,
        )  # fmt: skip
    return attend_ring_reference(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window,
        length,
    )  # fmt: skip


state_scratch("graphopt::attend_ring", attend_scratch)


@attend_ring.register_fake
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
    reason = attend_ring_supports(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window
    )
    if reason is not None:
        raise ValueError(f"attend_ring: {reason}")
    return query.new_empty((*query.shape[:3], value_store.shape[3]))


def attend_ring_supports(
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
    if (key is None or value is None) and positions.shape[0] != 1:
        return Reason("a ring that was written already has lost what the first of several rows may read")
    if not 0 < window <= key_store.shape[2]:
        return Reason(f"the window is {window}: expected 1 to {key_store.shape[2]}, what the store holds")
    return attend_supports(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window
    )


def attend_ring_reference(
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
    """What ``attend_ring`` does, with ATen operators."""
    batch, rows, slots = query.shape[0], positions.shape[0], key_store.shape[2]
    keys, values = key_store[:batch], value_store[:batch]
    kept = min(rows, slots)
    if rows == 1:
        # What the row overwrites is out of its own window: no second copy of the ring is needed.
        if key is not None and value is not None:
            _write(keys, values, key, value, positions)
        key_positions = _positions_in(positions[-1], slots)
        held, given = keys.to(query.dtype), values.to(query.dtype)
    else:
        assert key is not None and value is not None
        key_positions = torch.cat([_positions_in(positions[0] - 1, slots), positions])
        held = torch.cat([keys.to(query.dtype), key], 2)
        given = torch.cat([values.to(query.dtype), value], 2)
    allowed = allowed_keys(asked_at(query, positions), key_positions, valid, batch, window)
    bias = None
    if slopes is not None:
        bias = slopes.float()[None, :, None, None] * places_of(key_positions, valid, batch)[:, None, None]
    output = attention_over(query, held, given, allowed, bias, sinks, scale, softcap)
    if rows > 1:
        assert key is not None and value is not None
        _write(keys, values, key[:, :, rows - kept :], value[:, :, rows - kept :], positions[rows - kept :])
    return output


def _write(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
) -> None:
    slots = positions.remainder(keys.shape[2])
    keys.index_copy_(2, slots, key.to(keys.dtype))
    values.index_copy_(2, slots, value.to(values.dtype))


def _positions_in(last: torch.Tensor, slots: int) -> torch.Tensor:
    """The position that each slot holds where ``last`` was written last, negative where none is."""
    return last - (last - torch.arange(slots, device=last.device)).remainder(slots)
