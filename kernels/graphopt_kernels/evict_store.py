"""A store of a fixed number of positions, from which the least important one goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.decoding.cache_scores import known_cache_scores
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt_kernels.attend_evict import attend_evict, attention_evicting
from graphopt_kernels.attend_reference import asked_whole

__all__ = ["Evict"]

OPERATORS = (attend_evict,)
"""Loaded with the store that names it."""


@dataclass(frozen=True)
class Evict(CacheStore):
    """``keep`` positions of each head of keys, the newest ``recent`` among them; of the others those of
    highest score by ``policy``, one of those that plugins register (``graphopt_cache_scores``)."""

    keep: int
    policy: str = "h2o"
    recent: int = 32

    name = "evict"
    summary = "keeps the positions that are read most, and the newest"
    exact = False
    repeats = True
    note = (
        "evict: what was dropped for one answer is gone for another: a prompt that is kept cannot be reused"
    )
    attend_op = "graphopt::attend_evict"

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        if self.policy not in (known := known_cache_scores()):
            return Reason(f"policy={self.policy}: expected one of {', '.join(known)}")
        if not 0 < self.recent < self.keep:
            return Reason(f"recent={self.recent}, keep={self.keep}: expected 0 < recent < keep")
        if self.keep >= (reach := min(capacity, site.mask.window or capacity)):
            return Reason(f"{self.keep} positions are kept of the {reach} that are read")
        if site.shares:
            return Reason("a site that reads another's store may read what that has lost by then")
        return None

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        slots = (batch, site.kv_heads, self.keep)
        return {
            "key": ((*slots, site.key_width), site.dtype),
            "value": ((*slots, site.value_width), site.dtype),
            "place": (slots, torch.int64),
            "score": (slots, torch.float32),
        }

    def constants(self, site: SiteSpec) -> tuple[Any, ...]:
        return self.policy, self.recent

    def whole(
        self, site: SiteSpec, query: Any, key: Any, value: Any, valid: Any, slopes: Any, sinks: Any
    ) -> torch.Tensor:
        asked = asked_whole(site, query, key, value, valid, slopes, sinks)
        return attention_evicting(asked, self.policy, self.recent, self.keep)

    def crossed(self, site: SiteSpec) -> int:
        return self.keep + 24
