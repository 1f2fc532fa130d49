"""int4-ordered: int4 whose groups are not of neighbours: inputs are put in another order first.

    codes   uint8[N, K / 2]      as in int4, of the columns ``order`` of the weight
    words   int32[N, K / group]
    order   int32[K]             which input comes at each place: a permutation
    linear  x[..., order] times the weight, as in int4

GPTQ rounds better where columns of large inputs come first, since later ones make good what those are off
(``act-order`` of the code of https://arxiv.org/abs/2210.17323). Groups are then of columns that are alike,
and x has to be read in their order: one more kernel, of K elements a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.packing import Layout
from graphopt_kernels.quantized.group_products import int4_weight, product, unpacked
from graphopt_kernels.quantized.group_rounding import error_feedback
from graphopt_kernels.quantized.int4 import Group, Grouped, lacks_gram
from graphopt_kernels.quantized.operators import define_operators
from graphopt_kernels.quantized.scratch import beside_scaled_groups, beside_unpacked_in_order

__all__ = ["Int4Ordered", "linear_int4_ordered"]


def linear_int4_ordered(
    x: torch.Tensor,
    codes: torch.Tensor,
    words: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """``x`` [..., K] times the weight, ``bias`` [N] added: [..., N] of the dtype of ``x``."""
    return product(x.index_select(-1, order), int4_weight(codes, words, group), bias)


def _unpack(
    codes: torch.Tensor, words: torch.Tensor, order: torch.Tensor, group: int, dtype: torch.dtype
) -> torch.Tensor:
    ordered = unpacked(int4_weight(codes, words, group), None, dtype)
    return torch.empty_like(ordered).index_copy_(1, order.long(), ordered)


def _shape(codes: torch.Tensor, words: torch.Tensor, order: torch.Tensor, group: int) -> tuple[int, int]:
    return codes.shape[0], words.shape[1] * group


define_operators(
    "int4_ordered",
    ("codes", "words", "order"),
    ("int group",),
    unpack=_unpack,
    linear=linear_int4_ordered,
    shape=_shape,
    scratch=beside_scaled_groups,
    unpack_scratch=beside_unpacked_in_order,
)


@dataclass(frozen=True)
class Int4Ordered(Grouped):
    """Four bits a weight, rounded by GPTQ in the order of the size of inputs. ``group`` and ``symmetric`` as
    in int4."""

    group: Group = 128
    symmetric: bool = False

    name: ClassVar[str] = "int4-ordered"
    summary: ClassVar[str] = "4 bits a weight, groups of inputs that are alike, by GPTQ"
    unpack_op: ClassVar[str] = "graphopt::unpack_int4_ordered"
    linear_op: ClassVar[str] = "graphopt::linear_int4_ordered"

    def lacks(self, k: int, statistics: Mapping[str, torch.Tensor]) -> Reason | None:
        return lacks_gram(k, statistics)

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        exact = weight.float()
        gram = self.gram(exact.shape[1], statistics).to(exact)
        order = gram.diagonal().argsort(descending=True, stable=True)
        moved = exact.index_select(1, order).contiguous()
        rounded = error_feedback(moved, self.group, self.symmetric, gram[order][:, order])
        return {**self.packed(rounded), "order": order.int()}

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        return {**super().layout(n, k, dtype), "order": (torch.int32, (k,))}

    def refuses_packed(
        self, packed: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype
    ) -> Reason | None:
        reason = super().refuses_packed(packed, n, k, dtype)
        if reason is None:
            order = packed["order"]
            if not torch.equal(order.sort().values, torch.arange(k, device=order.device, dtype=order.dtype)):
                return Reason(f"its order is no permutation of {k} inputs")
        return reason
