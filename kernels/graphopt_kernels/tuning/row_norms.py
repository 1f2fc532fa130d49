"""Launches of ``graphopt_kernels.row_norm_launch``, for tuning: the forward, of a sum too, and the backward.

The block is given by the width. What is left: rows of a group, warps, programs that stay on a multiprocessor
(or one for each group), whether the next rows are read ahead, into registers or through shared memory, and
whether the vectors stay in registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from graphopt.plugins import TunableSpec
from graphopt_kernels import row_norm_launch as launching
from graphopt_kernels import row_norm_reference as reference
from graphopt_kernels.row_norm_launch import BACKWARD, FORWARD, BackwardProblem, ForwardProblem, Launch
from graphopt_kernels.tuning.model import Gpu, Usage, memory_bound

__all__ = ["row_norm_tunables"]

_EPS = 1e-6
_WIDTHS = (1024, 2048, 3584, 4096, 5120, 7168, 8192, 14336)
_ROWS = (8192, 16384)
_WARPS = (2, 4, 8, 16)
_ELEMENTS = (4, 64)
"""Of a thread: fewer make loads narrow, more do not fit its registers."""

_OTHERS = 28
"""Registers of a thread that hold no elements: addresses, masks, loop counters."""


def row_norm_tunables() -> tuple[TunableSpec, ...]:
    """The forward and the backward."""
    return (
        TunableSpec(
            name=FORWARD.kernel,
            sources=FORWARD.sources,
            kernels=_kernels,
            default=launching.forward_launch,
            configurations=_forward_configurations,
            check=launching.check_launch,
            operands=_forward_operands,
            run=_run_forward,
            reference=_forward_reference,
            estimate=_estimated_forward,
            predict=_predicted_forward,
            shipped=_forward_shipped,
            summary="RMSNorm and LayerNorm of rows, of a sum too",
        ),
        TunableSpec(
            name=BACKWARD.kernel,
            sources=BACKWARD.sources,
            kernels=_kernels,
            default=launching.backward_launch,
            configurations=_backward_configurations,
            check=launching.check_launch,
            operands=_backward_operands,
            run=_run_backward,
            reference=_backward_reference,
            estimate=_estimated_backward,
            predict=_predicted_backward,
            shipped=_backward_shipped,
            summary="gradients of a norm of rows",
        ),
    )


def _kernels() -> Any:
    from graphopt_kernels import row_norm_triton

    return row_norm_triton


def _launches(
    width: int, programs: Sequence[int], ahead: Sequence[bool], held: Sequence[bool]
) -> Iterator[Launch]:
    block, rows = launching.tile(width)
    for count in dict.fromkeys((rows, max(1, rows // 2), max(1, rows // 4))):
        for warps in _WARPS:
            if _ELEMENTS[0] <= block * count / (32 * warps) <= _ELEMENTS[1]:
                for number in programs:
                    for early in ahead if number else (False,):
                        yield from (Launch(block, count, warps, number, early, keep) for keep in held)


def _in_thread(launch: Launch) -> float:
    return launch.block * launch.rows / (32 * launch.warps)


def _words(dtype: torch.dtype | None) -> float:
    return dtype.itemsize / 4 if dtype is not None else 0.0


# --- forward -----------------------------------------------------------------------------------


def _forward_shipped() -> Iterable[ForwardProblem]:
    half = torch.bfloat16
    for width, rows in itertools.product(_WIDTHS, _ROWS):
        plain = ForwardProblem(rows, width, half, half, half, None, False, False, True)
        yield plain
        yield plain._replace(added=True)
        yield plain._replace(bias=half, centered=True, rounded=False)


def _forward_configurations(problem: ForwardProblem) -> Iterator[Launch]:
    vectors = problem.weight is not None or problem.bias is not None
    held = (True, False) if vectors else (False,)
    yield from _launches(problem.width, (0, 2, 4, 8), (False, True), held)


def _forward_operands(problem: ForwardProblem, device: torch.device) -> tuple[Any, ...]:
    def rows() -> torch.Tensor:
        return torch.randn(problem.rows, problem.width, device=device, dtype=problem.dtype)

    def vector(dtype: torch.dtype | None) -> torch.Tensor | None:
        return None if dtype is None else torch.randn(problem.width, device=device, dtype=dtype)

    return rows(), rows() if problem.added else None, vector(problem.weight), vector(problem.bias)


def _run_forward(
    kernels: Any, processors: int, problem: ForwardProblem, operands: tuple[Any, ...], launch: Launch
) -> Sequence[torch.Tensor]:
    return launching.forward_rows(
        kernels,
        *operands,
        *_forward_settings(problem),
        launch=launch,
        processors=processors,
    )


def _forward_settings(problem: ForwardProblem) -> tuple[Any, ...]:
    return _EPS, problem.centered, 0.0, problem.rounded, problem.result


def _forward_reference(problem: ForwardProblem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    data, added, weight, bias = operands
    settings = (weight, bias, *_forward_settings(problem))
    if added is not None:
        return reference.add_row_norm_reference(data, added, *settings)
    result, mean, rstd = reference.row_norm_reference(data, *settings)
    return result, data.new_empty(0), mean, rstd


def _estimated_forward(problem: ForwardProblem, launch: Launch) -> Usage:
    read = _words(problem.dtype) * (2 if problem.added else 1)
    vectors = _words(problem.weight) + _words(problem.bias)
    words = 1 + read * (1 if launch.ahead else 0.5) + (vectors if launch.held else 0)
    return _estimate(words, launch)


def _predicted_forward(problem: ForwardProblem, launch: Launch, usage: Usage, gpu: Gpu) -> float:
    return _streamed(problem.rows, problem.width, 1 + problem.added, problem.dtype, launch, usage, gpu)


# --- backward ----------------------------------------------------------------------------------


def _backward_shipped() -> Iterable[BackwardProblem]:
    half = torch.bfloat16
    for width, rows in itertools.product(_WIDTHS, _ROWS):
        plain = BackwardProblem(rows, width, half, half, False, False, True, True, False)
        yield plain
        yield plain._replace(passed=True)
        yield plain._replace(centered=True, d_bias=True)


def _backward_configurations(problem: BackwardProblem) -> Iterator[Launch]:
    held = (True, False) if problem.weight is not None else (False,)
    for launch in _launches(problem.width, (1, 2, 3, 4), (False, True), held):
        for stages in (1,) if launch.ahead else (1, 2, 3, 4):
            staged = launch._replace(stages=stages)
            if launching.check_launch(problem, staged) is None:
                yield staged


def _backward_operands(problem: BackwardProblem, device: torch.device) -> tuple[Any, ...]:
    def rows() -> torch.Tensor:
        return torch.randn(problem.rows, problem.width, device=device, dtype=problem.dtype)

    data = rows()
    weight = None
    if problem.weight is not None:
        weight = torch.randn(problem.width, device=device, dtype=problem.weight)
    bias = torch.empty(problem.width, device=device, dtype=problem.dtype) if problem.d_bias else None
    settings = _EPS, problem.centered, 0.0, False, data.dtype
    _, mean, rstd = reference.row_norm_reference(data, None, None, *settings)
    return rows(), data, weight, bias, mean, rstd, rows() if problem.passed else None


def _run_backward(
    kernels: Any, processors: int, problem: BackwardProblem, operands: tuple[Any, ...], launch: Launch
) -> Sequence[torch.Tensor]:
    return launching.backward_rows(
        kernels, *operands, *_backward_settings(problem), launch=launch, processors=processors
    )


def _backward_settings(problem: BackwardProblem) -> tuple[Any, ...]:
    return problem.centered, 0.0, (problem.d_input, problem.d_weight, problem.d_bias)


def _backward_reference(problem: BackwardProblem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    return reference.row_norm_backward_reference(*operands, *_backward_settings(problem))


def _estimated_backward(problem: BackwardProblem, launch: Launch) -> Usage:
    read = _words(problem.dtype) * (3 if problem.passed else 2)
    sums = problem.d_weight + (problem.d_bias and launch.block < launching.WIDEST)
    words = 2 + sums + read * (1 if launch.ahead else 0.5) + (_words(problem.weight) if launch.held else 0)
    return replace(_estimate(words, launch), shared=launching.staged_bytes(problem, launch))


def _predicted_backward(problem: BackwardProblem, launch: Launch, usage: Usage, gpu: Gpu) -> float:
    return _streamed(problem.rows, problem.width, 2 + problem.passed, problem.dtype, launch, usage, gpu)


# --- both --------------------------------------------------------------------------------------


def _estimate(words: float, launch: Launch) -> Usage:
    """``words``: registers that an element of a thread takes."""
    needed = round(words * _in_thread(launch)) + _OTHERS
    return Usage(min(needed, 255), 4 * max(0, needed - 255), 0)


def _streamed(
    rows: int, width: int, tensors: int, dtype: torch.dtype, launch: Launch, usage: Usage, gpu: Gpu
) -> float:
    return memory_bound(
        usage,
        gpu,
        warps=launch.warps,
        groups=-(-rows // launch.rows),
        programs=launch.programs,
        tile_bytes=tensors * launch.rows * width * dtype.itemsize,
        ahead=launch.ahead or launch.stages > 1,
        useful=width / launch.block,
    )
