"""A store of keys and values that are rounded to a few bits, but for the newest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt_kernels.attend_quant import attend_quant, attention_rounded
from graphopt_kernels.attend_quant_launch import follows
from graphopt_kernels.attend_reference import asked_whole
from graphopt_kernels.cache_codes import PLANES, scale_dtype, words_of

__all__ = ["Quant"]

OPERATORS = (attend_quant,)
"""Loaded with the store that names it."""


@dataclass(frozen=True)
class Quant(CacheStore):
    """Keys per channel in blocks of positions, values per token in groups of channels (KIVI, Liu et al.
    2024), with scale and zero in two bytes each; the newest ``residual`` - ``block`` + 1 to ``residual``
    positions as they are.

    ``key_bits`` and ``value_bits`` are 8, 4, 3 or 2, ``bits`` where they are 0. With a sliding window the
    blocks that it reaches are kept.
    """

    bits: int = 4
    key_bits: int = 0
    value_bits: int = 0
    block: int = 32
    group: int = 32
    residual: int = 32

    name = "quant"
    summary = "rounds keys per channel and values per token, but for the newest"
    exact = False
    last_alone = True
    repeats = True
    attend_op = "graphopt::attend_quant"
    takes_turns = True

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of a key and of a value."""
        return self.key_bits or self.bits, self.value_bits or self.bits

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        for bits in self.widths:
            if bits not in PLANES:
                return Reason(f"{bits} bits: expected {', '.join(map(str, sorted(PLANES)))}")
        if self.block < 32 or self.block % 32 or self.group < 1:
            return Reason(
                f"block={self.block}, group={self.group}: expected a multiple of 32 positions, and 1 channel "
                "or more"
            )
        if self.residual < self.block or self.residual % self.block:
            return Reason(f"residual={self.residual}: expected a multiple of block={self.block}")
        reach = min(capacity, site.mask.window or capacity)
        if reach <= self.residual:
            return Reason(f"the newest {self.residual} positions are kept as they are, and {reach} are read")
        return None

    def _blocks(self, site: SiteSpec, capacity: int) -> int:
        """How many blocks are packed when the last position has come, of those that a window reaches."""
        count = (capacity - self.residual) // self.block + 1
        if site.mask.window:
            count = min(count, -(-(site.mask.window + self.block - self.residual) // self.block))
        return count

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        key_bits, value_bits = self.widths
        first, blocks = (batch, site.kv_heads), self._blocks(site, capacity)
        rows, scales = blocks * self.block, scale_dtype(site.dtype)
        groups = -(-site.value_width // self.group)
        return {
            "key_codes": (
                (*first, blocks, words_of(key_bits, self.block), site.key_width),
                torch.int32,
            ),
            "key_scales": ((*first, blocks, 2, site.key_width), scales),
            "value_codes": ((*first, rows, words_of(value_bits, site.value_width)), torch.int32),
            "value_scales": ((*first, rows, 2, groups), scales),
            "key_ring": ((*first, self.residual, site.key_width), site.dtype),
            "value_ring": ((*first, self.residual, site.value_width), site.dtype),
        }

    def constants(self, site: SiteSpec) -> tuple[Any, ...]:
        return (*self.widths, self.group, site.turn)

    def whole(
        self,
        site: SiteSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        valid: torch.Tensor | None,
        slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        asked = asked_whole(site, query, key, value, valid, slopes, sinks)
        return attention_rounded(asked, *self.widths, self.block, self.group, self.residual)

    def follows(self, site: SiteSpec, device: torch.device) -> bool:
        sizes = (site.key_width, site.value_width, self.block, self.group)
        return device.type == "cpu" or follows(device, site.dtype, *sizes)

    @classmethod
    def choices(cls) -> tuple[CacheStore, ...]:
        fine = (cls(bits=8), cls(bits=4))
        coarse = ((4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
        return fine + tuple(cls(key_bits=k, value_bits=v, group=64) for k, v in coarse)

    def crossed(self, site: SiteSpec) -> int:
        return self.residual + 2 * self.block + 8
