"""fp8: weights in float8_e4m3fn, those of a row share a scale, inputs stay as they are.

    codes  float8_e4m3fn[N, K]   w / scale, half to even
    scales float32[N]            largest weight of a row over 448
    linear_fp8                   (x @ codes.T) * scales + bias, products added in float32, rounded once

Four bits of a number that is not the largest stay, whatever its size, where int8 keeps as many as it needs
below the largest one: better for rows with outliers, worse for even ones. A row of zeros has scale 1.
Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.packing import Layout, Scheme
from graphopt_kernels.quantized.byte_products import product, unpacked
from graphopt_kernels.quantized.operators import define_operators
from graphopt_kernels.quantized.scratch import beside_weight_only

__all__ = ["Fp8", "linear_fp8", "rounded_to_fp8"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def linear_fp8(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x`` [..., K] times the weight, scaled after the sum; ``bias`` [N] added: [..., N] of the dtype of
    ``x``."""
    return product(x, codes, scales, bias)


def _shape(codes: torch.Tensor, scales: torch.Tensor) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1]


define_operators(
    "fp8",
    ("codes", "scales"),
    (),
    unpack=unpacked,
    linear=linear_fp8,
    shape=_shape,
    scratch=beside_weight_only,
)


def rounded_to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8_e4m3fn[N, K] and scales float32[N] of a ``weight`` float32[N, K]."""
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0)
    codes = (weight / scales[:, None]).clamp(-_LARGEST, _LARGEST)
    return codes.to(torch.float8_e4m3fn), scales


@dataclass(frozen=True)
class Fp8(Scheme):
    """float8_e4m3fn, a scale for each row. No options."""

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "float8 weights, one scale for each output"
    unpack_op: ClassVar[str] = "graphopt::unpack_fp8"
    linear_op: ClassVar[str] = "graphopt::linear_fp8"
    by_rows: ClassVar[bool] = True

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        if dtype not in _DTYPES:
            return Reason(f"takes weights of float32, float16 and bfloat16, got {dtype}")
        return None

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        codes, scales = rounded_to_fp8(weight.float())
        return {"codes": codes, "scales": scales}

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        return {"codes": (torch.float8_e4m3fn, (n, k)), "scales": (torch.float32, (n,))}
