"""Attention over a store of keys whose first columns are the values.

::

    row at position q      key [B, Hkv, 1, D] to place q
    keys, values           store, store[.., :Dv]

As ``attend_full`` with half of its store: latents, which all heads read, are both. ``value`` is
``key[.., :Dv]`` and not read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_full import read_full
from graphopt_kernels.attend_operator import Asked, AttendOperator, RowStores
from graphopt_kernels.attend_reference import attend_refuses

__all__ = ["LatentStore", "ValueWidth", "attend_latent"]


class LatentStore(NamedTuple):
    """``key_store`` [at least B, Hkv, capacity, D]."""

    key_store: torch.Tensor


class ValueWidth(NamedTuple):
    """``value_width``: Dv."""

    value_width: int


def _reference(asked: Asked, store: LatentStore, width: ValueWidth) -> torch.Tensor:
    keys = store.key_store
    if asked.key is not None:
        keys[: asked.query.shape[0]].index_copy_(2, asked.positions, asked.key.to(keys.dtype))
    written = asked._replace(key=None, value=None)
    return read_full(written, RowStores(keys, keys[..., : width.value_width]))


def _refuses(asked: Asked, store: LatentStore, width: ValueWidth) -> Reason | None:
    keys, value_width = store.key_store, width.value_width
    if keys.dim() != 4 or not 0 < value_width <= keys.shape[3]:
        return Reason(f"value_width={value_width} of a store {list(keys.shape)}: expected 1 to its last size")
    return attend_refuses(asked, keys, keys[..., :value_width])


attend_latent = AttendOperator(
    "attend_latent",
    LatentStore,
    ValueWidth,
    summary="attends over keys whose first columns are the values",
    reference=_reference,
    refuses=_refuses,
    value_width=lambda _, width: width.value_width,
)
