"""Stores of fewer numbers of a key and of a value: coordinates in a basis, or the channels that matter.

Before, of a head of keys, rows of D and Dv numbers::

    key [S, D]                       value [S, Dv]           y = attend(query, key, value)

After, with fitted matrices of orthonormal columns A [D, r] and C [Dv, s]::

    key' = key A                     value' = value C        y = attend(query A, key', value') C^T

``<query A, key A>`` is the product of the query with the key's projection on the columns of A, and a mean of
``value C`` is the mean's coordinates: nothing is put together again to be read. So rows of coordinates are
kept in any other store, rounded, in rings or dropped, and its operator and kernels do the rest.

Keys are those that are attended with, behind rotary embeddings and norms: nothing is rotated afterwards, so
a basis need not respect the pairs of channels that are. Bases are constants of the program: weights that
change later (other checkpoints, healing) leave them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.decoding.assignment import store_named
from graphopt.decoding.stores import CacheStore, Call, SiteSpec, called

__all__ = ["Coordinates", "KeyChannels", "LowRank"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Coordinates(CacheStore):
    """``key_rank`` numbers of a key and ``value_rank`` of a value (0: all), in the store ``store``, which is
    spelled with its options and looked for among ``known``, by default those of installed plugins.

    What subclasses say is ``basis_of_keys`` and ``basis_of_values``: all columns, those first that matter
    most. Raises ``UnknownNameError`` and ``InputsError`` for a store that cannot be made.
    """

    key_rank: int = 0
    value_rank: int = 0
    store: str = "full"
    kept: CacheStore = field(init=False, repr=False, compare=False)
    known: InitVar[Mapping[str, type[CacheStore]] | None] = None

    exact = False
    needs_fit = True
    attend_op = "graphopt::attend_full"

    @staticmethod
    def basis_of_keys(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """[Hkv, D, D] of ``query`` [Hkv, Q, D], of all that read a head, and ``key`` [Hkv, R, D], float64:
        orthonormal columns, those first that matter most."""
        raise NotImplementedError("a store of coordinates defines basis_of_keys()")

    @staticmethod
    def basis_of_values(value: torch.Tensor) -> torch.Tensor:
        """The same of ``value`` [Hkv, R, Dv]."""
        return principal(value)

    def __post_init__(self, known: Mapping[str, type[CacheStore]] | None) -> None:
        if known is None:
            from graphopt.plugins.host import default_host

            known = default_host().stores()
        kept = store_named(self.store, known)
        object.__setattr__(self, "kept", kept)
        # What the operator of the other store does and needs is what this one does and needs.
        for name in ("attend_op", "takes_turns", "last_alone", "repeats", "note"):
            object.__setattr__(self, name, getattr(kept, name))

    @classmethod
    def named(cls, known: Mapping[str, type[CacheStore]], **options: Any) -> CacheStore:
        return cls(**options, known=known)

    def inside(self, site: SiteSpec) -> tuple[CacheStore, SiteSpec]:
        key, value = self.key_rank or site.key_width, self.value_rank or site.value_width
        return self.kept, replace(site, key_width=key, value_width=value, within=False, fitted={})

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        for name, rank, width in (
            ("key_rank", self.key_rank, site.key_width), ("value_rank", self.value_rank, site.value_width)
        ):  # fmt: skip
            if not 0 <= rank < width:
                return Reason(f"{name}={rank}: expected 1 to {width - 1}, or 0 for all of {width}")
        if not self.key_rank and not self.value_rank:
            return Reason("neither key_rank nor value_rank is given: nothing would be left out")
        inner, low = self.inside(site)
        if inner.needs_fit:
            return Reason(f"store={inner}: expected one that is not fitted to tokens itself")
        if type(inner).whole is CacheStore.whole:
            return Reason(f"store={inner}: it does not say what whole sequences give (CacheStore.whole)")
        reason = inner.refuses(low, capacity)
        return None if reason is None else Reason(f"store={inner}: {reason}")

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

    def fit_rows(self, site: SiteSpec) -> int:
        # Of directions that no row has any is as good as the others.
        return max(site.key_width if self.key_rank else 1, site.value_width if self.value_rank else 1)

    def fit(
        self, site: SiteSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        made = {}
        if self.key_rank:
            made["keys"] = self.basis_of_keys(query.double(), key.double())[..., : self.key_rank]
        if self.value_rank:
            made["values"] = self.basis_of_values(value.double())[..., : self.value_rank]
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
        inner, low = self.inside(site)
        rows = self.enter(called, site, query, key, value)
        made = inner.whole(low, *rows, valid, slopes, sinks)
        found: torch.Tensor = self.leave(called, site, made)
        return found


def principal(rows: torch.Tensor) -> torch.Tensor:
    """[H, D, D]: directions of ``rows`` [H, R, D] as columns, those of most energy first. Not centred: what
    is left out is added to nothing."""
    # In ascending order.
    found: torch.Tensor = torch.linalg.eigh(rows.mT @ rows).eigenvectors
    return found.flip(-1)


@dataclass(frozen=True)
class LowRank(Coordinates):
    """``key_rank`` coordinates of a key and ``value_rank`` of a value in the directions of most energy of
    calibration rows, head by head: the projection that MatryoshkaKV (Lin et al. 2024, arXiv 2410.14731)
    trains on from. CSKV (Wang et al. 2024, arXiv 2409.10593) keeps coordinates of all heads together, and the
    newest rows as they are, which is not done here; one basis for several layers is ``shared-basis``."""

    name = "low-rank"
    summary = "keeps coordinates of keys and values in a basis fitted to calibration tokens"

    @staticmethod
    def basis_of_keys(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return principal(key)


@dataclass(frozen=True)
class KeyChannels(Coordinates):
    """The ``key_rank`` channels of a key whose products with queries are largest on calibration tokens, head
    by head; of values as many coordinates as ``value_rank`` says.

    ``|queries[:, c]| * |keys[:, c]|``, the norm of what channel c adds to all scores, is what ThinK (Xu et
    al. 2024, arXiv 2407.21018) chooses by, for each prompt anew and from its last queries; here it is chosen
    once. As there, keys are those behind rotary embeddings and queries enter the same channels: one channel
    of a rotated pair adds its own product to a score, with or without the other, so pairs need not be
    dropped together.
    """

    name = "key-channels"
    summary = "keeps the channels of keys that queries read most, chosen on calibration tokens"

    @staticmethod
    def basis_of_keys(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # |a b^T| of two columns is |a| |b|.
        score = query.norm(dim=1) * key.norm(dim=1)
        order = torch.sort(score, dim=-1, descending=True, stable=True).indices
        return torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)[order].mT
