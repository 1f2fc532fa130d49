"""int4 and int4-awq: weights in four bits, groups of neighbours share a scale and a zero.

    codes   uint8[N, K / 2]      two in a byte, in blocks of 128, or of 64 where 128 does not divide K or
                                 group is 32 (``nibbles``); rows filled up to whole blocks
    words   int32[N, K / group]  the scale, a float32 without its last eight bits, which hold eight times the
                                 zero, below 128
    factors float32[K]           int4-awq: what x is multiplied by first
    weight  (code - zero) * scale * factor
    linear  (code - zero) is exact in the dtype of x, products are added in float32, those of a group scaled
            as they are added to those before, the whole rounded once. Where the weight is unpacked for a
            library's product it is rounded to the dtype of x, as in eager mode.

Scales are rounded to bfloat16 here; those of others are kept as they are, float16 among them.
``symmetric`` keeps zeros at 8: the same bytes, for weights that others have rounded so. Ways to round are
described in ``group_rounding``. ``gptq`` and ``int4-awq`` need ``gram`` among the statistics, the
mean of products of inputs, float32[K, K].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from graphopt.candidate import Reason
from graphopt.errors import QuantizationError
from graphopt.packing import Layout, Scheme
from graphopt_kernels.quantized.group_products import GROUPS, half_of, int4_weight, product, unpacked
from graphopt_kernels.quantized.group_rounding import (
    Codes,
    channel_factors,
    error_feedback,
    half_quadratic,
    nearest,
    reason_of_words,
    words_of,
)
from graphopt_kernels.quantized.nibbles import pack_nibbles
from graphopt_kernels.quantized.operators import define_operators
from graphopt_kernels.quantized.scratch import beside_groups, beside_scaled_groups

__all__ = ["Group", "Grouped", "Int4", "Int4Awq", "lacks_gram", "linear_int4", "linear_int4_awq"]

Group = Literal[32, 64, 128]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GRAM = "gram"


def linear_int4(
    x: torch.Tensor, codes: torch.Tensor, words: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    """``x`` [..., K] times the weight, ``bias`` [N] added: [..., N] of the dtype of ``x``."""
    return product(x, int4_weight(codes, words, group), bias)


def linear_int4_awq(
    x: torch.Tensor,
    codes: torch.Tensor,
    words: torch.Tensor,
    factors: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """The same with ``x * factors``, rounded to the dtype of ``x``."""
    return product((x.float() * factors.float()).to(x.dtype), int4_weight(codes, words, group), bias)


def _unpack(codes: torch.Tensor, words: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    return unpacked(int4_weight(codes, words, group), None, dtype)


def _unpack_awq(
    codes: torch.Tensor, words: torch.Tensor, factors: torch.Tensor, group: int, dtype: torch.dtype
) -> torch.Tensor:
    return unpacked(int4_weight(codes, words, group), factors.float(), dtype)


def _shape(codes: torch.Tensor, words: torch.Tensor, group: int) -> tuple[int, int]:
    return codes.shape[0], words.shape[1] * group


def _shape_awq(
    codes: torch.Tensor, words: torch.Tensor, factors: torch.Tensor, group: int
) -> tuple[int, int]:
    return _shape(codes, words, group)


define_operators(
    "int4",
    ("codes", "words"),
    ("int group",),
    unpack=_unpack,
    linear=linear_int4,
    shape=_shape,
    scratch=beside_groups,
)
define_operators(
    "int4_awq",
    ("codes", "words", "factors"),
    ("int group",),
    unpack=_unpack_awq,
    linear=linear_int4_awq,
    shape=_shape_awq,
    scratch=beside_scaled_groups,
)


class Grouped(Scheme):
    """Schemes of weights in groups; ``group`` is a field of each subclass."""

    group: int
    bits: ClassVar[int] = 4

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        if dtype not in _DTYPES:
            return Reason(f"takes weights of float32, float16 and bfloat16, got {dtype}")
        if k % self.group:
            fits = [str(group) for group in GROUPS if k % group == 0]
            other = f"group={fits[0]} does" if fits else "neither do 128, 64 and 32"
            return Reason(f"groups of {self.group} do not divide {k} inputs; {other}")
        return None

    def constants(self, n: int, k: int) -> tuple[int, ...]:
        return (self.group,)

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        half = half_of(self.group, k)
        return {
            "codes": (torch.uint8, (n, -(-k // (2 * half)) * half)),
            "words": (torch.int32, (n, k // self.group)),
        }

    def refuses_packed(
        self, packed: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype
    ) -> Reason | None:
        return super().refuses_packed(packed, n, k, dtype) or self.reason_of(packed["words"])

    def reason_of(self, words: torch.Tensor) -> Reason | None:
        """``None``, or why ``words`` hold no scales and zeros."""
        return reason_of_words(words)

    def packed(self, rounded: Codes) -> dict[str, torch.Tensor]:
        """Codes and words of a rounded weight."""
        codes = pack_nibbles(rounded.codes, half_of(self.group, rounded.codes.shape[1]))
        return {"codes": codes, "words": words_of(rounded)}

    def exact(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
    ) -> dict[str, torch.Tensor] | Reason:
        """Packed tensors of ``codes`` uint8[N, K] below 2 ** ``bits``, of ``scales`` and ``zeros``
        [N, K / group] as they are, or why they cannot be held."""
        # As codes of four bits, exactly.
        times = 2 ** (4 - self.bits)
        given, scales, zeros = scales.float(), scales.float() / times, zeros.float() * times
        if not bool(scales.isfinite().all()):
            return Reason("its scales are not finite")
        if bool((scales.contiguous().view(torch.int32) & 255).any() | (scales * times != given).any()):
            return Reason(f"{self.name} keeps scales of 16 bits of mantissa, its scales have more")
        eighths = zeros * 8
        if bool(((eighths < 0) | (eighths > 127) | (eighths != eighths.round())).any()):
            most, step = 15.875 / times, 8 * times
            return Reason(
                f"{self.name} keeps zeros from 0 to {most:g} in steps of 1/{step}, its zeros are others"
            )
        return self.packed(Codes(codes * times, scales, zeros))

    def gram(self, k: int, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean of x x^T; raises ``QuantizationError`` where it is not known."""
        reason = self.lacks(k, statistics)
        if reason is not None:
            raise QuantizationError(f"cannot pack a weight as {self}: {reason}")
        return statistics[_GRAM]


