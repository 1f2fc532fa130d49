"""llm-int8: inputs that are large in some channels are multiplied there as they are, elsewhere as int8.

    codes     int8[N, K]     of the other columns, rounded as in int8; zero in those of outliers
    scales    float32[N]
    kept      uint8[K]       0 for outliers
    columns   int32[O]       outliers, in order
    outliers  [O, N]         their weights, in the dtype of the weight
    linear    rounded, scale = quantize_rows(x, 0 in columns of outliers)
              (rounded @ codes.T) * scale * scales + x[columns] @ outliers + bias

LLM.int8() (https://arxiv.org/abs/2208.07339), which looks for outliers in every input. Here calibration has
found them: ``largest`` [K], the largest |x| of each channel, above ``threshold``, at most a share of ``most``
of all channels, the largest ones. Sizes are known before there is an input, and nothing waits for a device.

x is rounded whatever the number of its rows. The sum is rounded once, except on a GPU where the library
multiplies, for many rows: what int8 gives is rounded before the outliers are added. Without outliers it is
int8-dynamic exactly.

A row of x with a NaN is NaN, and one with an infinity in a channel that is rounded; an infinity in an outlier
is as in the dense product.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.errors import QuantizationError
from graphopt.packing import Layout, Scheme, scheme_text
from graphopt_kernels.quantized.byte_products import product, unpacked
from graphopt_kernels.quantized.dynamic import linear_dynamic
from graphopt_kernels.quantized.int8 import rounded_to_int8
from graphopt_kernels.quantized.operators import define_operators
from graphopt_kernels.quantized.scratch import beside_outliers
from graphopt_kernels.row_norm_launch import WIDEST, tile
from graphopt_kernels.row_quantize import quantize_rows, warps_and_registers

__all__ = ["LlmInt8", "launch_split", "linear_llm_int8", "split_rows"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LIMIT = 127.0
_LEAST = 1e-12
"""As int8-dynamic."""

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def linear_llm_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    kept: torch.Tensor,
    columns: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x`` [..., K] times the weight, ``bias`` [N] added: [..., N] of the dtype of ``x``."""
    if not columns.numel():
        return linear_dynamic(x, codes, scales, scales.new_empty(0), bias)
    rounded, by_row, beside = split_rows(x, kept, columns)
    return product(rounded, codes, scales, bias, by_row, x.dtype, (beside, outliers.to(x.dtype)))


def split_rows(x: torch.Tensor, kept: torch.Tensor, columns: torch.Tensor) -> Split:
    """``x`` [..., K] in int8, with zeros in ``columns``; float32 scales of its rows [..., 1]; x in
    ``columns`` [..., O]."""
    if x.is_cuda and x.numel() and x.dtype in _DTYPES and x.shape[-1] <= WIDEST:
        found = _kernels()
        if found is not None and torch.cuda.get_device_capability(x.device) >= (8, 0):
            with torch.cuda.device(x.device):
                return launch_split(found, x, kept, columns)
    chosen = columns.long()
    rounded, by_row = quantize_rows(x.index_fill(-1, chosen, 0), torch.int8, _LIMIT, _LEAST)
    return rounded, by_row, x.index_select(-1, chosen)


