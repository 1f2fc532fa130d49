"""Kernels of llm-int8 in Triton's interpreter; prints how far they are from float64.

Run by ``tests/test_quantized_outliers.py``.
"""

from __future__ import annotations

import json
import math

import torch

from graphopt_kernels.quantized import byte_products, bytes_triton, outliers, outliers_triton
from graphopt_kernels.quantized.byte_launch import Launch, Problem, check_launch
from graphopt_kernels.row_quantize import quantize_reference

FP16, FP32, INT8 = torch.float16, torch.float32, torch.int8
SLICES = Launch("slices", 8, 16, 32, 2, 1, 2, 1)
TILES = Launch("tiles", 16, 32, 32, 1, 1, 2, 1)
CASES = [
    # rows, columns, inner, outliers, dtype, launch, bias
    (1, 16, 128, 1, FP16, SLICES, True),
    (3, 37, 100, 40, FP16, SLICES._replace(parts=2), True),
    (9, 33, 100, 7, FP32, TILES, False),
    (20, 35, 203, 5, FP16, TILES._replace(parts=2), True),
]


def main() -> None:
    errors, split = {}, []
    for number, (rows, n, k, count, dtype, launch, biased) in enumerate(CASES):
        torch.manual_seed(rows)
        weight, x = (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(rows, 2 * k)[:, ::2].to(dtype)
        large = torch.randperm(k)[:count]
        x[:, large] *= 50
        scheme = outliers.LlmInt8(threshold=0.0, most=(count + 0.5) / k)
        packed = scheme.pack(weight, {"largest": x.abs().amax(0)})
        codes, scales, kept, columns, exact = packed.values()
        found = outliers.launch_split(outliers_triton, x, kept, columns)
        chosen = columns.long()
        rounded, by_row = quantize_reference(x.index_fill(1, chosen, 0), INT8, 127.0, 1e-12)
        split.append([torch.equal(found[0], rounded), torch.equal(found[1], by_row)])
        split[-1].append(torch.equal(found[2], x[:, chosen]))
        problem = Problem(rows, n, k, dtype, INT8, True)
        assert check_launch(problem, launch) is None
        bias = torch.randn(n).to(dtype) if biased else None
        result = byte_products.launch_product(
            bytes_triton, problem, launch, rounded, codes, scales, bias, by_row, (x[:, chosen], exact)
        )
        expected = rounded.double() @ codes.double().t() * by_row * scales
        expected = expected + x[:, chosen].double() @ exact.double()
        expected = expected if bias is None else expected + bias.double()
        assert result.dtype is dtype and result.shape == expected.shape
        errors[f"{number}: {launch.kind}"] = float((result.double() - expected).norm() / expected.norm())
    x = torch.randn(4, 100)
    kept, columns = torch.ones(100, dtype=torch.uint8), torch.tensor([7, 50], dtype=torch.int32)
    kept[[7, 50]] = 0
    x[0, 7], x[1, 8], x[2, 9] = math.inf, math.inf, math.nan
    _, by_row, beside = outliers.launch_split(outliers_triton, x, kept, columns)
    poisoned = [
        bool(by_row[0].isfinite() and by_row[1].isinf() and by_row[2].isnan() and by_row[3].isfinite()),
        torch.equal(beside, x[:, [7, 50]]),
    ]
    print(json.dumps({"errors": errors, "split": split, "poisoned": poisoned}))


if __name__ == "__main__":
    main()
