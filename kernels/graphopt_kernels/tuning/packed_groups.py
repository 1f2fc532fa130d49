"""Launches of products with weights of four bits (``graphopt_kernels.quantized.group_products``), for tuning:
the kernel, its tiles, how many warps share a sum, how much is read ahead, parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from graphopt.plugins import TunableSpec
from graphopt_kernels.quantized import group_launch, group_products
from graphopt_kernels.quantized.byte_launch import HALVES, PROCESSORS
from graphopt_kernels.quantized.group_launch import GroupLaunch, GroupProblem
from graphopt_kernels.quantized.group_products import GROUP_PRODUCTS, GroupWeight
from graphopt_kernels.tuning.model import Gpu, Usage, resident

__all__ = ["packed_groups_tunable"]

_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
_ROWS = (1, 16)
_KINDS = ((128, 64, False), (64, 64, False), (64, 32, True))
"""Groups, bytes of a block and whether codes number levels: ``int4``, ``int4{group=64}``, ``nf4``."""

_SHARED = 200 * 2**10


def packed_groups_tunable() -> TunableSpec:
    """All kernels that multiply."""
    return TunableSpec(
        name=GROUP_PRODUCTS.kernel,
        sources=GROUP_PRODUCTS.sources,
        kernels=_kernels,
        default=group_launch.usual_launch,
        configurations=_configurations,
        check=group_launch.check_launch,
        operands=_operands,
        run=_run,
        reference=_reference,
        estimate=_estimated,
        predict=_predicted,
        shipped=_shipped,
        summary="products with weights of four bits",
    )


def _kernels() -> Any:
    from graphopt_kernels.quantized import groups_triton

    return groups_triton


def _shipped() -> Iterable[GroupProblem]:
    for (columns, inner), rows, kind in itertools.product(_SHAPES, _ROWS, _KINDS):
        yield GroupProblem(rows, columns, inner, torch.bfloat16, *kind)


def _configurations(problem: GroupProblem) -> Iterator[GroupLaunch]:
    """Those that the rule weighs, and others of the same kinds."""
    found = [
        launch for launch in group_launch.launches(problem, PROCESSORS) if launch != group_launch.LIBRARY
    ]
    high = max(8, 1 << (problem.rows - 1).bit_length())
    if high <= 64 and problem.dtype in HALVES:
        sizes = itertools.product((16, 32, 64), (4, 8, 16), (2, 3, 4, 5), (1, 2, 4))
        for wide, slices, stages, parts in sizes:
            if min(high, 32) * wide <= 1024:
                found.append(GroupLaunch("slices", min(high, 32), wide, slices, parts, slices, stages))
    for launch in dict.fromkeys(found):
        if group_launch.check_launch(problem, launch) is None and _staged(problem, launch) <= _SHARED:
            yield launch


def _staged(problem: GroupProblem, launch: GroupLaunch) -> int:
    """Bytes of shared memory for what is on its way."""
    block = problem.half * launch.columns + 2 * problem.half * launch.rows * problem.dtype.itemsize
    return launch.stages * launch.slices * (block + 8 * launch.columns)


def _operands(problem: GroupProblem, device: torch.device) -> tuple[Any, ...]:
    """x and the packed tensors: random codes, scales near one."""
    rows, columns, inner, dtype, group, half, levels, double = problem
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    blocks, groups = -(-inner // (2 * half)), inner // group
    codes = torch.randint(0, 256, (columns, blocks * half), dtype=torch.uint8, device=device)
    scales = torch.rand(columns, groups, device=device) + 0.5
    ranges = torch.rand(columns, -(-groups // 256), device=device) / 255
    if double:
        words = torch.randint(1, 256, (columns, groups), dtype=torch.uint8, device=device)
    elif levels:
        words = scales.view(torch.int32)
    else:
        zeros = torch.randint(0, 128, (columns, groups), dtype=torch.int32, device=device)
        words = scales.to(torch.bfloat16).float().view(torch.int32) | zeros
    return x, codes, words, ranges


def _weight(problem: GroupProblem, codes: Any, words: Any, ranges: Any) -> GroupWeight:
    return GroupWeight(codes, words, ranges, problem.inner, problem.group, problem.half, problem.levels)


def _run(
    kernels: Any, processors: int, problem: GroupProblem, operands: tuple[Any, ...], launch: GroupLaunch
) -> Sequence[torch.Tensor]:
    x, *packed = operands
    weight = _weight(problem, *packed)
    return (group_products.launch_product(kernels, launch, x, weight, None),)


def _reference(problem: GroupProblem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    x, *packed = operands
    return (group_products.product_reference(x, _weight(problem, *packed), None),)


def _estimated(problem: GroupProblem, launch: GroupLaunch) -> Usage:
    """Sums twice, of a group and all, codes of a step and what is made of them."""
    threads = 32 * launch.warps
    step = launch.columns * problem.half * launch.slices / threads
    sums = launch.rows * launch.columns * launch.slices / threads
    needed = round(2 * sums + step) + 40
    return Usage(min(needed, 255), 4 * max(0, needed - 255), _staged(problem, launch))


def _predicted(problem: GroupProblem, launch: GroupLaunch, usage: Usage, gpu: Gpu) -> float:
    if launch != group_launch.LIBRARY and not resident(usage, launch.warps, gpu):
        return float("inf")
    return group_launch.predicted_seconds(problem, launch, gpu.processors) * (1 + usage.spilled / 256)
