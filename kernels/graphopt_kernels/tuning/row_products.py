"""Launches of a row's product (``graphopt_kernels.row_product``), for tuning: rows of the weight that a
program reads, how much of each at a time, warps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from graphopt.plugins import TunableSpec
from graphopt_kernels.row_product import (
    ROW_PRODUCTS,
    RowLaunch,
    RowProblem,
    check_row_launch,
    launch_row_product,
    row_kernels,
    row_launch,
    row_launches,
    row_product_reference,
)
from graphopt_kernels.tuning.model import Gpu, Usage, resident

__all__ = ["row_product_tunable"]

_SHAPES = (
    (6144, 4096, True, False),
    (4096, 4096, False, False),
    (14336, 4096, True, True),
    (4096, 14336, False, False),
)
"""Results, products of each, whether there is a norm, a gate."""

_READ = 4.28e12
_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_AHEAD = 32_000
"""Bytes on their way that keep a multiprocessor's memory busy."""


def row_product_tunable() -> TunableSpec:
    return TunableSpec(
        name=ROW_PRODUCTS.kernel,
        sources=ROW_PRODUCTS.sources,
        kernels=row_kernels,
        default=row_launch,
        configurations=row_launches,
        check=check_row_launch,
        operands=_operands,
        run=_run,
        reference=_reference,
        estimate=_estimated,
        predict=_predicted,
        shipped=_shipped,
        summary="a row times a weight, with its norm, gate or residual",
    )


def _shipped() -> Iterable[RowProblem]:
    kinds = (torch.uint8, *_LIMITS, torch.bfloat16)
    for codes, (columns, inner, normed, gated) in itertools.product(kinds, _SHAPES):
        group = 128 if codes is torch.uint8 else 0
        yield RowProblem(columns, inner, torch.bfloat16, codes, normed, gated, group)


def _operands(problem: RowProblem, device: torch.device) -> tuple[Any, ...]:
    """All that ``row_product`` takes."""
    columns, inner, dtype, codes, normed, gated, group = problem
    rows = 2 * columns if gated else columns
    x = torch.randn(1, inner, device=device, dtype=dtype)
    weight, scales = torch.randn(rows, inner, device=device) / inner**0.5, None
    if codes in _LIMITS:
        scales = weight.abs().amax(1) / _LIMITS[codes]
        weight = weight / scales[:, None]
        weight = weight.round() if codes is torch.int8 else weight
    if group:
        weight = torch.randint(0, 256, (rows, inner // 2), device=device)
        # Zeros are 7.5.
        scales = torch.rand(rows, inner // group, device=device).view(torch.int32) & -256 | 60
    norm = torch.rand(inner, device=device).to(dtype) if normed else None
    added = None if normed else torch.randn(1, columns, device=device, dtype=dtype)
    return x, weight.to(codes), scales, None, norm, normed, 1e-5, 0.0, added, "silu" if gated else ""


def _run(
    kernels: Any, processors: int, problem: RowProblem, operands: tuple[Any, ...], launch: RowLaunch
) -> Sequence[torch.Tensor]:
    x, weight, scales, bias, norm, _, eps, offset, added, gate = operands
    given = (x, weight, scales, bias, norm, eps, offset, added, gate)
    return (launch_row_product(kernels, problem, launch, *given),)


def _reference(problem: RowProblem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    return (row_product_reference(*operands),)


def _estimated(problem: RowProblem, launch: RowLaunch) -> Usage:
    """Registers: codes of a step, of the next where there is one, numbers made of a part of them."""
    if launch.kind == "digits":
        # Four words of codes, words of groups and a sum for each row of the weight, and all that x becomes.
        needed = launch.rows * (9 if launch.inner < problem.inner else 6) + 60
        return Usage(min(needed, 255), 4 * max(0, needed - 255), 0)
    size = problem.codes.itemsize
    held = launch.rows // launch.warps * launch.inner * size // (32 * 4)
    held *= 2 if launch.inner < problem.inner else 1
    needed = held + launch.rows // launch.warps + 60
    return Usage(min(needed, 255), 4 * max(0, needed - 255), 0)


def _predicted(problem: RowProblem, launch: RowLaunch, usage: Usage, gpu: Gpu) -> float:
    """The weight at the rate of memory, as far as what is on its way and full turns of programs keep it."""
    programs = -(-problem.columns * (2 if problem.gated else 1) // launch.rows)
    together = resident(usage, launch.warps, gpu)
    if not together:
        return float("inf")
    size = problem.bits / 8
    on_its_way = min(together, -(-programs // gpu.processors)) * launch.rows * launch.inner * size
    share = min(1.0, on_its_way / _AHEAD)
    turns = programs / (gpu.processors * together)
    uneven = -(-programs // (gpu.processors * together)) / turns if turns > 1 else 1.0
    rows = problem.columns * (2 if problem.gated else 1)
    seconds = rows * problem.inner * size / (_READ * share) * uneven**0.5
    return float((seconds + 1.5e-6) * (1 + usage.spilled / 256))
