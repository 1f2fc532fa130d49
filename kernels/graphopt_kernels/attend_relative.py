"""Attention over a store that keeps every position, with a bias that says how far a key is.

As ``attend_full``, but::

    s[q, k] += table[head, position[q] - position[k]]

T5's learned biases (Raffel et al. 2020) are of that kind.
"""

from __future__ import annotations

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_reference import allowed_keys, asked_at, attend_supports, attention_over

__all__ = ["attend_relative", "attend_relative_reference", "attend_relative_supports"]


@torch.library.custom_op("graphopt::attend_relative", mutates_args=("key_store", "value_store"))
def attend_relative(
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
    table: torch.Tensor,
) -> torch.Tensor:
    """[B, H, n, Dv] of ``query`` [B, H, n, D] over what the stores hold, dense.

    ``table`` float32 [H, at least capacity]: what is added to the score of a key that is so many positions
    before its query. ``slopes`` is ``None``: biases are all in the table. All else as for
    ``graphopt::attend_full``. There is no gradient.
    """
    return attend_relative_reference(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window,
        length, table,
    )  # fmt: skip


@attend_relative.register_fake
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
    table: torch.Tensor,
) -> torch.Tensor:
    reason = attend_relative_supports(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window,
        length, table,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"attend_relative: {reason}")
    return query.new_empty((*query.shape[:3], value_store.shape[3]))


def attend_relative_supports(
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
    table: torch.Tensor,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    reason = attend_supports(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window
    )
    if reason is not None:
        return reason
    if slopes is not None:
        return Reason("slopes are given: what is added by distance is in the table")
    places = key_store.shape[2]
    if table.dtype is not torch.float32 or table.dim() != 2 or table.shape[0] != query.shape[1]:
        return Reason(
            f"the table is {table.dtype} {list(table.shape)}: expected torch.float32 [{query.shape[1]}, "
            f"{places}]"
        )
    if table.shape[1] < places:
        return Reason(f"the table has {table.shape[1]} distances, the stores {places} positions")
    return None


def attend_relative_reference(
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
    table: torch.Tensor,
) -> torch.Tensor:
    """What ``attend_relative`` does, with ATen operators."""
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
    rows = asked_at(query, positions)
    allowed = allowed_keys(rows, key_positions, valid, batch, window)
    # Keys behind the query are not read, whatever is added to them.
    distance = (rows[:, None] - key_positions).clamp(min=0)
    bias = table[:, distance][None]
    return attention_over(
        query, keys.to(query.dtype), values.to(query.dtype), allowed, bias, sinks, scale, softcap
    )
