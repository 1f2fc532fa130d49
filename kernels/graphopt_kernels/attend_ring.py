"""Attention with a sliding window over a store that keeps the last positions alone.

Position p is kept in slot ``p % W`` until position ``p + W`` takes its place. ``graphopt::attend_ring``
computes what ``graphopt::attend_full`` computes with the same window; W is at least the window, so nothing
that a row may read is gone, however long the sequence is.

New rows are of consecutive positions, those right behind what the stores hold; they are written where they
are not overtaken by later ones of the same call. Where keys and values are ``None``, which goes for one row
alone, the newest that the stores hold are its own.
"""

from __future__ import annotations

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_launch import attend_scratch, new_rows_on_gpu
from graphopt_kernels.attend_operator import Asked, AttendOperator, NoConstants, RowStores
from graphopt_kernels.attend_reference import attend_refuses, attention_at

__all__ = ["attend_ring"]


def _reference(asked: Asked, stores: RowStores, _: NoConstants) -> torch.Tensor:
    query, key, value, positions = asked[:4]
    rows, slots = positions.shape[0], stores.key_store.shape[2]
    keys, values = (store[: query.shape[0]] for store in stores)
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
    output = attention_at(asked, held, given, key_positions)
    if rows > 1:
        assert key is not None and value is not None
        _write(keys, values, key[:, :, rows - kept :], value[:, :, rows - kept :], positions[rows - kept :])
    return output


def _refuses(asked: Asked, stores: RowStores, _: NoConstants) -> Reason | None:
    if (asked.key is None or asked.value is None) and asked.positions.shape[0] != 1:
        return Reason("a ring that was written already has lost what the first of several rows may read")
    slots = stores.key_store.shape[2]
    if not 0 < asked.window <= slots:
        return Reason(f"the window is {asked.window}: expected 1 to {slots}, what the store holds")
    return attend_refuses(asked, *stores)


attend_ring = AttendOperator(
    "attend_ring",
    RowStores,
    NoConstants,
    summary="writes new keys and values into stores of a window's positions, and attends over them",
    reference=_reference,
    refuses=_refuses,
    value_width=lambda stores, _: stores.value_store.shape[3],
    launch=lambda asked, stores, _: new_rows_on_gpu(asked, stores, ring=True),
    scratch=attend_scratch,
)


def _write(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
) -> None:
    slots = positions.remainder(keys.shape[2])
    keys.index_copy_(2, slots, key.to(keys.dtype))
    values.index_copy_(2, slots, value.to(values.dtype))


def _positions_in(last: torch.Tensor, slots: int) -> torch.Tensor:
    """The position that each slot holds where ``last`` was written last, negative where none is."""
    return last - (last - torch.arange(slots, device=last.device)).remainder(slots)
