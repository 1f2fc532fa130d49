"""Stores in which several attentions keep one thing: a direction of two rows, or coordinates of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graphopt.candidate import Reason
from graphopt.decoding.stores import SiteSpec
from graphopt_kernels.coordinate_stores import principal
from graphopt_kernels.joint_blocks import JointRows, Kinds
from graphopt_kernels.joint_store import JointStore

__all__ = ["Merged", "SharedBasis"]


@dataclass(frozen=True)
class Merged(JointStore):
    """One direction for the rows of two attentions, the length of each, and both rows of the ``keep``
    positions of a block, head by head, at which their directions differ most (MiniCache, Liu et al. 2024,
    arXiv 2405.14366).

    ``u``, ``w`` of length 1 with an angle of ``a`` become ``sin((1 - later) a) u + sin(later a) w``, brought
    to length 1: ``later`` is how near to the later attention's it is. Opposite ones, between which there is
    no direction, become the later one's.
    """

    keep: int = 6
    later: float = 0.6

    name = "merged"
    summary = "merges the directions of keys and values of two attentions, and keeps their lengths"

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        if site.members > 2:
            return Reason(f"a direction lies between two others, and {site.members} attentions are joined")
        if not 0 <= self.keep < self.block or not 0 <= self.later <= 1:
            return Reason(
                f"keep={self.keep}, later={self.later}: expected 0 to {self.block - 1} positions of a block, "
                "and 0 to 1"
            )
        return super().refuses(site, capacity)

    def kept(self, spec: JointRows) -> Kinds:
        block, apart = (spec.heads, self.block), (spec.heads, self.keep)
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]]
        kinds = {"rows": ((*block, spec.width), spec.dtype), "lengths": ((2, *block), spec.dtype)}
        if self.keep:
            kinds |= {"places": (apart, torch.int32), "apart": ((2, *apart, spec.width), spec.dtype)}
        return kinds

    def join(
        self, spec: JointRows, rows: torch.Tensor, shown: torch.Tensor | None, basis: torch.Tensor | None
    ) -> Mapping[str, torch.Tensor]:
        rows = rows.movedim(3, 2)  # [2, B, N, Hkv, block, D]
        # In float64: which of two positions is kept apart must not hang on an order of sums.
        wide = rows.double()
        lengths = torch.linalg.vector_norm(wide, dim=-1)
        first, second = wide / lengths.clamp(min=1e-30)[..., None]
        angle = (first * second).sum(-1, keepdim=True).clamp(-1, 1).arccos()
        mixed = torch.sin((1 - self.later) * angle) * first + torch.sin(self.later * angle) * second
        size = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
        made = {"rows": torch.where(size > 1e-7, mixed / size.clamp(min=1e-30), second).to(rows.dtype)}
        made["lengths"] = lengths.movedim(0, 2)
        if self.keep:
            far = angle[..., 0] if shown is None else angle[..., 0].masked_fill(~shown[:, :, None], -1.0)
            made["places"] = places = far.sort(dim=-1, descending=True, stable=True).indices[..., : self.keep]
            index = places[None, ..., None].expand(2, *places.shape, rows.shape[-1])
            made["apart"] = rows.gather(4, index).movedim(0, 2)
        return made

    def part(
        self, spec: JointRows, kept: Mapping[str, torch.Tensor], member: int, basis: torch.Tensor | None
    ) -> torch.Tensor:
        rows = kept["rows"] * kept["lengths"][:, :, member, ..., None]
        if self.keep:
            index = kept["places"].long()[..., None].expand(*kept["places"].shape, rows.shape[-1])
            rows.scatter_(3, index, kept["apart"][:, :, member])
        return rows.movedim(2, 1)


@dataclass(frozen=True)
class SharedBasis(JointStore):
    """``key_rank`` coordinates of the keys of all attentions and heads side by side, ``value_rank`` of the
    values, in the directions of most energy of calibration rows (xKV, Chang et al. 2025, arXiv 2503.18893,
    which fits a basis to each prompt anew and takes keys before rotary embeddings; here it is fitted once, to
    keys that are attended with). Each attention reads its own rows of the projection."""

    key_rank: int = 0
    value_rank: int = 0

    name = "shared-basis"
    summary = "keeps coordinates of several attentions' keys and values in one basis, fitted to calibration"
    needs_fit = True

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        for name, rank, width in (
            ("key_rank", self.key_rank, site.key_width), ("value_rank", self.value_rank, site.value_width)
        ):  # fmt: skip
            every = site.members * site.kv_heads * width
            if site.members > 1 and not 0 < rank < every:
                return Reason(f"{name}={rank}: expected 1 to {every - 1}, of {every} numbers side by side")
        return super().refuses(site, capacity)

    def kept(self, spec: JointRows) -> Kinds:
        rank = self.key_rank if spec.what == "keys" else self.value_rank
        return {"rows": ((1, self.block, rank), spec.dtype)}

    def join(
        self, spec: JointRows, rows: torch.Tensor, shown: torch.Tensor | None, basis: torch.Tensor | None
    ) -> Mapping[str, torch.Tensor]:
        assert basis is not None
        return {"rows": torch.einsum("mbhntd,mhdr->bntr", rows, basis.to(rows.dtype)).unsqueeze(2)}

    def part(
        self, spec: JointRows, kept: Mapping[str, torch.Tensor], member: int, basis: torch.Tensor | None
    ) -> torch.Tensor:
        assert basis is not None
        rows = kept["rows"][:, :, 0]
        return torch.einsum("bntr,hdr->bhntd", rows, basis[member].to(rows.dtype))

    def fitted(self, site: SiteSpec) -> Kinds:
        own = site.members, site.kv_heads
        return {
            "keys": ((*own, site.key_width, self.key_rank), site.dtype),
            "values": ((*own, site.value_width, self.value_rank), site.dtype),
        }

    def fit_rows(self, site: SiteSpec) -> int:
        # Of directions that no row has any is as good as the others.
        return site.members * site.kv_heads * max(site.key_width, site.value_width)

    def fit(
        self, site: SiteSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        made = {}
        for name, rows, rank in (("keys", key, self.key_rank), ("values", value, self.value_rank)):
            beside = rows.permute(2, 0, 1, 3).flatten(1).double()
            columns = principal(beside[None])[0, :, :rank]
            size = rows.shape[0], rows.shape[1], rows.shape[3], rank
            made[name] = columns.reshape(size).to(rows.dtype)
        return made
