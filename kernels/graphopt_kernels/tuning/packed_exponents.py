"""Launches of products with exponents of four bits (``graphopt_kernels.quantized.exponents``), for tuning:
the kernel, its tiles, how many warps share a sum, how much is read ahead, parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from graphopt.plugins import TunableSpec
from graphopt_kernels.quantized import exponent_launch, exponents
from graphopt_kernels.quantized.byte_launch import PROCESSORS, Launch, in_parts
from graphopt_kernels.quantized.exponent_launch import Exponents
from graphopt_kernels.quantized.exponents import PRODUCTS, half_of
from graphopt_kernels.tuning.model import Gpu, Usage, resident

__all__ = ["packed_exponents_tunable"]

_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
_ROWS = (1, 16)
_SHARED = 200 * 2**10
_ROOM = 12


def packed_exponents_tunable() -> TunableSpec:
    """All kernels that multiply."""
    return TunableSpec(
        name=PRODUCTS.kernel,
        sources=PRODUCTS.sources,
        kernels=_kernels,
        default=exponent_launch.usual_launch,
        default_on=exponent_launch.launch_for,
        configurations=_configurations,
        check=exponent_launch.check_launch,
        operands=_operands,
        run=_run,
        reference=_reference,
        estimate=_estimated,
        predict=_predicted,
        shipped=_shipped,
        summary="products with bfloat16 weights in twelve bits",
    )


def _kernels() -> Any:
    from graphopt_kernels.quantized import exponents_triton

    return exponents_triton


def _shipped() -> Iterable[Exponents]:
    for (columns, inner), rows in itertools.product(_SHAPES, _ROWS):
        yield Exponents(rows, columns, inner, half_of(inner))


def _configurations(problem: Exponents) -> Iterator[Launch]:
    """Those that the rule weighs, and others of the same kinds."""
    found = [
        launch for launch in exponent_launch.launches(problem, PROCESSORS) if launch.kind != "library"
    ]
    high = max(8, 1 << (problem.rows - 1).bit_length())
    if high <= 64 and problem.inner % 16 == 0:
        for wide, deep, slices, stages in itertools.product((16, 32), (32, 64), (4, 8, 16), (2, 3, 4)):
            whole = Launch("slices", high, wide, deep, slices, 1, slices, stages)
            found += [whole, in_parts(problem.steps, whole, PROCESSORS)]
    for launch in dict.fromkeys(found):
        fits = _staged(launch) <= _SHARED and not _estimated(problem, launch).spilled
        if fits and exponent_launch.check_launch(problem, launch) is None:
            yield launch


def _staged(launch: Launch) -> int:
    """Bytes of shared memory for what is on its way: three bytes for two weights, x twice."""
    return launch.stages * launch.inner * launch.slices * (3 * launch.columns + 4 * launch.rows)


def _operands(problem: Exponents, device: torch.device) -> tuple[Any, ...]:
    """x, and a weight with exponents from 2**-15 to 1, none of which escapes."""
    rows, columns, inner, half = problem
    x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (columns, inner), device=device, dtype=torch.uint8)
    pairs = torch.randint(0, 256, (columns, half), device=device, dtype=torch.uint8)
    bases = torch.full((columns,), 112, device=device, dtype=torch.uint8)
    escapes = torch.full((columns, _ROOM), -1, device=device, dtype=torch.int32)
    return x, codes, pairs, bases, escapes


def _run(
    kernels: Any, processors: int, problem: Exponents, operands: tuple[Any, ...], launch: Launch
) -> Sequence[torch.Tensor]:
    x, *packed = operands
    return (exponents.launch_linear(kernels, problem, launch, x, tuple(packed), None),)


def _reference(problem: Exponents, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    x, *packed = operands
    weight = exponents.unpack_reference(*packed)
    return (torch.nn.functional.linear(x.float(), weight.float()).to(x.dtype),)


def _estimated(problem: Exponents, launch: Launch) -> Usage:
    """Sums, bytes of a step and what is made of them."""
    threads = 32 * launch.warps
    step = launch.columns * launch.inner * launch.slices / threads
    sums = launch.rows * launch.columns * launch.slices / threads
    inputs = launch.rows * launch.inner * launch.slices / threads if launch.kind == "slices" else 0
    needed = round(sums + step + inputs) + 40
    return Usage(min(needed, 255), 4 * max(0, needed - 255), _staged(launch))


def _predicted(problem: Exponents, launch: Launch, usage: Usage, gpu: Gpu) -> float:
    if launch.kind != "library" and not resident(usage, launch.warps, gpu):
        return float("inf")
    return exponent_launch.predicted_seconds(problem, launch, gpu.processors) * (1 + usage.spilled / 256)
