"""Launches of products with weights in groups (``graphopt_kernels.quantized.group_products``), for tuning:
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
_KINDS: tuple[tuple[Any, ...], ...] = (
    (128, 64, False), (64, 64, False), (64, 32, True), (64, 32, False, False, 2), (64, 32, False, False, 3),
)  # fmt: skip
"""Groups, bytes of a block, whether codes number levels and scales, bits: ``int4``, ``int4{group=64}``,
``nf4``, ``int2``, ``int3``, the last two with the ``_OUTLIERS`` that they have if nothing else is said."""

_OUTLIERS = 0.0625

_SHARED = 200 * 2**10


def packed_groups_tunable() -> TunableSpec:
    """All kernels that multiply."""
    return TunableSpec(
        name=GROUP_PRODUCTS.kernel,
        sources=GROUP_PRODUCTS.sources,
        kernels=_kernels,
        default=group_launch.usual_launch,
        default_on=group_launch.launch_for,
        configurations=_configurations,
        check=group_launch.check_launch,
        operands=_operands,
        run=_run,
        reference=_reference,
        estimate=_estimated,
        predict=_predicted,
        shipped=_shipped,
        summary="products with weights of four bits and fewer",
    )


def _kernels() -> Any:
    from graphopt_kernels.quantized import groups_triton

    return groups_triton


def _shipped() -> Iterable[GroupProblem]:
    for (columns, inner), rows, kind in itertools.product(_SHAPES, _ROWS, _KINDS):
        problem = GroupProblem(rows, columns, inner, torch.bfloat16, *kind)
        slots = round(_OUTLIERS * problem.blocks) if problem.bits < 4 else 0
        yield problem._replace(slots=slots)


def _configurations(problem: GroupProblem) -> Iterator[GroupLaunch]:
    """Those that the rule weighs, and others of the same kinds."""
    found = [
        launch for launch in group_launch.launches(problem, PROCESSORS) if launch != group_launch.LIBRARY
    ]
    high = max(8, 1 << (problem.rows - 1).bit_length())
    if high <= 64 and problem.dtype in HALVES:
        # Extra bits are fetched when their words have come, which takes stages of its own.
        ahead = (3, 4, 5, 7, 9) if problem.slots else (2, 3, 4, 5)
        sizes = itertools.product((16, 32, 64), (4, 8, 16), ahead, (1, 2, 4))
        for wide, slices, stages, parts in sizes:
            if min(high, 32) * wide <= 1024:
                found.append(GroupLaunch("slices", min(high, 32), wide, slices, parts, slices, stages))
    for launch in dict.fromkeys(found):
        if group_launch.check_launch(problem, launch) is None and _staged(problem, launch) <= _SHARED:
            yield launch


def _staged(problem: GroupProblem, launch: GroupLaunch) -> int:
    """Bytes of shared memory for what is on its way."""
    planes = 3 if problem.bits == 3 else 1
    codes = (planes + (problem.slots > 0)) * problem.half * launch.columns
    block = codes + problem.block * launch.rows * problem.dtype.itemsize
    # Twice the stages for as much that is on its way, where words come first.
    ahead = (launch.stages + 1) // 2 if problem.slots else launch.stages
    return ahead * launch.slices * (block + 8 * launch.columns)


def _operands(problem: GroupProblem, device: torch.device) -> tuple[Any, ...]:
    """x and the packed tensors: random codes, scales near one."""
    rows, columns, inner, dtype, group, half, levels, double, bits, slots = problem
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    groups = inner // group

    def random_bytes(size: int) -> torch.Tensor:
        return torch.randint(0, 256, (columns, size), dtype=torch.uint8, device=device)

    codes, thirds = random_bytes(problem.blocks * (half if bits == 4 else problem.block // 4)), None
    scales = torch.rand(columns, groups, device=device) + 0.5
    ranges = torch.rand(columns, -(-groups // 256), device=device) / 255
    if double:
        words = torch.randint(1, 256, (columns, groups), dtype=torch.uint8, device=device)
    elif levels:
        words = scales.view(torch.int32)
    else:
        zeros = torch.randint(0, 128, (columns, groups), dtype=torch.int32, device=device)
        words = scales.to(torch.bfloat16).float().view(torch.int32) | zeros
    if bits == 3:
        thirds = random_bytes(problem.blocks * half)
    if slots:
        # Outliers lie anywhere in a row.
        places = torch.rand(columns, problem.blocks, device=device).topk(slots, 1).indices
        order = torch.arange(1, slots + 1, dtype=torch.int32, device=device) << 7
        words.scatter_add_(1, places * (problem.block // group), order.expand(columns, slots))
    extra = random_bytes(slots * half) if slots else None
    return x, codes, words, ranges, thirds, extra


def _weight(
    problem: GroupProblem, codes: Any, words: Any, ranges: Any, thirds: Any, extra: Any
) -> GroupWeight:
    return GroupWeight(
        codes, words, ranges, problem.inner, problem.group, problem.half, problem.levels, problem.bits,
        thirds, extra,
    )  # fmt: skip


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
    step = launch.columns * problem.block / 2 * launch.slices / threads
    sums = launch.rows * launch.columns * launch.slices / threads
    needed = round(2 * sums + step) + 40
    return Usage(min(needed, 255), 4 * max(0, needed - 255), _staged(problem, launch))


def _predicted(problem: GroupProblem, launch: GroupLaunch, usage: Usage, gpu: Gpu) -> float:
    if launch != group_launch.LIBRARY and not resident(usage, launch.warps, gpu):
        return float("inf")
    return group_launch.predicted_seconds(problem, launch, gpu.processors) * (1 + usage.spilled / 256)
