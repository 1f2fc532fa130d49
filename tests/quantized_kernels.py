"""Kernels that read weights of a byte, in Triton's interpreter; prints what they computed beside float64.

Every case is a launch of ``byte_launch`` on CPU tensors. Run by ``tests/test_quantized_bytes.py``.
"""

from __future__ import annotations

import json

import torch

from graphopt_kernels import row_quantize_triton
from graphopt_kernels.quantized import byte_products, bytes_triton
from graphopt_kernels.quantized.byte_launch import LIBRARY, Launch, Problem, check_launch
from graphopt_kernels.quantized.fp8 import rounded_to_fp8
from graphopt_kernels.quantized.int8 import rounded_to_int8
from graphopt_kernels.row_quantize import launch_rows, quantize_reference

FP16, FP32, INT8, FP8 = torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
LIMITS = {INT8: 127.0, FP8: 448.0}

ROW = Launch("row", 1, 8, 512, 1, 1, 4, 1)
SLICES = Launch("slices", 8, 16, 32, 2, 1, 2, 1)
TILES = Launch("tiles", 16, 32, 32, 1, 1, 2, 1)
CASES = [
    # rows, columns, inner, dtype, codes, rounded, launch, bias
    (1, 24, 128, FP32, INT8, False, ROW, True),
    (1, 13, 100, FP16, FP8, False, ROW, False),
    (1, 13, 1000, FP16, INT8, False, ROW._replace(parts=2), True),
    (1, 24, 2048, FP32, INT8, False, ROW._replace(columns=4, inner=1024, warps=2), True),
    (3, 37, 100, FP16, INT8, False, SLICES, True),
    (3, 32, 128, FP16, FP8, False, SLICES, False),
    (1, 16, 250, FP16, INT8, False, SLICES._replace(parts=2), True),
    (9, 33, 64, FP16, INT8, False, TILES, True),
    (20, 32, 100, FP16, FP8, False, TILES._replace(parts=2), True),
    (3, 37, 100, FP16, INT8, True, SLICES, True),
    (2, 16, 128, FP16, FP8, True, SLICES, False),
    (17, 33, 100, FP16, INT8, True, TILES._replace(parts=2), True),
    (5, 32, 64, FP16, FP8, True, TILES, False),
]


def inputs(rows: int, columns: int, inner: int, dtype: torch.dtype, codes: torch.dtype) -> tuple:  # type: ignore[type-arg]
    torch.manual_seed(rows)
    weight = torch.randn(columns, inner) / inner**0.5
    packed = (rounded_to_int8 if codes is INT8 else rounded_to_fp8)(weight)
    # Every other element of longer rows: x need not be contiguous.
    x = torch.randn(rows, 2 * inner)[:, ::2].to(dtype)
    return x, *packed, torch.randn(columns).to(dtype)


def main() -> None:
    errors = {}
    for number, (rows, n, k, dtype, kind, rounded, launch, biased) in enumerate(CASES):
        problem = Problem(rows, n, k, dtype, kind, rounded)
        assert check_launch(problem, launch) is None, (problem, launch)
        x, codes, scales, bias = inputs(rows, n, k, dtype, kind)
        given, x_scales = quantize_reference(x, kind, LIMITS[kind], 1e-12) if rounded else (x, None)
        added = bias if biased else None
        result = byte_products.launch_product(
            bytes_triton, problem, launch, given, codes, scales, added, x_scales
        )
        exact = torch.nn.functional.linear(given.double(), codes.double()) * scales
        exact = exact if x_scales is None else exact * x_scales
        exact = exact + bias.double() if biased else exact
        assert result.dtype is dtype and result.shape == exact.shape
        errors[f"{number}: {launch.kind}"] = float((result.double() - exact).norm() / exact.norm())
    x, codes, scales, _ = inputs(4, 13, 70, FP32, INT8)
    found = torch.empty(13, 70)
    bytes_triton.unpack_kernel[(2, 2)](codes, scales, found, 13, 70, FAST=False, BLOCK_N=8, BLOCK_K=64)
    same = torch.equal(found, byte_products.unpacked_reference(codes, scales, FP32))
    sums = torch.randint(-(2**20), 2**20, (3, 13), dtype=torch.int32)
    by_row, scaled = torch.rand(3, 1), torch.empty(3, 13)
    bytes_triton.scale_kernel[(3, 1)](
        sums, by_row, scales[:13], scales[:13], scaled, 13, BIASED=True, BLOCK=16
    )
    expected = sums.double() * by_row * scales + scales
    poisoned = {}
    for name, launch in (("row", ROW), ("slices", SLICES), ("tiles", TILES)):
        x, codes, scales, _ = inputs(1, 16, 64, FP16, INT8)
        x[0, 3], codes[:8, 3] = float("inf"), 0
        result = byte_products.launch_product(
            bytes_triton, Problem(1, 16, 64, FP16, INT8), launch, x, codes, scales, None, None
        )
        dense = torch.nn.functional.linear(x.double(), codes.double() * scales[:, None])
        poisoned[name] = [
            torch.equal(result.isnan(), dense.isnan()), torch.equal(result.isinf(), dense.isinf()),
        ]  # fmt: skip
    # The library's product of integers, a few rows at a time.
    x, codes, scales, bias = inputs(40, 24, 64, FP16, INT8)
    given, x_scales = quantize_reference(x, INT8, 127.0, 1e-12)
    byte_products._BLOCK = 17 * 24 * 4
    found = byte_products.launch_product(
        bytes_triton, Problem(40, 24, 64, FP16, INT8, True), LIBRARY, given, codes, scales, bias, x_scales
    )
    exact = torch.nn.functional.linear(given.double(), codes.double()) * scales * x_scales + bias.double()
    errors["library"] = float((found.double() - exact).norm() / exact.norm())
    factors = torch.rand(64) * 3
    # The interpreter carries wrongly as it rounds to float8: of that, scales are compared.
    smoothed = [
        launch_rows(row_quantize_triton, x, None, kind, LIMITS[kind], 1e-12, factors=factors)
        for kind in (INT8, FP8)
    ]
    expected_rows = [
        quantize_reference(x.float() * factors, kind, LIMITS[kind], 1e-12) for kind in (INT8, FP8)
    ]
    same_rows = torch.equal(smoothed[0][0], expected_rows[0][0]) and all(
        torch.equal(one[1], other[1]) for one, other in zip(smoothed, expected_rows, strict=True)
    )
    print(
        json.dumps(
            {
                "smoothed": same_rows,
                "errors": errors,
                "unpacked": same,
                "scaled": float((scaled - expected).abs().max() / expected.abs().max()),
                "poisoned": poisoned,
            }
        )
    )


if __name__ == "__main__":
    main()
