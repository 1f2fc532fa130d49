"""The base of stores that several attentions write into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt_kernels.attend_joint import attend_joint, attention_joint
from graphopt_kernels.attend_reference import asked_whole
from graphopt_kernels.cache_codes import PLANES
from graphopt_kernels.joint_blocks import JointRows, Kinds, kinds_of
from graphopt_kernels.joint_known import make_known

__all__ = ["JointStore"]

OPERATORS = (attend_joint,)
"""Loaded with the stores that name it."""


@dataclass(frozen=True)
class JointStore(CacheStore):
    """Keys and values of several attentions, joined in blocks of ``block`` positions once all of a block have
    come; the newest block as it is. ``bits`` 8, 4, 3 or 2: what is joined is rounded, keys per channel in
    the block, values per token in groups of ``group`` channels; 0: it is not.

    A method is a subclass that says three things: ``kept``, ``join`` and ``part``.
    """

    block: int = 128
    bits: int = 0
    group: int = 32

    exact = False
    last_alone = True
    repeats = True
    joins: ClassVar[bool] = True
    attend_op = "graphopt::attend_joint"

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            make_known(cls)

    def kept(self, spec: JointRows) -> Kinds:
        """Shape and dtype of what is kept of one block of one sequence, by name; that of ``rows``, [heads,
        block, width], is what ``bits`` rounds."""
        raise NotImplementedError(f"{type(self).__name__} does not define kept()")

    def join(
        self, spec: JointRows, rows: torch.Tensor, shown: torch.Tensor | None, basis: torch.Tensor | None
    ) -> Mapping[str, torch.Tensor]:
        """What is kept, each [B, N, ..], of ``rows`` [M, B, Hkv, N, block, D] of M attentions; ``shown`` bool
        [B, N, block]: which are no padding, ``None`` for all; ``basis``: what ``fit`` made of ``spec.what``,
        ``None`` where there is none. What becomes of a block depends on that block alone."""
        raise NotImplementedError(f"{type(self).__name__} does not define join()")

    def part(
        self, spec: JointRows, kept: Mapping[str, torch.Tensor], member: int, basis: torch.Tensor | None
    ) -> torch.Tensor:
        """Rows [B, Hkv, N, block, D] that attention ``member`` reads of what is ``kept``."""
        raise NotImplementedError(f"{type(self).__name__} does not define part()")

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        if site.members < 2:
            return Reason(
                "several attentions write into one store of its kind, and this one is alone: join-kv says "
                "which do"
            )
        if site.shares:
            return Reason("a site that reads another's store brings no rows of its own")
        if self.bits and self.bits not in PLANES:
            return Reason(f"bits={self.bits}: expected 0, {', '.join(map(str, sorted(PLANES)))}")
        if self.block < 1 or self.group < 1 or (self.bits and self.block % 32):
            return Reason(
                f"block={self.block}, group={self.group}: expected 1 position or more, a multiple of 32 where"
                " it is rounded, and 1 channel or more"
            )
        reach = min(capacity, site.mask.window or capacity)
        if reach <= self.block:
            return Reason(f"the newest {self.block} positions are kept as they are, and {reach} are read")
        return None

    def _rows(self, site: SiteSpec) -> tuple[JointRows, JointRows]:
        return (
            JointRows("keys", site.members, site.kv_heads, site.key_width, site.dtype),
            JointRows("values", site.members, site.kv_heads, site.value_width, site.dtype),
        )

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        blocks = capacity // self.block
        if site.mask.window:
            blocks = min(blocks, -(-site.mask.window // self.block))
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        rows = self._rows(site)
        for name, spec in zip(("key", "value"), rows, strict=True):
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds_of(self, spec).values())
            found[f"{name}_blocks"] = (batch, blocks, size), torch.uint8
        for name, spec in zip(("key", "value"), rows, strict=True):
            found[f"{name}_ring"] = (batch, spec.members * spec.heads, self.block, spec.width), spec.dtype
        return found

    def constants(self, site: SiteSpec) -> tuple[Any, ...]:
        return site.fitted.get("keys"), site.fitted.get("values"), str(self), site.member

    def whole(
        self, site: SiteSpec, query: Any, key: Any, value: Any, valid: Any, slopes: Any, sinks: Any
    ) -> torch.Tensor:
        asked = asked_whole(site, query, key, value, valid, slopes, sinks)
        return attention_joint(self, asked, site.member, (site.fitted.get("keys"), site.fitted.get("values")))

    def step_bound(self, site: SiteSpec) -> int:
        return self.block

    def crossed(self, site: SiteSpec) -> int:
        return 2 * self.block + 8 + (site.mask.window or 0)
