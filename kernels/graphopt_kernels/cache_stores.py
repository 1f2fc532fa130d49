"""Stores of keys and values that keep rows as they are: all of them, or the last ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.decoding.stores import CacheStore, Call, SiteSpec
from graphopt_kernels.attend_cross import attend_cross
from graphopt_kernels.attend_full import attend_full
from graphopt_kernels.attend_latent import attend_latent
from graphopt_kernels.attend_launch import kernels_follow
from graphopt_kernels.attend_reference import asked_whole, attention_whole
from graphopt_kernels.attend_relative import attend_relative
from graphopt_kernels.attend_ring import attend_ring
from graphopt_kernels.causal_convolution import causal_convolution

__all__ = ["Cross", "Full", "Latent", "Relative", "Ring"]

OPERATORS = (attend_cross, attend_full, attend_latent, attend_relative, attend_ring, causal_convolution)
"""Loaded with the stores that name them, or that stand beside them."""


class _AsTheyAre(CacheStore):
    """Stores whose rows are read as they came."""

    def whole(
        self, site: SiteSpec, query: Any, key: Any, value: Any, valid: Any, slopes: Any, sinks: Any
    ) -> torch.Tensor:
        return attention_whole(asked_whole(site, query, key, value, valid, slopes, sinks))


@dataclass(frozen=True)
class Full(_AsTheyAre):
    """Every position, [batch, heads, capacity, width]."""

    name = "full"
    summary = "keeps every position"
    exact = True
    last_alone = True
    repeats = True
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
class Relative(Full):
    """Every position, as ``full`` keeps it, of sites that add to scores by how far a key is."""

    name = "relative"
    summary = "keeps every position, and adds a bias of distances"
    adds_biases = True
    attend_op = "graphopt::attend_relative"

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        if not site.mask.bias:
            return Reason("nothing is added to scores by distance")
        return None

    def constants(self, site: SiteSpec) -> tuple[Any, ...]:
        return (site.bias,)

    def follows(self, site: SiteSpec, device: torch.device) -> bool:
        return device.type == "cpu"


@dataclass(frozen=True)
class Latent(CacheStore):
    """Every position of keys whose first columns are the values, [batch, heads, capacity, key width]."""

    name = "latent"
    summary = "keeps every position of keys that values are a part of"
    exact = True
    last_alone = True
    repeats = True
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
    repeats = True
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


@dataclass(frozen=True)
class Cross(CacheStore):
    """All rows of a source that there are at most, [batch, heads, rows, width], written before the first
    step."""

    name = "cross"
    summary = "keeps the rows of an encoder's output"
    exact = True
    crosses = True
    last_alone = True
    repeats = True
    attend_op = "graphopt::attend_cross"

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "key": ((batch, site.kv_heads, site.source, site.key_width), site.dtype),
            "value": ((batch, site.kv_heads, site.source, site.value_width), site.dtype),
        }

    def write(self, call: Call, site: SiteSpec, key: Any, value: Any, tensors: Sequence[Any]) -> None:
        for rows, store in zip((key, value), tensors, strict=True):
            batch, length = (call(torch.ops.aten.sym_size.int, rows, dim) for dim in (0, 2))
            part = call(torch.ops.aten.narrow.default, store, 0, 0, batch)
            part = call(torch.ops.aten.narrow.default, part, 2, 0, length)
            call(torch.ops.aten.copy_.default, part, rows)

    def follows(self, site: SiteSpec, device: torch.device) -> bool:
        return True  # how far a sequence has come says nothing of its source