def lacks_gram(k: int, statistics: Mapping[str, torch.Tensor]) -> Reason | None:
    """``None``, or why ``statistics`` hold no mean of x x^T of ``k`` inputs."""
    gram = statistics.get(_GRAM)
    if gram is None:
        return Reason(f"it needs {_GRAM} among the statistics of inputs")
    if tuple(gram.shape) != (k, k):
        return Reason(f"{_GRAM} has shape {tuple(gram.shape)}: expected ({k}, {k})")
    if not bool(torch.isfinite(gram).all()):
        return Reason(f"{_GRAM} is not finite")
    return None


@dataclass(frozen=True)
class Int4(Grouped):
    """Four bits a weight. ``group``: neighbours that share a scale; ``symmetric``: zeros stay at 8;
    ``method``: how numbers are rounded."""

    group: Group = 128
    symmetric: bool = False
    method: Literal["rtn", "hqq", "gptq"] = "rtn"

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "4 bits a weight, a scale and a zero for each group"
    unpack_op: ClassVar[str] = "graphopt::unpack_int4"
    linear_op: ClassVar[str] = "graphopt::linear_int4"
    by_rows: ClassVar[bool] = True

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        if self.symmetric and self.method == "hqq":
            return Reason("method=hqq moves zeros, which symmetric=true keeps")
        return super().refuses(n, k, dtype, device)

    def lacks(self, k: int, statistics: Mapping[str, torch.Tensor]) -> Reason | None:
        return lacks_gram(k, statistics) if self.method == "gptq" else None

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        exact = weight.float().contiguous()
        if self.method == "gptq":
            gram = self.gram(exact.shape[1], statistics)
            return self.packed(error_feedback(exact, self.group, self.symmetric, gram))
        if self.method == "hqq":
            return self.packed(half_quadratic(exact, self.group))
        return self.packed(nearest(exact, self.group, self.symmetric))


@dataclass(frozen=True)
class Int4Awq(Grouped):
    """Four bits a weight, columns of large inputs kept better. ``group`` and ``symmetric`` as in int4."""

    group: Group = 128
    symmetric: bool = False

    name: ClassVar[str] = "int4-awq"
    summary: ClassVar[str] = "4 bits a weight, inputs scaled so that large ones have finer weights"
    unpack_op: ClassVar[str] = "graphopt::unpack_int4_awq"
    linear_op: ClassVar[str] = "graphopt::linear_int4_awq"

    def lacks(self, k: int, statistics: Mapping[str, torch.Tensor]) -> Reason | None:
        return lacks_gram(k, statistics)

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        exact = weight.float().contiguous()
        gram = self.gram(exact.shape[1], statistics)
        rounded, factors = channel_factors(exact, self.group, self.symmetric, gram)
        return {**self.packed(rounded), "factors": factors}

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        return {**super().layout(n, k, dtype), "factors": (torch.float32, (k,))}
