"""Stores that keep the first and the newest positions, of all heads or of all but some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt_kernels.attend_reference import asked_whole
from graphopt_kernels.attend_split import attend_split, attention_split

__all__ = ["SinkWindow", "SplitHeads"]

OPERATORS = (attend_split,)
"""Loaded with the stores that name it."""

_NOTE = (
    "what lies between the first and the newest positions is dropped: a prompt that is kept cannot be reused"
)


@dataclass(frozen=True)
class SinkWindow(CacheStore):
    """The first ``first`` positions and the newest ``near`` (StreamingLLM, Xiao et al. 2024)."""

    near: int
    first: int = 4

    name = "sink-window"
    summary = "keeps the first and the newest positions"
    exact = False
    last_alone = True
    repeats = True
    note = f"sink-window: {_NOTE}"
    attend_op = "graphopt::attend_split"

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads of keys that keep all positions."""
        return ()

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        if self.near < 1 or self.first < 0:
            return Reason(f"near={self.near}, first={self.first}: expected 1 or more, and 0 or more")
        if self.near + self.first >= (reach := min(capacity, site.mask.window or capacity)):
            return Reason(f"{self.near + self.first} positions are kept of the {reach} that are read")
        if site.shares:
            return Reason("a site that reads another's store may read what that has lost by then")
        if any(not 0 <= head < site.kv_heads for head in self.heads):
            return Reason(f"heads={list(self.heads)}: expected some of 0 to {site.kv_heads - 1}")
        return None

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        sizes = (len(self.heads), capacity), (site.kv_heads - len(self.heads), self.first + self.near)
        widths = {"key": site.key_width, "value": site.value_width}
        return {
            f"{what}_{kind}": ((batch, *size, width), site.dtype)
            for kind, size in zip(("all", "near"), sizes, strict=True)
            for what, width in widths.items()
        }

    def constants(self, site: SiteSpec) -> tuple[Any, ...]:
        return (list(self.heads), self.first)

    def whole(
        self, site: SiteSpec, query: Any, key: Any, value: Any, valid: Any, slopes: Any, sinks: Any
    ) -> torch.Tensor:
        asked = asked_whole(site, query, key, value, valid, slopes, sinks)
        return attention_split(asked, self.heads, self.first, self.near)

    def crossed(self, site: SiteSpec) -> int:
        return self.first + 2 * self.near + 8


@dataclass(frozen=True)
class SplitHeads(SinkWindow):
    """Every position for the heads of keys ``whole_heads``, the first and the newest for all others
    (RazorAttention, Tang et al. 2024; DuoAttention, Xiao et al. 2024)."""

    whole_heads: tuple[int, ...] = ()

    name = "split-heads"
    summary = "keeps every position of some heads, the first and the newest of the others"
    note = f"split-heads: {_NOTE}"

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(sorted(self.whole_heads))
