"""int2 and int3: weights in two or three bits, groups of neighbours share a scale and a zero; some blocks of
each row have four.

    codes   uint8[N, K / 4]      the upper two bits of codes, four in a byte (``planes``); rows filled up to
                                 whole units
    thirds  uint8[N, K / 8]      int3: the bits below
    words   int32[N, K / group]  the scale, a bfloat16, in the upper half; eight times the zero in the lowest
                                 seven bits; above them, of the first group of a unit, which slot of
                                 ``extra`` it has, counted from 1, or 0. Without outliers as in int4: the
                                 scale is a float32 without its last eight bits
    extra   uint8[N, slots * width]  the lowest bits of the units that have four
    weight  (code - zero) * scale, codes being those of four bits, with zeros where bits are not there
    linear  as int4: (code - zero) is exact in the dtype of x, sums are float32

A unit is ``4 * width`` neighbours with two bits, ``8 * width`` with three: 128 and 256, or half of that where
rows or groups are not made of such. Units with four bits are the share ``outliers`` of those of each row, the
ones whose squared error shrinks most by it, columns weighed by the mean square of their inputs where
statistics know it. So sizes depend on the shape alone.

The idea of some groups with four bits among those with two: "Enabling Fast 2-bit LLM on GPUs: Memory
Alignment and Asynchronous Dequantization" (https://arxiv.org/abs/2311.16442). Here the other groups have no
codes of another kind: they are codes of four bits whose lowest are 0, so one loop reads all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from graphopt.candidate import Reason
from graphopt.packing import Layout
from graphopt_kernels.quantized.group_products import GroupWeight, product, unpacked
from graphopt_kernels.quantized.group_rounding import (
    Codes,
    error_feedback,
    half_quadratic,
    nearest,
    reason_of_words,
    words_of,
)
from graphopt_kernels.quantized.int4 import Grouped, lacks_gram
from graphopt_kernels.quantized.nibbles import SCALE, SHORT_SCALE
from graphopt_kernels.quantized.operators import define_operators
from graphopt_kernels.quantized.planes import pack_planes, unit_of
from graphopt_kernels.quantized.scratch import beside_groups

__all__ = ["Int2", "Int3", "linear_int2", "linear_int3", "low_weight", "slots_of", "width_of"]

_SQUARES = "second-moment"
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Of the range of a group: with few codes, numbers far out cost the others more than they are worth."""

_MOST = 511
"""Slots that nine bits of a word can name."""


def width_of(bits: int, group: int, k: int) -> int:
    """Bytes of a plane that a step reads of a row of ``k`` weights: 32; 16 where that fills up less."""
    whole = k % unit_of(bits, 32) == 0
    return 32 if whole or group > unit_of(bits, 16) else 16


