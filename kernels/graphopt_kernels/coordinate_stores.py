"""Stores of fewer numbers of a key and of a value: coordinates in a basis, or the channels that matter.

Before, of a head of keys, rows of D and Dv numbers::

    key [S, D]                       value [S, Dv]           y = attend(query, key, value)

After, with fitted matrices of orthonormal columns A [D, r] and C [Dv, s]::

    key' = key A                     value' = value C        y = attend(query A, key', value') C^T

``<query A, key A>`` is the product of the query with the key's projection on the columns of A, and a mean of
``value C`` is the mean's coordinates: nothing is put together again to be read. So rows of coordinates are
kept in any other store, rounded, in rings or dropped, and its operator and kernels do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.decoding.assignment import store_named
from graphopt.decoding.stores import CacheStore, Call, SiteSpec

__all__ = ["Coordinates", "LowRank", "StaticChannels"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Coordinates(CacheStore):
    """``key_rank`` numbers of a key and ``value_rank`` of a value (0: all), in the store ``store``.

    What subclasses say is ``basis_of_keys`` and ``basis_of_values``: columns of full rank, best first.
    """

    key_rank: int = 0
    value_rank: int = 0
    store: str = "full"

    exact = False
    needs_fit = True
    attend_op = "graphopt::attend_full"

    @staticmethod
    def basis_of_keys(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """[Hkv, D, D] of ``query`` [Hkv, Q, D], of heads that read a key's, and ``key`` [Hkv, R, D], float64:
        orthonormal columns, those first that matter most."""
        raise NotImplementedError

    @staticmethod
    def basis_of_values(value: torch.Tensor) -> torch.Tensor:
        """The same of ``value`` [Hkv, R, Dv]."""
        return principal(value)

    def __post_init__(self) -> None:
        inner = self._inner()
        # What the operator of the other store does and needs is what this one does and needs.
        for name in ("attend_op", "takes_turns", "last_alone", "note"):
            object.__setattr__(self, name, getattr(inner, name))

    def _inner(self) -> CacheStore:
        from graphopt.plugins.host import default_host

        return store_named(self.store, default_host().stores())

    def inside(self, site: SiteSpec) -> tuple[CacheStore, SiteSpec]:
        key, value = self.key_rank or site.key_width, self.value_rank or site.value_width
        low = replace(site, key_width=key, value_width=value, within=False, fitted={})
        inner = self._inner()
        return inner, low

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        for name, rank, width in (
            ("key_rank", self.key_rank, site.key_width), ("value_rank", self.value_rank, site.value_width)
        ):  # fmt: skip
            if not 0 <= rank < width:
                return Reason(f"{name}={rank}: expected 1 to {width - 1}, or 0 for all of {width}")
        if not self.key_rank and not self.value_rank:
            return Reason("neither key_rank nor value_rank is given: nothing would be left out")
        inner, low = self.inside(site)
        if isinstance(inner, Coordinates):
            return Reason(f"store={self.store}: coordinates of coordinates are those of one store")
        return inner.refuses(low, capacity)

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        inner, low = self.inside(site)
        return inner.tensors(low, batch, capacity)

    def constants(self, site: SiteSpec) -> tuple[Any, ...]:
        inner, low = self.inside(site)
        return inner.constants(low)

    def follows(self, site: SiteSpec, device: torch.device) -> bool:
        inner, low = self.inside(site)
        return inner.follows(low, device)

    def crossed(self, site: SiteSpec) -> int:
        inner, low = self.inside(site)
        return inner.crossed(low)

    def fitted(self, site: SiteSpec) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        sizes = {"keys": (site.key_width, self.key_rank), "values": (site.value_width, self.value_rank)}
        return {name: ((site.kv_heads, *size), site.dtype) for name, size in sizes.items() if size[1]}

    def fit(
        self, site: SiteSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        asked = query.double().unflatten(1, (site.kv_heads, -1)).flatten(2, 3).transpose(0, 1).flatten(1, 2)
        keys, values = (rows.double().transpose(0, 1).flatten(1, 2) for rows in (key, value))
        made = {}
        if self.key_rank:
            made["keys"] = self.basis_of_keys(asked, keys)[..., : self.key_rank]
        if self.value_rank:
            made["values"] = self.basis_of_values(values)[..., : self.value_rank]
        return {name: basis.to(site.dtype).contiguous() for name, basis in made.items()}

    def enter(self, call: Call, site: SiteSpec, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        if self.key_rank:
            groups = call(aten.unflatten.int, query, 1, [site.kv_heads, -1])
            basis = call(aten.unsqueeze.default, site.fitted["keys"], 1)
            query = call(aten.flatten.using_ints, call(aten.matmul.default, groups, basis), 1, 2)
            if key is not None:
                key = call(aten.matmul.default, key, site.fitted["keys"])
        if self.value_rank and value is not None:
            value = call(aten.matmul.default, value, site.fitted["values"])
        return query, key, value

    def leave(self, call: Call, site: SiteSpec, made: Any) -> Any:
        if not self.value_rank:
            return made
        groups = call(aten.unflatten.int, made, 1, [site.kv_heads, -1])
        basis = call(aten.unsqueeze.default, call(aten.transpose.int, site.fitted["values"], 1, 2), 1)
        return call(aten.flatten.using_ints, call(aten.matmul.default, groups, basis), 1, 2)

    def whole(
        self, site: SiteSpec, query: Any, key: Any, value: Any, valid: Any, slopes: Any, sinks: Any
    ) -> torch.Tensor:
        def called(operator: Any, *arguments: Any) -> Any:
            return operator(*arguments)

        inner, low = self.inside(site)
        rows = self.enter(called, site, query, key, value)
        made = inner.whole(low, *rows, valid, slopes, sinks)
        found: torch.Tensor = self.leave(called, site, made)
        return found


def principal(rows: torch.Tensor) -> torch.Tensor:
    """[H, D, D]: directions of ``rows`` [H, R, D] as columns, those of most energy first. Not centred: what
    is left out is added to nothing."""
    return torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(-1)


@dataclass(frozen=True)
class LowRank(Coordinates):
    """``key_rank`` coordinates of a key and ``value_rank`` of a value in the directions of most energy of
    calibration rows, head by head (MatryoshkaKV, Lin et al. 2024; CSKV, Wang et al. 2024)."""

    name = "low-rank"
    summary = "keeps coordinates of keys and values in a basis fitted to calibration tokens"

    @staticmethod
    def basis_of_keys(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return principal(key)

    @classmethod
    def choices(cls) -> tuple[CacheStore, ...]:
        return ()


@dataclass(frozen=True)
class StaticChannels(Coordinates):
    """The ``key_rank`` channels of a key whose products with queries are largest on calibration tokens
    (ThinK, Xu et al. 2024), head by head; of values as many coordinates as ``value_rank`` says."""

    name = "key-channels"
    summary = "keeps the channels of keys that queries read most, chosen on calibration tokens"

    @staticmethod
    def basis_of_keys(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        score = query.norm(dim=1) * key.norm(dim=1)
        order = torch.sort(score, dim=-1, descending=True, stable=True).indices
        return torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)[order].mT
