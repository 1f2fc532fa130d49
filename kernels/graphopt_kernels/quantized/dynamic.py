"""int8-dynamic and fp8-dynamic: rows of x are rounded too, each with a scale of its own, as they come.

    codes   int8 or float8_e4m3fn[N, K]   of w * smoothing, rounded as in int8 and fp8
    scales  float32[N]
    factors float32[K], [0] if smooth=0   1 / smoothing, what x is multiplied by before it is rounded
    linear  rounded, scale = quantize_rows(x * factors)
            (rounded @ codes.T) * scale * scales + bias, rounded once

x is rounded whatever the number of its rows, so that a row gives the same result in any batch. Sums of int8
are exact, in int32; float8 is added up in float32, by some tensor cores with fewer bits (Hopper's keep 14 of
a sum of float8 tiles and of the library's product).

``smooth`` (SmoothQuant, https://arxiv.org/abs/2211.10438): channels with large inputs are divided by
``largest_x ** smooth / largest_w ** (1 - smooth)``, and their weights multiplied by it, where calibration
found ``largest``, the largest |x| of each channel. The factor is kept within 1e-5 and 1e5. Without
statistics factors are 1.

A row of x with a NaN is NaN; one with an infinity is NaN too, as infinity over infinity is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.packing import Layout, Scheme
from graphopt_kernels.quantized.byte_products import product, unpacked
from graphopt_kernels.quantized.fp8 import rounded_to_fp8
from graphopt_kernels.quantized.int8 import rounded_to_int8
from graphopt_kernels.quantized.operators import define_operators
from graphopt_kernels.quantized.scratch import beside_rounded
from graphopt_kernels.row_quantize import quantize_reference, quantize_rows, quantize_scaled_rows

__all__ = ["Fp8Dynamic", "Int8Dynamic", "linear_dynamic", "linear_dynamic_reference"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
_LEAST = 1e-12
"""A row of zeros has this scale."""


def linear_dynamic(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    factors: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x`` [..., K], smoothed and rounded to the dtype of ``codes``, times the weight, ``bias`` [N] added:
    [..., N] of the dtype of ``x``."""
    settings = codes.dtype, _LIMITS[codes.dtype], _LEAST
    if factors.numel():
        rounded, by_row = quantize_scaled_rows(x, factors, *settings)
    else:
        rounded, by_row = quantize_rows(x, *settings)
    return product(rounded, codes, scales, bias, by_row, x.dtype)


def linear_dynamic_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    factors: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """What ``linear_dynamic`` computes, in float64 after rounding."""
    smoothed = x.float() * factors if factors.numel() else x
    rounded, by_row = quantize_reference(smoothed, codes.dtype, _LIMITS[codes.dtype], _LEAST)
    result = torch.nn.functional.linear(rounded.double(), codes.double()) * by_row * scales
    return (result if bias is None else result + bias.double()).to(x.dtype)


def _unpack(
    codes: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [N, K] that stands for what x is multiplied by, smoothing undone."""
    if not factors.numel():
        return unpacked(codes, scales, dtype)
    return (codes.float() * scales[:, None] * factors).to(dtype)


def _shape(codes: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1]


for _name in ("int8_dynamic", "fp8_dynamic"):
    define_operators(
        _name,
        ("codes", "scales", "factors"),
        (),
        unpack=_unpack,
        linear=linear_dynamic,
        shape=_shape,
        scratch=beside_rounded,
    )


class _Dynamic(Scheme):
    """``smooth`` is a field of each subclass; ``codes`` is the dtype of them."""

    smooth: float
    codes: ClassVar[torch.dtype]

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        if dtype not in _DTYPES:
            return Reason(f"takes weights of float32, float16 and bfloat16, got {dtype}")
        if not 0 <= self.smooth <= 1:
            return Reason(f"smooth is {self.smooth:g}: expected 0 to 1")
        return None

    def packed(
        self,
        weight: torch.Tensor,
        statistics: Mapping[str, torch.Tensor],
        rounded: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        exact = weight.float()
        factors = exact.new_ones(exact.shape[1] if self.smooth else 0)
        largest = statistics.get("largest")
        if self.smooth and largest is not None and exact.numel():
            largest = largest.to(exact).clamp(min=1e-5)
            smoothing = largest**self.smooth / exact.abs().amax(0).clamp(min=1e-5) ** (1 - self.smooth)
            smoothing = smoothing.clamp(1e-5, 1e5)
            exact, factors = exact * smoothing, 1 / smoothing
        codes, scales = rounded(exact)
        return {"codes": codes, "scales": scales, "factors": factors}

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        factors = torch.float32, (k if self.smooth else 0,)
        return {"codes": (self.codes, (n, k)), "scales": (torch.float32, (n,)), "factors": factors}


@dataclass(frozen=True)
class Int8Dynamic(_Dynamic):
    """Eight bits a weight and an input, scales for rows of both; ``smooth``: how much of the range of inputs
    is moved to weights."""

    smooth: float = 0.0

    name: ClassVar[str] = "int8-dynamic"
    summary: ClassVar[str] = "8 bits a weight and an input, integer products"
    unpack_op: ClassVar[str] = "graphopt::unpack_int8_dynamic"
    linear_op: ClassVar[str] = "graphopt::linear_int8_dynamic"
    codes: ClassVar[torch.dtype] = torch.int8

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.packed(weight, statistics, rounded_to_int8)


@dataclass(frozen=True)
class Fp8Dynamic(_Dynamic):
    """float8 weights and inputs, scales for rows of both; ``smooth`` as in int8-dynamic."""

    smooth: float = 0.0

    name: ClassVar[str] = "fp8-dynamic"
    summary: ClassVar[str] = "float8 weights and inputs, products of float8"
    unpack_op: ClassVar[str] = "graphopt::unpack_fp8_dynamic"
    linear_op: ClassVar[str] = "graphopt::linear_fp8_dynamic"
    codes: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.packed(weight, statistics, rounded_to_fp8)
