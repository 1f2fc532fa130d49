"""Kernels that read weights in groups, in Triton's interpreter; prints what they computed beside float64.

Every case is a launch of ``group_launch`` on CPU tensors. Run by ``tests/test_quantized_groups.py``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch

from graphopt.packing import Scheme
from graphopt_kernels.quantized import group_products, groups_triton
from graphopt_kernels.quantized.group_launch import GroupLaunch, check_launch
from graphopt_kernels.quantized.group_products import GroupWeight, int4_weight
from graphopt_kernels.quantized.int4 import Int4
from graphopt_kernels.quantized.int4_offset import Int4Offset
from graphopt_kernels.quantized.lowbits import Int2, Int3, low_weight
from graphopt_kernels.quantized.nf4 import Nf4, nf4_weight

FP16, FP32 = torch.float16, torch.float32

SLICES = GroupLaunch("slices", 8, 16, 2, 1, 2, 1)
TILES = GroupLaunch("tiles", 16, 32, 1, 1, 2, 1)
CASES = [
    # rows, columns, inner, scheme, launch, bias
    (1, 37, 512, Int4(), SLICES, True),
    (3, 16, 384, Int4(), SLICES, False),
    (2, 16, 512, Int4(), SLICES._replace(parts=2), True),
    (3, 32, 192, Int4(group=64, method="hqq"), SLICES, True),
    (9, 17, 160, Int4(group=32), SLICES._replace(rows=16), True),
    (3, 16, 192, Nf4(), SLICES, True),
    (2, 16, 192, Nf4(double=True), SLICES, False),
    (20, 33, 256, Int4(symmetric=True), TILES._replace(parts=2), True),
    (5, 32, 192, Int4(group=64), TILES, False),
    (5, 32, 256, Int4(group=64), TILES, False),
    (2, 16, 384, Int4(group=64), SLICES, False),
    (17, 32, 96, Int4(group=32), TILES, True),
    (9, 32, 128, Nf4(double=True), TILES, True),
    (3, 17, 384, Int4Offset(), SLICES._replace(parts=2), True),
    (5, 32, 160, Int4Offset(group=32), TILES, False),
]
LOW = [
    (3, 17, 1024, Int2(group=128, outliers=0.25), SLICES, True),
    (2, 16, 448, Int2(group=64, outliers=0.5), SLICES._replace(parts=2), False),
    (9, 16, 512, Int2(group=32, outliers=0.0), SLICES._replace(rows=16), True),
    (20, 33, 384, Int2(group=128, outliers=0.4), TILES._replace(parts=2), True),
    (5, 32, 96, Int2(group=32, outliers=0.5), TILES, False),
    (3, 17, 1024, Int3(group=128, outliers=0.25), SLICES, True),
    (2, 16, 640, Int3(group=64, method="hqq", outliers=0.5), SLICES._replace(parts=2), False),
    (9, 16, 384, Int3(group=128, outliers=0.3), SLICES._replace(rows=16), True),
    (3, 16, 512, Int3(group=32, outliers=0.0), SLICES, True),
    (20, 33, 512, Int3(group=64, outliers=0.5), TILES, True),
    (5, 32, 160, Int3(group=32, symmetric=True, outliers=0.5), TILES, False),
]


def weight_of(scheme: Scheme, exact: torch.Tensor, narrow: bool = False) -> GroupWeight:
    """``narrow``: with scales that float16 holds and bfloat16 does not."""
    packed = scheme.pack(exact, {})
    if narrow and isinstance(scheme, Int4 | Int2 | Int3) and not packed.get("extra", exact[:0]).numel():
        scales = (packed["words"] & -256).view(torch.float32)
        scales = (scales * (1 + torch.rand_like(scales) / 128)).half().float()
        assert ((scales.view(torch.int32) & 65535) != 0).any()
        packed["words"] = scales.view(torch.int32) | (packed["words"] & 127)
    if isinstance(scheme, Int4 | Int4Offset):
        weight = int4_weight(packed["codes"], packed["words"], scheme.group)
        return replace(weight, offsets=packed.get("offsets"))
    if isinstance(scheme, Int2 | Int3):
        return low_weight(
            packed["codes"], packed.get("thirds"), packed["words"], packed["extra"], scheme.group
        )
    return nf4_weight(**packed)


def rounded_levels(weight: GroupWeight) -> torch.Tensor:
    """The weight in float64, levels as float16 holds them."""
    exact = group_products.unpacked_reference(weight, None, FP32)
    if not weight.levels:
        return exact.double()
    scales = group_products._scales(weight).repeat_interleave(weight.group, 1)
    return (exact / scales).half().double() * scales


def main(bits: str) -> None:
    errors = {}
    for number, (rows, n, k, scheme, launch, biased) in enumerate(LOW if bits == "low" else CASES):
        torch.manual_seed(number)
        weight = weight_of(scheme, torch.randn(n, k) / k**0.5, narrow=bits == "low" or number % 2 == 1)
        assert check_launch(weight.problem(rows, FP16), launch) is None, (scheme, launch)
        # Every other element of longer rows: x need not be contiguous.
        x, bias = torch.randn(rows, 2 * k)[:, ::2].half(), torch.randn(n).half()
        result = group_products.launch_product(groups_triton, launch, x, weight, bias if biased else None)
        exact = torch.nn.functional.linear(x.double(), rounded_levels(weight))
        exact = exact + bias.double() if biased else exact
        assert result.dtype is FP16 and result.shape == exact.shape
        errors[f"{number}: {scheme} {launch.kind}"] = float((result.double() - exact).norm() / exact.norm())
    unpacked = {}
    four: tuple[Scheme, ...] = (
        Int4(), Int4(group=64), Int4(group=32), Nf4(), Nf4(double=True), Int4Offset(group=32),
    )  # fmt: skip
    low: tuple[Scheme, ...] = (
        Int2(outliers=0.5), Int2(group=32), Int3(outliers=0.5), Int3(group=32, outliers=0.5),
        Int2(outliers=0.0), Int3(group=32, outliers=0.0),
    )  # fmt: skip
    for scheme in low if bits == "low" else four:
        k = 96 if not isinstance(scheme, Nf4) and scheme.group == 32 else 128 if scheme not in low else 512
        weight, factors = weight_of(scheme, torch.randn(7, k), narrow=True), torch.rand(k)
        for given in (None, factors):
            found = group_products.launch_unpack(groups_triton, weight, given, torch.empty(7, k))
            expected = group_products.unpacked_reference(weight, given, FP32)
            unpacked[f"{scheme} {given is not None}"] = torch.equal(found, expected)
    poisoned = {}
    for name, launch in (("slices", SLICES), ("tiles", TILES)):
        both = (Int2(outliers=1.0), Int3(outliers=0.0)) if bits == "low" else (Int4(), Nf4())
        for scheme in both:
            exact_weight = torch.randn(16, 128)
            exact_weight[:8, 3] = 0
            weight = weight_of(scheme, exact_weight)
            x = torch.randn(1, 128).half()
            x[0, 3] = float("inf")
            result = group_products.launch_product(groups_triton, launch, x, weight, None)
            dense = torch.nn.functional.linear(x.double(), rounded_levels(weight))
            poisoned[f"{name} {scheme}"] = [
                torch.equal(result.isnan(), dense.isnan()), torch.equal(result.isinf(), dense.isinf()),
                int(result.isnan().sum()) >= 8,
            ]  # fmt: skip
    print(json.dumps({"errors": errors, "unpacked": unpacked, "poisoned": poisoned}))


if __name__ == "__main__":
    main(sys.argv[1])
