"""Attention over a store that keeps every position.

``graphopt::attend_full`` writes the keys and values of new rows into the stores at their positions, in place,
and attends with the queries of these rows over what the stores then hold (``attend_reference`` says what that
is). Positions are in a tensor: a step of decoding is the same launch at every position, with no word from the
host.
"""

from __future__ import annotations

import torch

from graphopt_kernels.attend_launch import attend_scratch, new_rows_on_gpu
from graphopt_kernels.attend_operator import Asked, AttendOperator, NoConstants, RowStores
from graphopt_kernels.attend_reference import attend_refuses, attention_at, rows_written

__all__ = ["attend_full", "read_full"]


def read_full(asked: Asked, stores: RowStores) -> torch.Tensor:
    """[B, H, n, Dv] of the queries over what ``stores`` hold once the new rows are written, dense."""
    keys, values = rows_written(asked, stores)
    key_positions = torch.arange(keys.shape[2], device=asked.positions.device)
    dtype = asked.query.dtype
    return attention_at(asked, keys.to(dtype), values.to(dtype), key_positions)


attend_full = AttendOperator(
    "attend_full",
    RowStores,
    NoConstants,
    summary="writes new keys and values into stores of all positions, and attends over them",
    reference=lambda asked, stores, _: read_full(asked, stores),
    refuses=lambda asked, stores, _: attend_refuses(asked, *stores),
    value_width=lambda stores, _: stores.value_store.shape[3],
    launch=lambda asked, stores, _: new_rows_on_gpu(asked, stores, ring=False),
    scratch=attend_scratch,
)
