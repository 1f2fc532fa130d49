"""Launches of ``graphopt_kernels.cross_entropy_rows``, for tuning: how much of a row is read at a time, and
by how many warps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from graphopt.plugins import TunableSpec
from graphopt_kernels import cross_entropy_rows as loss
from graphopt_kernels.cross_entropy_rows import ROWS, RowLaunch, RowSettings, RowsProblem
from graphopt_kernels.tuning.model import Gpu, Usage, memory_bound

__all__ = ["cross_entropy_tunable"]

_COLUMNS = (32000, 50257, 128256, 151936)
_ROWS = (1024, 4096)
"""Chunks of 8,192 rows cut into 8 and of 32,768 rows."""

_PADDED = 64
_OTHERS = 28


def cross_entropy_tunable() -> TunableSpec:
    """The row kernel of linear + cross entropy."""
    return TunableSpec(
        name=ROWS.kernel,
        sources=ROWS.sources,
        kernels=_kernels,
        default=loss.rows_launch,
        configurations=_configurations,
        check=loss.check_launch,
        operands=_operands,
        run=_run,
        reference=_reference,
        estimate=_estimated,
        predict=_predicted,
        shipped=_shipped,
        summary="cross entropy of rows of logits, gradient in place",
    )


def _kernels() -> Any:
    from graphopt_kernels import cross_entropy_rows_triton

    return cross_entropy_rows_triton


def _shipped() -> Iterable[RowsProblem]:
    for columns, rows in itertools.product(_COLUMNS, _ROWS):
        for statistics, gradient in ((True, True), (True, False), (False, True)):
            yield RowsProblem(rows, columns, torch.bfloat16, True, statistics, gradient, False, False, False)


def _configurations(problem: RowsProblem) -> Iterator[RowLaunch]:
    widest = 1 << (problem.columns - 1).bit_length()
    for block in (1024, 2048, 4096, 8192, 16384, 32768):
        for warps in (4, 8, 16, 32):
            if block <= widest and 8 <= block / (32 * warps) <= 32:
                yield RowLaunch(block, warps)


def _operands(problem: RowsProblem, device: torch.device) -> tuple[Any, ...]:
    """Logits, targets, log-sum-exps, losses, scales of losses and of log-sum-exps."""
    columns = problem.columns
    stride = -(-columns // _PADDED) * _PADDED if problem.aligned else columns | 1
    whole = torch.randn(problem.rows, stride, device=device, dtype=problem.dtype)
    logits = whole[:, :columns]
    target = torch.randint(0, columns, (problem.rows,), device=device)
    exact = loss.computes_in(problem.dtype)
    unknown = torch.full((problem.rows,), float("nan"), device=device, dtype=exact)
    settings = _settings(problem)
    log_sum_exps = unknown.clone()
    if not problem.statistics:
        loss.cross_entropy_rows_reference(
            logits.clone(), target, settings, log_sum_exp=log_sum_exps, losses=unknown.clone()
        )
    losses = unknown if problem.statistics else None
    scale = torch.rand(problem.rows, device=device, dtype=exact) if problem.gradient else None
    sum_scale = torch.rand(problem.rows, device=device, dtype=exact) if problem.summed else None
    return logits, target, log_sum_exps, losses, scale, sum_scale


def _settings(problem: RowsProblem) -> RowSettings:
    return RowSettings(
        label_smoothing=0.1 if problem.smoothed else 0.0, softcap=30.0 if problem.softcapped else 0.0
    )


def _run(
    kernels: Any, processors: int, problem: RowsProblem, operands: tuple[Any, ...], launch: RowLaunch
) -> Sequence[torch.Tensor]:
    logits, target, log_sum_exps, losses, scale, sum_scale = operands
    given = (logits, target, _settings(problem), log_sum_exps, losses, scale, sum_scale)
    loss.launch_rows(kernels.rows_kernel, *given, launch=launch)
    return _results(problem, operands)


def _reference(problem: RowsProblem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    logits, target, log_sum_exps, losses, scale, sum_scale = operands
    loss.cross_entropy_rows_reference(
        logits,
        target,
        _settings(problem),
        log_sum_exp=log_sum_exps,
        losses=losses,
        scale=scale,
        sum_scale=sum_scale,
    )
    return _results(problem, operands)


def _results(problem: RowsProblem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    logits, _, log_sum_exps, losses, *_ = operands
    # Without the gradient logits are scratch: what is left there is nobody's.
    return (
        *((logits,) if problem.gradient else ()),
        *((losses, log_sum_exps) if problem.statistics else ()),
    )


def _estimated(problem: RowsProblem, launch: RowLaunch) -> Usage:
    # The loop over statistics holds a maximum, a sum and the logits; smoothing sums them as well.
    words = 2.5 + problem.smoothed if problem.statistics else 1.5
    needed = round(words * launch.block / (32 * launch.warps)) + _OTHERS
    return Usage(min(needed, 255), 4 * max(0, needed - 255), 0)


def _predicted(problem: RowsProblem, launch: RowLaunch, usage: Usage, gpu: Gpu) -> float:
    blocks = -(-problem.columns // launch.block)
    return memory_bound(
        usage,
        gpu,
        warps=launch.warps,
        groups=problem.rows,
        programs=0,
        tile_bytes=launch.block * problem.dtype.itemsize,
        ahead=False,
        useful=problem.columns / (blocks * launch.block),
    )
