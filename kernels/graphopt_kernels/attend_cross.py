"""Attention over a store that keeps the rows of a source: what an encoder gave, which is written once.

``graphopt::attend_cross`` attends with the queries of new rows over all rows of the source that count. It
writes nothing: keys and values of the source are in the stores before the first step. Where the source ends
is in a tensor, as positions are: a step is the same launch however long a source is.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.operator_scratch import state_scratch
from graphopt_kernels.attend_launch import attend_on_gpu, attend_scratch, kernels_for
from graphopt_kernels.attend_reference import attend_supports, attention_over

__all__ = ["attend_cross", "attend_cross_reference", "attend_cross_supports"]


@torch.library.custom_op("graphopt::attend_cross", mutates_args=())
def attend_cross(
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
    """[B, H, n, Dv] of ``query`` [B, H, n, D] over the rows of the source, dense.

    The stores are [at least B, Hkv, rows, D or Dv]; ``positions`` int64 [1]: the last row of the source,
    those behind it are of an earlier one. ``valid`` bool [at least B, rows]: which rows of the source may be
    read. ``length``: the source has no row at or beyond it. ``sinks`` [H]. ``key``, ``value`` and ``slopes``
    are ``None`` and ``window`` is 0: they stand where operators of other stores take them. There is no
    gradient.
    """
    # The kernel lets a query read the key at its own position whatever ``valid`` says of it.
    if query.shape[2] == 1 and valid is None:
        kernels = kernels_for(query, key_store, value_store)
        if kernels is not None:
            return attend_on_gpu(
                kernels, query, None, None, key_store, value_store, positions, None, None, sinks, scale,
                softcap, 0, length, ring=False,
            )  # fmt: skip
    return attend_cross_reference(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window,
        length,
    )  # fmt: skip


state_scratch("graphopt::attend_cross", attend_scratch)


@attend_cross.register_fake
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
    reason = attend_cross_supports(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window
    )
    if reason is not None:
        raise ValueError(f"attend_cross: {reason}")
    return query.new_empty((*query.shape[:3], value_store.shape[3]))


def attend_cross_supports(
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
    if key is not None or value is not None:
        return Reason("keys and values are given: those of a source are in the stores before the first step")
    if slopes is not None or window:
        return Reason("slopes or a window are given: a source is read whole")
    if list(positions.shape) != [1]:
        return Reason(f"positions are {list(positions.shape)}: expected [1], the last row of the source")
    one = query[:, :, :1] if query.dim() == 4 else query
    return attend_supports(
        one, None, None, key_store, value_store, positions, valid, None, sinks, scale, softcap, 0
    )


def attend_cross_reference(
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
    """What ``attend_cross`` does, with ATen operators."""
    batch, rows = query.shape[0], min(length, key_store.shape[2])
    if positions.device.type == "cpu":
        # Free to look at here; on an accelerator it would hold up the host.
        rows = min(rows, int(positions[-1]) + 1)
    keys, values = key_store[:batch, :, :rows], value_store[:batch, :, :rows]
    allowed = (torch.arange(rows, device=positions.device) <= positions[-1:])[None, None, None]
    if valid is not None:
        allowed = allowed & valid[:batch, None, None, :rows]
    return attention_over(
        query, keys.to(query.dtype), values.to(query.dtype), allowed, None, sinks, scale, softcap
    )
