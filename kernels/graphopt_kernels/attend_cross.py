"""Attention over a store that keeps the rows of a source: what an encoder gave, which is written once.

``graphopt::attend_cross`` attends with the queries of new rows over all rows of the source that count. It
writes nothing: keys and values of the source are in the stores before the first step. Where the source ends
is in a tensor, as positions are: a step is the same launch however long a source is.

``positions`` int64 [1] is the last row of the source, those behind it are of an earlier one; ``valid`` bool
[at least B, rows] says which rows of the source may be read; ``length``: the source has no row at or beyond
it. ``key``, ``value`` and ``slopes`` are ``None`` and ``window`` is 0: they stand where operators of other
stores take them.
"""

from __future__ import annotations

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_launch import attend_on_gpu, attend_scratch, kernels_for
from graphopt_kernels.attend_operator import Asked, AttendOperator, NoConstants, RowStores
from graphopt_kernels.attend_reference import attend_refuses, attention_over

__all__ = ["attend_cross"]


def _reference(asked: Asked, stores: RowStores, _: NoConstants) -> torch.Tensor:
    query, positions = asked.query, asked.positions
    rows = min(asked.length, stores.key_store.shape[2])
    if positions.device.type == "cpu":
        # Free to look at here; on an accelerator it would hold up the host.
        rows = min(rows, int(positions[-1]) + 1)
    keys, values = (store[: query.shape[0], :, :rows].to(query.dtype) for store in stores)
    allowed = (torch.arange(rows, device=positions.device) <= positions[-1:])[None, None, None]
    if asked.valid is not None:
        allowed = allowed & asked.valid[: query.shape[0], None, None, :rows]
    return attention_over(query, keys, values, allowed, None, asked.sinks, asked.scale, asked.softcap)


def _refuses(asked: Asked, stores: RowStores, _: NoConstants) -> Reason | None:
    query, positions = asked.query, asked.positions
    if asked.key is not None or asked.value is not None:
        return Reason("keys and values are given: those of a source are in the stores before the first step")
    if asked.slopes is not None or asked.window:
        return Reason("slopes or a window are given: a source is read whole")
    if list(positions.shape) != [1]:
        return Reason(f"positions are {list(positions.shape)}: expected [1], the last row of the source")
    return attend_refuses(asked._replace(query=query[:, :, :1] if query.dim() == 4 else query), *stores)


def _launch(asked: Asked, stores: RowStores, _: NoConstants) -> torch.Tensor | None:
    # The kernel lets a query read the key at its own position whatever ``valid`` says of it.
    if asked.query.shape[2] != 1 or asked.valid is not None:
        return None
    kernels = kernels_for(asked.query, *stores)
    if kernels is None:
        return None
    alone = asked._replace(key=None, value=None, slopes=None, window=0)
    return attend_on_gpu(kernels, alone, stores, ring=False)


attend_cross = AttendOperator(
    "attend_cross",
    RowStores,
    NoConstants,
    summary="attends over the rows of a source, which stores hold before the first step",
    reference=_reference,
    refuses=_refuses,
    value_width=lambda stores, _: stores.value_store.shape[3],
    launch=_launch,
    scratch=attend_scratch,
    writes=False,
)
