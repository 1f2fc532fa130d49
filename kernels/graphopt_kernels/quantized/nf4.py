"""nf4: weights in four bits that number quantiles of a normal distribution, blocks of 64 share a scale.

    codes  uint8[N, K / 2]   two in a byte, in blocks of 64 (``nibbles``)
    words  int32[N, K / 64]  the bits of the scale, a float32: the largest weight of the block in size
           uint8[N, K / 64]  ``double``: the scale over the range of its 256 blocks, rounded to a whole number
    ranges float32[N, 0]     ``double``: [N, K / 64 / 256] up, the largest scale of 256 blocks over 255
    weight level * scale
    linear levels are rounded to the dtype of x, products are added in float32, those of a block scaled as
           they are added to those before, the whole rounded once

A block of zeros has scale 0. Source: Dettmers et al. 2023, "QLoRA" (https://arxiv.org/abs/2305.14314), levels
as in bitsandbytes; its double quantisation takes means off scales and rounds them to float8, over rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.packing import Layout, Scheme
from graphopt_kernels.quantized.group_products import NF4_LEVELS, GroupWeight, product, unpacked
from graphopt_kernels.quantized.nibbles import pack_nibbles
from graphopt_kernels.quantized.operators import define_operators
from graphopt_kernels.quantized.scratch import beside_groups

__all__ = ["Nf4", "linear_nf4", "nf4_weight"]

_BLOCK = 64
_RANGED = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def nf4_weight(codes: torch.Tensor, words: torch.Tensor, ranges: torch.Tensor) -> GroupWeight:
    """The weight that they hold."""
    return GroupWeight(
        codes, words, ranges.float(), words.shape[1] * _BLOCK, _BLOCK, _BLOCK // 2, levels=True
    )


def linear_nf4(
    x: torch.Tensor,
    codes: torch.Tensor,
    words: torch.Tensor,
    ranges: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x`` [..., K] times the weight, ``bias`` [N] added: [..., N] of the dtype of ``x``."""
    return product(x, nf4_weight(codes, words, ranges), bias)


def _unpack(
    codes: torch.Tensor, words: torch.Tensor, ranges: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return unpacked(nf4_weight(codes, words, ranges), None, dtype)


def _shape(codes: torch.Tensor, words: torch.Tensor, ranges: torch.Tensor) -> tuple[int, int]:
    return codes.shape[0], words.shape[1] * _BLOCK


define_operators(
    "nf4",
    ("codes", "words", "ranges"),
    (),
    unpack=_unpack,
    linear=linear_nf4,
    shape=_shape,
    scratch=beside_groups,
)


@dataclass(frozen=True)
class Nf4(Scheme):
    """Four bits a weight, one of 16 quantiles. ``double``: scales take a byte each."""

    double: bool = False

    name: ClassVar[str] = "nf4"
    summary: ClassVar[str] = "4 bits a weight, quantiles of a normal distribution, a scale for each 64"
    unpack_op: ClassVar[str] = "graphopt::unpack_nf4"
    linear_op: ClassVar[str] = "graphopt::linear_nf4"
    by_rows: ClassVar[bool] = True

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        if dtype not in _DTYPES:
            return Reason(f"takes weights of float32, float16 and bfloat16, got {dtype}")
        if k % _BLOCK:
            return Reason(f"blocks of {_BLOCK} do not divide {k} inputs")
        return None

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        n, k = weight.shape
        wide = weight.float().reshape(n, k // _BLOCK, _BLOCK)
        scales = wide.abs().amax(-1)
        words, ranges = scales.view(torch.int32), scales.new_empty((n, 0))
        if self.double:
            words, ranges = _doubled(scales)
            scales = words.float() * ranges.repeat_interleave(_RANGED, 1)[:, : words.shape[1]]
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        between = (levels[1:] + levels[:-1]) / 2
        share = wide / torch.where(scales > 0, scales, 1.0)[..., None]
        codes = torch.bucketize(share, between, out_int32=True).to(torch.uint8).view(n, k)
        return {"codes": pack_nibbles(codes, _BLOCK // 2), "words": words, "ranges": ranges}

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        blocks = k // _BLOCK
        return {
            "codes": (torch.uint8, (n, k // 2)),
            "words": (torch.uint8 if self.double else torch.int32, (n, blocks)),
            "ranges": (torch.float32, (n, -(-blocks // _RANGED) if self.double else 0)),
        }

    def refuses_packed(
        self, packed: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype
    ) -> Reason | None:
        reason = super().refuses_packed(packed, n, k, dtype)
        if reason is not None or self.double or bool(packed["words"].view(torch.float32).isfinite().all()):
            return reason
        return Reason("its words hold scales that are not finite")


def _doubled(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 of ``scales`` [N, blocks] and ranges [N, blocks / 256]."""
    n, blocks = scales.shape
    count = -(-blocks // _RANGED)
    whole = torch.nn.functional.pad(scales, (0, count * _RANGED - blocks)).view(n, count, _RANGED)
    ranges = whole.amax(-1) / 255
    codes = (whole / torch.where(ranges > 0, ranges, 1.0)[..., None]).round().clamp(0, 255)
    return codes.to(torch.uint8).view(n, count * _RANGED)[:, :blocks].contiguous(), ranges
