"""int4-offset: int4 whose groups have an offset of any size in place of a zero.

    codes   uint8[N, K / 2]         as in int4
    words   int32[N, K / group]     as in int4, zeros 8
    offsets float32[N, K / group]
    weight  (code - 8) * scale + offset
    linear  products of x and code - 8 as in int4, and sums of x over groups times offsets, added in float32,
            the whole rounded once. Where the weight is unpacked for a library's product it is rounded to the
            dtype of x, as in eager mode.

For weights that others rounded so (torchao, whose zeros are numbers and no codes), and for groups that are
far from 0: int4 spends codes on the way there. Kernels read codes as those of int4 do, and leave sums of x
and their product to the library: three more launches. An infinity in x gives no finite number, NaN perhaps
where a dense product gives an infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from graphopt.packing import Layout
from graphopt_kernels.quantized.group_products import GroupWeight, int4_weight, product, unpacked
from graphopt_kernels.quantized.group_rounding import Codes
from graphopt_kernels.quantized.int4 import Group, Grouped
from graphopt_kernels.quantized.operators import define_operators
from graphopt_kernels.quantized.scratch import beside_offset_groups

__all__ = ["Int4Offset", "linear_int4_offset"]

_TOP = 15
_MIDDLE = 8


def linear_int4_offset(
    x: torch.Tensor,
    codes: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """``x`` [..., K] times the weight, ``bias`` [N] added: [..., N] of the dtype of ``x``."""
    return product(x, _weight(codes, words, offsets, group), bias)


def _unpack(
    codes: torch.Tensor, words: torch.Tensor, offsets: torch.Tensor, group: int, dtype: torch.dtype
) -> torch.Tensor:
    return unpacked(_weight(codes, words, offsets, group), None, dtype)


def _weight(codes: torch.Tensor, words: torch.Tensor, offsets: torch.Tensor, group: int) -> GroupWeight:
    return replace(int4_weight(codes, words, group), offsets=offsets.float())


def _shape(codes: torch.Tensor, words: torch.Tensor, offsets: torch.Tensor, group: int) -> tuple[int, int]:
    return codes.shape[0], words.shape[1] * group


define_operators(
    "int4_offset",
    ("codes", "words", "offsets"),
    ("int group",),
    unpack=_unpack,
    linear=linear_int4_offset,
    shape=_shape,
    scratch=beside_offset_groups,
)


@dataclass(frozen=True)
class Int4Offset(Grouped):
    """Four bits a weight, from the least of a group to the largest. ``group`` as in int4."""

    group: Group = 128

    name: ClassVar[str] = "int4-offset"
    summary: ClassVar[str] = "4 bits a weight, a scale and an offset for each group"
    unpack_op: ClassVar[str] = "graphopt::unpack_int4_offset"
    linear_op: ClassVar[str] = "graphopt::linear_int4_offset"
    by_rows: ClassVar[bool] = True

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        n, k = weight.shape
        wide = weight.float().reshape(n, k // self.group, self.group)
        low, high = wide.amin(-1), wide.amax(-1)
        scales = (high / _TOP - low / _TOP).to(torch.bfloat16).float()
        flat = scales == 0
        scales = torch.where(flat, 1.0, scales)
        codes = ((wide - low[..., None]) / scales[..., None]).round().clamp(0, _TOP)
        # One number, or nearly: the code that offsets stand for.
        codes = torch.where(flat[..., None], float(_MIDDLE), codes).to(torch.uint8).view(n, k)
        offsets = torch.where(flat, low, low + _MIDDLE * scales)
        zeros = torch.full_like(scales, _MIDDLE)
        return {**self.packed(Codes(codes, scales, zeros)), "offsets": offsets}

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        return {**super().layout(n, k, dtype), "offsets": (torch.float32, (n, k // self.group))}