def launch_split(kernels: Any, x: torch.Tensor, kept: torch.Tensor, columns: torch.Tensor) -> Split:
    """``split_rows`` by ``kernels``, the module of the jitted function."""
    width, count = x.shape[-1], columns.numel()
    total = x.numel() // width
    data = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    by_row = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    beside = x.new_empty((*x.shape[:-1], count))
    block, rows = tile(width)
    kernels.split_kernel[(-(-total // rows),)](
        data, kept, columns, codes, by_row, beside, total, _LIMIT, _LEAST, count,
        WIDTH=width, BLOCK=block, ROWS=rows, WIDE=64, **warps_and_registers(block, False),
    )  # fmt: skip
    return codes, by_row, beside


def _unpack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    kept: torch.Tensor,
    columns: torch.Tensor,
    outliers: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [N, K] of ``dtype``."""
    weight = unpacked(codes, scales, dtype)
    return weight.index_copy_(1, columns.long(), outliers.t().to(dtype))


def _shape(codes: torch.Tensor, *others: torch.Tensor) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1]


define_operators(
    "llm_int8",
    ("codes", "scales", "kept", "columns", "outliers"),
    (),
    unpack=_unpack,
    linear=linear_llm_int8,
    shape=_shape,
    scratch=beside_outliers,
)


@functools.cache
def _kernels() -> Any:
    """The module of the jitted kernel, or ``None`` without triton."""
    try:
        from graphopt_kernels.quantized import outliers_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return outliers_triton


@dataclass(frozen=True)
class LlmInt8(Scheme):
    """int8 weights and inputs; columns whose inputs were above ``threshold`` stay as they are, up to a share
    of ``most`` of them."""

    threshold: float = 6.0
    most: float = 0.01

    name: ClassVar[str] = "llm-int8"
    summary: ClassVar[str] = "8 bits a weight and an input, but for channels with large inputs"
    exact_bytes: ClassVar[bool] = False
    unpack_op: ClassVar[str] = "graphopt::unpack_llm_int8"
    linear_op: ClassVar[str] = "graphopt::linear_llm_int8"

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        if dtype not in _DTYPES:
            return Reason(f"takes weights of float32, float16 and bfloat16, got {dtype}")
        if not self.threshold >= 0:
            return Reason(f"threshold is {self.threshold:g}: expected 0 or more")
        if not 0 <= self.most <= 1:
            return Reason(f"most is {self.most:g}: expected 0 to 1")
        return None

    def refuses_numbers(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> Reason | None:
        largest = statistics.get("largest")
        if largest is None:
            return Reason("it needs calibration: statistics have no 'largest', the largest |x| of each input")
        if largest.shape != weight.shape[1:]:
            return Reason(
                f"statistics are of other inputs: 'largest' is {list(largest.shape)}, "
                f"expected {list(weight.shape[1:])}"
            )
        if bool(largest.isnan().any()):
            return Reason("calibration met NaN: 'largest' holds it")
        return None

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        reason = self.refuses_numbers(weight, statistics)
        if reason is not None:
            raise QuantizationError(f"cannot pack a weight as {scheme_text(self)}: {reason}")
        largest = statistics["largest"].to(weight.device)
        order = largest.argsort(descending=True, stable=True)[: self._most(weight.shape[1])]
        columns = order[largest[order] > self.threshold].sort().values
        kept = torch.ones(weight.shape[1], dtype=torch.uint8, device=weight.device)
        kept[columns] = 0
        codes, scales = rounded_to_int8(torch.where(kept.bool(), weight.float(), 0.0))
        outliers = weight.index_select(1, columns).t().contiguous()
        return {
            "codes": codes, "scales": scales, "kept": kept, "columns": columns.int(), "outliers": outliers,
        }  # fmt: skip

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        most = self._most(k)
        return {
            "codes": (torch.int8, (n, k)),
            "scales": (torch.float32, (n,)),
            "kept": (torch.uint8, (k,)),
            "columns": (torch.int32, (most,)),
            "outliers": (dtype, (most, n)),
        }

    def refuses_packed(
        self, packed: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype
    ) -> Reason | None:
        reason = super().refuses_packed(packed, n, k, dtype)
        if reason is not None:
            return reason
        columns, expected = packed["columns"], (n, k, k, n)
        sizes = (*packed["codes"].shape, *packed["kept"].shape, *packed["scales"].shape)
        if sizes != expected or packed["outliers"].shape != (len(columns), n):
            return Reason(f"its tensors are of a weight {(sizes[0], sizes[1])}, or of other outliers")
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < k:
            return Reason(f"its columns are not below {k}")
        return None

    def _most(self, k: int) -> int:
        return int(self.most * k)