def slots_of(bits: int, group: int, k: int, outliers: float) -> int:
    """Units of each row that have four bits."""
    units = -(-k // unit_of(bits, width_of(bits, group, k)))
    return int(outliers * units + 0.5)


def low_weight(
    codes: torch.Tensor, thirds: torch.Tensor | None, words: torch.Tensor, extra: torch.Tensor, group: int
) -> GroupWeight:
    """The weight that they hold."""
    bits, inner = 2 if thirds is None else 3, words.shape[1] * group
    width = width_of(bits, group, inner)
    return GroupWeight(
        codes, words, words, inner, group, width, levels=False, bits=bits, thirds=thirds, extra=extra
    )


def linear_int2(
    x: torch.Tensor,
    codes: torch.Tensor,
    words: torch.Tensor,
    extra: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """``x`` [..., K] times the weight, ``bias`` [N] added: [..., N] of the dtype of ``x``."""
    return product(x, low_weight(codes, None, words, extra, group), bias)


def linear_int3(
    x: torch.Tensor,
    codes: torch.Tensor,
    thirds: torch.Tensor,
    words: torch.Tensor,
    extra: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """The same with three bits."""
    return product(x, low_weight(codes, thirds, words, extra, group), bias)


def _unpack2(
    codes: torch.Tensor, words: torch.Tensor, extra: torch.Tensor, group: int, dtype: torch.dtype
) -> torch.Tensor:
    return unpacked(low_weight(codes, None, words, extra, group), None, dtype)


def _unpack3(
    codes: torch.Tensor,
    thirds: torch.Tensor,
    words: torch.Tensor,
    extra: torch.Tensor,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return unpacked(low_weight(codes, thirds, words, extra, group), None, dtype)


def _shape2(
    codes: torch.Tensor, words: torch.Tensor, extra: torch.Tensor, group: int
) -> tuple[int, int]:
    return codes.shape[0], words.shape[1] * group


def _shape3(
    codes: torch.Tensor, thirds: torch.Tensor, words: torch.Tensor, extra: torch.Tensor, group: int
) -> tuple[int, int]:
    return codes.shape[0], words.shape[1] * group


define_operators(
    "int2",
    ("codes", "words", "extra"),
    ("int group",),
    unpack=_unpack2,
    linear=linear_int2,
    shape=_shape2,
    scratch=beside_groups,
)
define_operators(
    "int3",
    ("codes", "thirds", "words", "extra"),
    ("int group",),
    unpack=_unpack3,
    linear=linear_int3,
    shape=_shape3,
    scratch=beside_groups,
)


class _LowBits(Grouped):
    """``symmetric``, ``method`` and ``outliers`` are fields of each subclass."""

    bits: ClassVar[int]
    symmetric: bool
    method: str
    outliers: float

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        if not 0 <= self.outliers <= 1:
            return Reason(f"outliers={self.outliers:g} is no share of a row: expected 0 to 1")
        if self.symmetric and self.method == "hqq":
            return Reason("method=hqq moves zeros, which symmetric=true keeps")
        reason = super().refuses(n, k, dtype, device)
        if reason is None and (slots := self._slots(k)) > _MOST:
            return Reason(f"{slots} outliers of a row are more than the {_MOST} that can be told apart")
        return reason

    def lacks(self, k: int, statistics: Mapping[str, torch.Tensor]) -> Reason | None:
        if self.method == "gptq":
            return lacks_gram(k, statistics)
        squares = statistics.get(_SQUARES)
        if squares is not None and tuple(squares.shape) != (k,):
            return Reason(f"{_SQUARES} has shape {tuple(squares.shape)}: expected ({k},)")
        return None

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        exact = weight.float().contiguous()
        n, k = exact.shape
        gram = self.gram(k, statistics) if self.method == "gptq" else None
        importance = statistics.get(_SQUARES) if gram is None else gram.diagonal()
        chosen = self._chosen(exact, importance, self._slots(k))
        groups = torch.zeros((n, -(-k // self._unit(k))), dtype=torch.bool, device=exact.device)
        groups.scatter_(1, chosen, True)
        groups = groups.repeat_interleave(self._unit(k) // self.group, 1)[:, : k // self.group]
        return self._kept(self._rounded(exact, torch.where(groups, 15, 2**self.bits - 1), gram), chosen)

    def _kept(self, rounded: Codes, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        """Packed tensors of codes of four bits; units of ``chosen`` int64[N, slots] keep all of theirs."""
        n, k = rounded.codes.shape
        width, slots = width_of(self.bits, self.group, k), chosen.shape[1]
        planes = pack_planes(rounded.codes, self.bits, width)
        words = words_of(rounded)
        order = torch.arange(1, slots + 1, dtype=torch.int32, device=words.device)
        first = chosen * (self._unit(k) // self.group)
        words.scatter_add_(1, first, (order << 7).expand(n, slots))
        extra = planes.extra.gather(1, chosen[:, :, None].expand(-1, -1, width))
        middle = {} if planes.thirds is None else {"thirds": planes.thirds}
        return {"codes": planes.pairs, **middle, "words": words, "extra": extra.reshape(n, slots * width)}

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        unit, width = self._unit(k), width_of(self.bits, self.group, k)
        units = -(-k // unit)
        thirds = {"thirds": (torch.uint8, (n, units * width))} if self.bits == 3 else {}
        return {
            "codes": (torch.uint8, (n, units * unit // 4)),
            **thirds,
            "words": (torch.int32, (n, k // self.group)),
            "extra": (torch.uint8, (n, self._slots(k) * width)),
        }

    def refuses_packed(
        self, packed: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype
    ) -> Reason | None:
        reason, slots = super().refuses_packed(packed, n, k, dtype), self._slots(k)
        if reason is not None or not slots:
            return reason
        named = packed["words"] >> 7 & _MOST
        first = named[:, :: self._unit(k) // self.group]
        if bool((first > slots).any()) or int(named.sum()) != int(first.sum()):
            return Reason(f"its words name others than the {slots} slots of a row, or within a unit")
        return None

    def reason_of(self, words: torch.Tensor) -> Reason | None:
        return reason_of_words(words, SHORT_SCALE if self._slots(words.shape[1] * self.group) else SCALE)

    def packed(self, rounded: Codes) -> dict[str, torch.Tensor]:
        """Planes and words of a rounded weight without outliers."""
        n = rounded.codes.shape[0]
        return self._kept(rounded, torch.empty((n, 0), dtype=torch.int64, device=rounded.codes.device))

    def exact(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
    ) -> dict[str, torch.Tensor] | Reason:
        if self._slots(codes.shape[1]):
            return Reason(f"outliers={self.outliers:g} have codes of four bits: expected 0")
        return super().exact(codes, scales, zeros)

    def _rounded(self, exact: torch.Tensor, tops: torch.Tensor | int, gram: torch.Tensor | None) -> Codes:
        if gram is not None:
            return error_feedback(exact, self.group, self.symmetric, gram, tops, _SHARES)
        if self.method == "hqq":
            return half_quadratic(exact, self.group, tops, _SHARES)
        return nearest(exact, self.group, self.symmetric, tops, _SHARES)

    def _chosen(self, exact: torch.Tensor, importance: torch.Tensor | None, slots: int) -> torch.Tensor:
        """Units of each row that gain most from four bits, int64[N, slots], in order."""
        n, k = exact.shape
        if not slots:
            return torch.empty((n, 0), dtype=torch.int64, device=exact.device)
        # With 16 levels narrower ranges change little.
        few, four = (
            (nearest(exact, self.group, self.symmetric, top, shares).weight() - exact).square()
            for top, shares in ((2**self.bits - 1, _SHARES), (15, (1.0,)))
        )
        gain = few - four
        if importance is not None:
            gain *= importance.to(gain)
        unit = self._unit(k)
        units = -(-k // unit)
        gain = torch.nn.functional.pad(gain, (0, units * unit - k)).view(n, units, unit).sum(-1)
        return gain.topk(slots, 1).indices.sort(1).values

    def _unit(self, k: int) -> int:
        return unit_of(self.bits, width_of(self.bits, self.group, k))

    def _slots(self, k: int) -> int:
        return slots_of(self.bits, self.group, k, self.outliers)


@dataclass(frozen=True)
class Int2(_LowBits):
    """Two bits a weight. ``group``, ``symmetric`` and ``method`` as in int4; ``outliers``: share of the
    blocks of a row that have four bits."""

    group: Literal[32, 64, 128] = 64
    symmetric: bool = False
    method: Literal["rtn", "hqq", "gptq"] = "rtn"
    outliers: float = 0.0625

    bits: ClassVar[int] = 2
    name: ClassVar[str] = "int2"
    summary: ClassVar[str] = "2 bits a weight, a scale and a zero for each group, 4 bits where it is off most"
    unpack_op: ClassVar[str] = "graphopt::unpack_int2"
    linear_op: ClassVar[str] = "graphopt::linear_int2"
    by_rows: ClassVar[bool] = True


@dataclass(frozen=True)
class Int3(_LowBits):
    """Three bits a weight. Options as those of int2."""

    group: Literal[32, 64, 128] = 64
    symmetric: bool = False
    method: Literal["rtn", "hqq", "gptq"] = "rtn"
    outliers: float = 0.0625

    bits: ClassVar[int] = 3
    name: ClassVar[str] = "int3"
    summary: ClassVar[str] = "3 bits a weight, a scale and a zero for each group, 4 bits where it is off most"
    unpack_op: ClassVar[str] = "graphopt::unpack_int3"
    linear_op: ClassVar[str] = "graphopt::linear_int3"
    by_rows: ClassVar[bool] = True
