"""The kernel of a row's product in Triton's interpreter; prints its errors beside float64.

Run by ``tests/test_row_product.py``.
"""

from __future__ import annotations

import json

import torch

from graphopt_kernels.quantized.fp8 import rounded_to_fp8
from graphopt_kernels.quantized.group_products import int4_weight, unpacked_reference
from graphopt_kernels.quantized.int4 import Int4
from graphopt_kernels.quantized.int8 import rounded_to_int8
from graphopt_kernels.row_product import (
    RowLaunch,
    check_row_launch,
    launch_row_product,
    row_kernels,
    row_problem,
    row_product_reference,
)

FP16, FP32, INT8, FP8 = torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
GROUPS = {"int4 32": 32, "int4 64": 64, "int4 128": 128}
CASES = [
    # columns, inner, dtype, codes, norm, gate, bias, residual, launch
    (24, 512, FP16, FP16, "weighed", "silu", True, False, RowLaunch(8, 256, 2)),
    (13, 1024, FP16, FP16, "", "", False, True, RowLaunch(4, 256, 4)),
    (9, 300, FP16, FP16, "plain", "gelu", False, True, RowLaunch(8, 256, 4)),
    (24, 1024, FP16, INT8, "weighed", "gelu_tanh", True, True, RowLaunch(8, 512, 2)),
    (13, 520, FP16, FP8, "", "", True, True, RowLaunch(8, 512, 4)),
    (16, 512, FP32, INT8, "weighed", "", False, False, RowLaunch(4, 512, 2)),
    (24, 1024, FP16, INT8, "weighed", "silu", True, True, RowLaunch(8, 512, 1, "digits")),
    (13, 1040, FP16, INT8, "", "", True, False, RowLaunch(4, 1024, 2, "digits")),
    (8, 2048, FP16, "int4 128", "weighed", "silu", True, False, RowLaunch(8, 1024, 1, "digits")),
    (13, 1280, FP16, "int4 128", "", "", False, True, RowLaunch(4, 2048, 2, "digits")),
    (9, 1280, FP16, "int4 64", "plain", "gelu", True, True, RowLaunch(4, 1024, 1, "digits")),
    (12, 2112, FP16, "int4 64", "", "", False, True, RowLaunch(4, 1024, 1, "digits")),
    (5, 1088, FP16, "int4 32", "weighed", "gelu_tanh", False, False, RowLaunch(4, 2048, 2, "digits")),
]


def main() -> None:
    errors = {}
    for number, (n, k, dtype, kind, norm, gate, biased, residual, launch) in enumerate(CASES):
        torch.manual_seed(number)
        rows = 2 * n if gate else n
        weight = torch.randn(rows, k) / k**0.5
        scales = None
        if kind in GROUPS:
            packed = Int4(GROUPS[kind]).pack(weight, {})
            weight, scales = packed["codes"], packed["words"]
        elif kind in (INT8, FP8):
            weight, scales = (rounded_to_int8 if kind is INT8 else rounded_to_fp8)(weight)
        else:
            weight = weight.to(dtype)
        x = torch.randn(1, 2 * k)[:, ::2].to(dtype) * 3
        weights = torch.rand(k).to(dtype) if norm == "weighed" else None
        bias = torch.randn(rows).to(dtype) if biased else None
        added = torch.randn(1, n).to(dtype) if residual else None
        problem = row_problem(x, weight, scales, bool(norm), gate)
        assert check_row_launch(problem, launch) is None, launch
        found = launch_row_product(
            row_kernels(), problem, launch, x, weight, scales, bias, weights, 1e-5, 0.5, added, gate
        )
        given = x, weight, scales, bias, weights, bool(norm), 1e-5, 0.5, added, gate
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
        exact = exactly(*wide)
        assert found.dtype is dtype and found.shape == exact.shape == row_product_reference(*given).shape
        errors[f"{number}: {kind}"] = float((found.double() - exact).norm() / exact.norm())
    print(json.dumps({"errors": errors}))


def exactly(x, weight, scales, bias, norm, normed, eps, offset, added, gate):  # type: ignore[no-untyped-def]
    if normed:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        x = x if norm is None else x * (norm + offset)
    if weight.dtype is torch.uint8:
        packed = int4_weight(weight, scales, x.shape[-1] // scales.shape[1])
        weight, scales = unpacked_reference(packed, None, torch.float64), None
    y = torch.nn.functional.linear(x, weight.double())
    y = y if scales is None else y * scales
    y = y if bias is None else y + bias
    if gate:
        first, second = y.chunk(2, -1)
        functional = torch.nn.functional
        if gate == "silu":
            y = functional.silu(first) * second
        else:
            y = functional.gelu(first, approximate="tanh" if gate == "gelu_tanh" else "none") * second
    return y if added is None else y + added


if __name__ == "__main__":
    main()
