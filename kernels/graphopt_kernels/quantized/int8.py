"""int8: weights of a row share a scale, inputs stay as they are.

    codes  int8[N, K]       round(w / scale), half to even, at most 127 in size
    scales float32[N]       largest weight of a row over 127
    linear_int8             (x @ codes.T) * scales + bias, products added in float32, rounded once

A row of zeros has scale 1. Source: symmetric weight-only quantization per channel, as in LLM.int8()
(https://arxiv.org/abs/2208.07339) without its outliers.
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

__all__ = ["Int8", "linear_int8", "rounded_to_int8"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST = 127.0


def linear_int8(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x`` [..., K] times the weight, scaled after the sum; ``bias`` [N] added: [..., N] of the dtype of
    ``x``."""
    return product(x, codes, scales, bias)


def _shape(codes: torch.Tensor, scales: torch.Tensor) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1]


define_operators(
    "int8",
    ("codes", "scales"),
    (),
    unpack=unpacked,
    linear=linear_int8,
    shape=_shape,
    scratch=beside_weight_only,
)


def rounded_to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8[N, K] and scales float32[N] of a ``weight`` float32[N, K]."""
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0)
    codes = (weight / scales[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return codes.to(torch.int8), scales


@dataclass(frozen=True)
class Int8(Scheme):
    """Eight bits a weight, a scale for each row. No options."""

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "8 bits a weight, one scale for each output"
    unpack_op: ClassVar[str] = "graphopt::unpack_int8"
    linear_op: ClassVar[str] = "graphopt::linear_int8"
    by_rows: ClassVar[bool] = True

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        if dtype not in _DTYPES:
            return Reason(f"takes weights of float32, float16 and bfloat16, got {dtype}")
        return None

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        codes, scales = rounded_to_int8(weight.float())
        return {"codes": codes, "scales": scales}

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        return {"codes": (torch.int8, (n, k)), "scales": (torch.float32, (n,))}
