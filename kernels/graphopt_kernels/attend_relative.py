"""Attention over a store that keeps every position, with a bias that says how far a key is.

As ``attend_full``, but::

    s[q, k] += table[head, position[q] - position[k]]

T5's learned biases (Raffel et al. 2020) are of that kind. ``slopes`` is ``None``: biases are all in the
table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_operator import Asked, AttendOperator, RowStores
from graphopt_kernels.attend_reference import (
    allowed_keys,
    asked_at,
    attend_refuses,
    attention_over,
    rows_written,
)

__all__ = ["Distances", "attend_relative"]


class Distances(NamedTuple):
    """``table`` float32 [H, at least capacity]: what is added to the score of a key that is so many positions
    before its query."""

    table: torch.Tensor


def _reference(asked: Asked, stores: RowStores, distances: Distances) -> torch.Tensor:
    query, positions = asked.query, asked.positions
    keys, values = rows_written(asked, stores)
    key_positions = torch.arange(keys.shape[2], device=positions.device)
    rows = asked_at(query, positions)
    allowed = allowed_keys(rows, key_positions, asked.valid, query.shape[0], asked.window)
    # Keys behind the query are not read, whatever is added to them.
    distance = (rows[:, None] - key_positions).clamp(min=0)
    bias = distances.table[:, distance][None]
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    return attention_over(query, keys, values, allowed, bias, asked.sinks, asked.scale, asked.softcap)


def _refuses(asked: Asked, stores: RowStores, distances: Distances) -> Reason | None:
    reason = attend_refuses(asked, *stores)
    if reason is not None:
        return reason
    if asked.slopes is not None:
        return Reason("slopes are given: what is added by distance is in the table")
    table, heads, places = distances.table, asked.query.shape[1], stores.key_store.shape[2]
    if table.dtype is not torch.float32 or table.dim() != 2 or table.shape[0] != heads:
        return Reason(
            f"the table is {table.dtype} {list(table.shape)}: expected torch.float32 [{heads}, {places}]"
        )
    if table.shape[1] < places:
        return Reason(f"the table has {table.shape[1]} distances, the stores {places} positions")
    return None


attend_relative = AttendOperator(
    "attend_relative",
    RowStores,
    Distances,
    summary="attends over stores of all positions with a bias of how far a key is",
    reference=_reference,
    refuses=_refuses,
    value_width=lambda stores, _: stores.value_store.shape[3],
)
