"""Attention over a store of keys whose first columns are the values.

::

    row at position q      key [B, Hkv, 1, D] to place q
    keys, values           store, store[.., :Dv]

As ``attend_full`` with half of its store: latents, which all heads read, are both.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_full import attend_full_reference
from graphopt_kernels.attend_reference import attend_supports

__all__ = ["attend_latent", "attend_latent_reference", "attend_latent_supports"]


@torch.library.custom_op("graphopt::attend_latent", mutates_args=("key_store",))
def attend_latent(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    value_width: int,
) -> torch.Tensor:
    """[B, H, n, Dv] of ``query`` [B, H, n, D] over what the store holds, dense.

    ``key`` [B, Hkv, n, D] goes to ``positions`` of ``key_store`` [at least B, Hkv, capacity, D]; ``value`` is
    ``key[.., :Dv]`` and not read; ``value_width``: Dv. All else as for ``graphopt::attend_full``. There is no
    gradient.
    """
    return attend_latent_reference(
        query, key, value, key_store, positions, valid, slopes, sinks, scale, softcap, window, length,
        value_width,
    )  # fmt: skip


@attend_latent.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    value_width: int,
) -> torch.Tensor:
    reason = attend_latent_supports(
        query, key, value, key_store, positions, valid, slopes, sinks, scale, softcap, window, length,
        value_width,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"attend_latent: {reason}")
    return query.new_empty((*query.shape[:3], value_width))


def attend_latent_supports(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    value_width: int,
    *_: Any,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if key_store.dim() != 4 or not 0 < value_width <= key_store.shape[3]:
        return Reason(
            f"value_width={value_width} of a store {list(key_store.shape)}: expected 1 to its last size"
        )
    values = key_store[..., :value_width]
    return attend_supports(
        query, key, value, key_store, values, positions, valid, slopes, sinks, scale, softcap, window
    )


def attend_latent_reference(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    value_width: int,
) -> torch.Tensor:
    """What ``attend_latent`` does, with ATen operators."""
    if key is not None:
        key_store[: query.shape[0]].index_copy_(2, positions, key.to(key_store.dtype))
    return attend_full_reference(
        query, None, None, key_store, key_store[..., :value_width], positions, valid, slopes, sinks, scale,
        softcap, window, length,
    )  # fmt: skip
