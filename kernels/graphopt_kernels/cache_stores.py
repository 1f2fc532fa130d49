"""Stores of keys and values that keep rows as they are: all of them, or the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt_kernels.attend_full import attend_full
from graphopt_kernels.attend_latent import attend_latent
from graphopt_kernels.attend_launch import kernels_follow
from graphopt_kernels.attend_reference import attention_whole
from graphopt_kernels.attend_ring import attend_ring
from graphopt_kernels.causal_convolution import causal_convolution

__all__ = ["Full", "Latent", "Ring"]

OPERATORS = (attend_full, attend_latent, attend_ring, causal_convolution)
"""Loaded with the stores that name them, or that stand beside them."""


class _AsTheyAre(CacheStore):
    """Stores whose rows are read as they came."""

    def whole(
        self, site: SiteSpec, query: Any, key: Any, value: Any, valid: Any, slopes: Any, sinks: Any
    ) -> torch.Tensor:
        return attention_whole(
            query, key, value, valid, slopes, sinks, site.scale, site.softcap, site.mask.window
        )


@dataclass(frozen=True)
class Full(_AsTheyAre):
    """Every position, [batch, heads, capacity, width]."""

    name = "full"
    summary = "keeps every position"
    exact = True
    last_alone = True
    attend_op = "graphopt::attend_full"

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "key": ((batch, site.kv_heads, capacity, site.key_width), site.dtype),
            "value": ((batch, site.kv_heads, capacity, site.value_width), site.dtype),
        }

    def follows(self, site: SiteSpec, device: torch.device) -> bool:
        return device.type == "cpu" or kernels_follow(device, site.dtype, site.key_width, site.value_width)


@dataclass(frozen=True)
class Latent(CacheStore):
    """Every position of keys whose first columns are the values, [batch, heads, capacity, key width]."""

    name = "latent"
    summary = "keeps every position of keys that values are a part of"
    exact = True
    last_alone = True
    attend_op = "graphopt::attend_latent"

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        if not site.within:
            return Reason("its values are not the first columns of its keys")
        return None

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"key": ((batch, site.kv_heads, capacity, site.key_width), site.dtype)}

    def constants(self, site: SiteSpec) -> tuple[Any, ...]:
        return (site.value_width,)


@dataclass(frozen=True)
class Ring(_AsTheyAre):
    """The last positions of a site with a sliding window, [batch, heads, window, width]."""

    name = "ring"
    summary = "keeps the positions of a sliding window"
    exact = True
    last_alone = True
    attend_op = "graphopt::attend_ring"

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        if not site.mask.window:
            return Reason("a ring keeps a window, and rows of this site read all positions before them")
        if site.mask.window >= capacity:
            return Reason(
                f"the window of {site.mask.window} is no less than the {capacity} positions there are"
            )
        if site.shares:
            return Reason("a site that reads another's store may read what a ring has lost by then")
        return None

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        slots = site.mask.window
        return {
            "key": ((batch, site.kv_heads, slots, site.key_width), site.dtype),
            "value": ((batch, site.kv_heads, slots, site.value_width), site.dtype),
        }

    def follows(self, site: SiteSpec, device: torch.device) -> bool:
        return True  # what it reads is no more than a window
