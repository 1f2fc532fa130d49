"""Launches of products with weights of a byte (``graphopt_kernels.quantized.byte_products``), for tuning: the
kernel, its tiles, how many warps share a sum, how much is read ahead, parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from graphopt.plugins import TunableSpec
from graphopt_kernels.quantized import byte_launch, byte_products
from graphopt_kernels.quantized.byte_launch import HALVES, Launch, Problem
from graphopt_kernels.quantized.byte_products import PRODUCTS
from graphopt_kernels.row_quantize import quantize_reference
from graphopt_kernels.tuning.model import Gpu, Usage, resident

__all__ = ["packed_bytes_tunable"]

_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
_ROWS = (1, 16)
_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SHARED = 200 * 2**10


def packed_bytes_tunable() -> TunableSpec:
    """All kernels that multiply; rounding x is not part of it."""
    return TunableSpec(
        name=PRODUCTS.kernel,
        sources=PRODUCTS.sources,
        kernels=_kernels,
        default=byte_launch.usual_launch,
        default_on=byte_launch.launch_for,
        configurations=_configurations,
        check=byte_launch.check_launch,
        operands=_operands,
        run=_run,
        reference=_reference,
        estimate=_estimated,
        predict=_predicted,
        shipped=_shipped,
        summary="products with weights of eight bits",
    )


def _kernels() -> Any:
    from graphopt_kernels.quantized import bytes_triton

    return bytes_triton


def _shipped() -> Iterable[Problem]:
    for (columns, inner), rows, codes in itertools.product(_SHAPES, _ROWS, _LIMITS):
        yield Problem(rows, columns, inner, torch.bfloat16, codes)


def _configurations(problem: Problem) -> Iterator[Launch]:
    """Those that the rule weighs, and others of the same kinds."""
    found = [
        launch for launch in byte_launch.launches(problem, byte_launch.PROCESSORS) if launch.kind != "library"
    ]
    high = max(8, 1 << (problem.rows - 1).bit_length())
    if high <= 64 and (problem.rounded or problem.dtype in HALVES) and problem.inner % 16 == 0:
        for wide, deep, slices, stages in itertools.product((16, 32, 64), (64, 128), (4, 8, 16), (3, 4, 5)):
            found.append(Launch("slices", high, wide, deep, slices, 1, slices, stages))
    if problem.rows == 1 and not problem.rounded:
        for warps, few, places in itertools.product((2, 4, 8), (1, 2, 4), (2, 4, 8)):
            if few * places <= 16:
                found.append(Launch("row", 1, warps * few, 512 * places, 1, 1, warps, 1))
    for launch in dict.fromkeys(found):
        if byte_launch.check_launch(problem, launch) is None and _staged(problem, launch) <= _SHARED:
            yield launch


def _staged(problem: Problem, launch: Launch) -> int:
    """Bytes of shared memory for what is on its way."""
    size = 1 if problem.rounded else problem.dtype.itemsize
    step = launch.inner * launch.slices
    return 0 if launch.kind == "row" else launch.stages * step * (launch.columns + launch.rows * size)


def _operands(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    """x, codes, scales, scales of x."""
    rows, columns, inner, dtype, codes, rounded = problem
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(columns, inner, device=device)
    scales = weight.abs().amax(1) / _LIMITS[codes]
    weight = weight / scales[:, None]
    packed = (weight.round() if codes is torch.int8 else weight).to(codes)
    if not rounded:
        return x, packed, scales, None
    given, x_scales = quantize_reference(x, codes, _LIMITS[codes], 1e-12)
    return given, packed, scales, x_scales


def _run(
    kernels: Any, processors: int, problem: Problem, operands: tuple[Any, ...], launch: Launch
) -> Sequence[torch.Tensor]:
    x, codes, scales, x_scales = operands
    return (byte_products.launch_product(kernels, problem, launch, x, codes, scales, None, x_scales),)


def _reference(problem: Problem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    x, codes, scales, x_scales = operands
    return (byte_products.product_reference(x, codes, scales, None, x_scales, problem.dtype),)


def _estimated(problem: Problem, launch: Launch) -> Usage:
    """Sums, codes of a step and what is made of them."""
    threads = 32 * launch.warps
    step = launch.columns * launch.inner * launch.slices / threads
    sums = launch.rows * launch.columns * launch.slices / threads
    needed = round((step if launch.kind == "row" else sums) + 0.5 * step) + 40
    return Usage(min(needed, 255), 4 * max(0, needed - 255), _staged(problem, launch))


def _predicted(problem: Problem, launch: Launch, usage: Usage, gpu: Gpu) -> float:
    if launch.kind != "library" and not resident(usage, launch.warps, gpu):
        return float("inf")
    return byte_launch.predicted_seconds(problem, launch, gpu.processors) * (1 + usage.spilled / 256)
