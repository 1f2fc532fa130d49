"""Kernels that read exponents of four bits, in Triton's interpreter; prints how far they are from float64.

Run by ``tests/test_quantized_exponents.py``.
"""

from __future__ import annotations

import json
import math

import torch

from graphopt_kernels.quantized import exponents, exponents_triton
from graphopt_kernels.quantized.byte_launch import Launch
from graphopt_kernels.quantized.exponent_launch import Exponents

FP16, FP32 = torch.float16, torch.float32
SLICES = Launch("slices", 8, 16, 32, 2, 1, 2, 1)
TILES = Launch("tiles", 16, 32, 32, 1, 1, 2, 1)
CASES = [
    # rows, columns, inner, dtype of x, launch, bias
    (1, 16, 128, FP32, SLICES, True),
    (3, 37, 100, FP16, SLICES, True),
    (5, 20, 250, FP32, SLICES._replace(parts=2), True),
    (9, 33, 64, FP32, TILES, False),
    (20, 35, 203, FP16, TILES._replace(parts=3), True),
]


def weight_of(columns: int, inner: int) -> torch.Tensor:
    """With escapes on either side of the window, in the first and last column, and signed zeros."""
    torch.manual_seed(columns)
    weight = torch.randn(columns, inner) / inner**0.5
    weight[1, 0], weight[2, inner - 1], weight[3, 5], weight[3, inner // 2] = 900.0, -1e-7, -0.0, 1e-39
    weight[4] = 0
    weight[5] *= 1e-38
    return weight.bfloat16()


def main() -> None:
    scheme, errors = exponents.Lossless12(), {}
    for number, (rows, n, k, dtype, launch, biased) in enumerate(CASES):
        weight = weight_of(n, k)
        packed = tuple(scheme.pack(weight, {}).values())
        # Every other element of longer rows: x need not be contiguous.
        x, bias = torch.randn(rows, 2 * k)[:, ::2].to(dtype), torch.randn(n).to(dtype)
        problem = Exponents(rows, n, k, packed[1].shape[1])
        result = exponents.launch_linear(
            exponents_triton, problem, launch, x, packed, bias if biased else None
        )
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if biased else None)
        assert result.dtype is dtype and result.shape == exact.shape
        scale = torch.nn.functional.linear(x.abs().double(), weight.abs().double()) + bias.abs()
        errors[f"{number}: {launch.kind}"] = float(((result.double() - exact).abs() / scale).max())
    unpacked = []
    for n, k in ((13, 77), (8, 64), (7, 1000)):
        weight = weight_of(n, k)
        found = exponents.launch_unpack(exponents_triton, *scheme.pack(weight, {}).values())
        unpacked.append(torch.equal(found.view(torch.int16), weight.view(torch.int16)))
    poisoned = {}
    for name, launch in (("slices", SLICES), ("tiles", TILES)):
        weight = weight_of(16, 64)
        packed = tuple(scheme.pack(weight, {}).values())
        x = torch.randn(5, 64)
        # Rows 1 to 3 of the weight have escapes in these columns, the fourth is zero.
        for row, (column, value) in enumerate(((0, math.inf), (63, -math.inf), (5, math.inf), (9, math.nan))):
            x[row, column] = value
        problem = Exponents(5, 16, 64, packed[1].shape[1])
        result = exponents.launch_linear(exponents_triton, problem, launch, x, packed, None)
        dense = torch.nn.functional.linear(x.double(), weight.double())
        poisoned[name] = [
            torch.equal(result.isnan(), dense.isnan()),
            torch.equal(result[dense.isinf()].double(), dense[dense.isinf()]),
            torch.equal(result.isfinite(), dense.isfinite()),
        ]
    print(json.dumps({"errors": errors, "unpacked": unpacked, "poisoned": poisoned}))


if __name__ == "__main__":
    main()
