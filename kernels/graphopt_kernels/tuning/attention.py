"""Launches of ``graphopt_kernels.attention``, for tuning: tiles of scores, warps, stages.

Kernels are bound by products: what slows them down is a multiprocessor that has fewer warps than hide the
latency of what they wait for, tiles along edges and masks, and a last wave that fills the device in part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from graphopt.plugins import TunableSpec
from graphopt_kernels import attention_launch as launching
from graphopt_kernels.attention import attention_backward_plain, attention_plain
from graphopt_kernels.attention_launch import AttentionProblem, Launch
from graphopt_kernels.attention_reference import result_buffers
from graphopt_kernels.tuning.lookup import Choice
from graphopt_kernels.tuning.model import Gpu, Usage, resident

__all__ = ["attention_tunables"]

_CAP = 50.0
_RATE = 0.1
_WIDTHS = (64, 128)
_LENGTHS = (1024, 4096)
_BUSY_WARPS = 8
"""Warps of a multiprocessor that keep its tensor cores fed: two groups of four."""

_MASKS = {
    "attention-keys": [False, True, True, False],
    "attention-queries": [True, False, False, False],
    "attention-bias": [False, False, False, True],
}


def attention_tunables() -> tuple[TunableSpec, ...]:
    """The forward and the kernels of the backward."""
    choices: tuple[Choice[AttentionProblem, Launch], ...] = (
        launching.FORWARD, launching.KEYS, launching.QUERIES, launching.BIAS,
    )  # fmt: skip
    return tuple(_tunable(choice) for choice in choices)


def _tunable(choice: Choice[AttentionProblem, Launch]) -> TunableSpec:
    name = choice.kernel
    return TunableSpec(
        name=name,
        sources=choice.sources,
        kernels=_kernels,
        default=choice.default,
        configurations=_configurations,
        check=choice.check,
        operands=_operands if name == "attention-forward" else _saved,
        run=_run_forward if name == "attention-forward" else _backward(_MASKS[name]),
        reference=_forward_reference if name == "attention-forward" else _backward_reference(_MASKS[name]),
        estimate=_estimated,
        predict=_predicted,
        shipped=lambda: _shipped(biased=name == "attention-bias"),
        summary=f"{name.replace('-', ', ')}: caps, windows, biases, groups of heads",
    )


def _kernels() -> Any:
    kernels = launching.jitted()
    if kernels is None:
        raise ModuleNotFoundError("attention has kernels where triton is installed", name="triton")
    return kernels


def _shipped(*, biased: bool) -> Iterable[AttentionProblem]:
    for width, length in itertools.product(_WIDTHS, _LENGTHS):
        plain = AttentionProblem(64, 4, length, length, width, width, torch.bfloat16, biased, False, 0, True)
        yield plain
        if not biased:
            yield plain._replace(capped=True)
            yield plain._replace(window=512)


def _configurations(problem: AttentionProblem) -> Iterator[Launch]:
    sizes = (16, 32, 64) if problem.dtype is torch.float32 else (32, 64, 128)
    for rows, columns, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3, 4)):
        yield Launch(rows, columns, warps, stages)


def _operands(problem: AttentionProblem, device: torch.device) -> tuple[Any, ...]:
    """Queries, keys, values and a bias of heads."""

    def normal(heads: int, length: int, width: int) -> torch.Tensor:
        # As projections lay them.
        made = torch.randn(1, length, heads, width, device=device, dtype=problem.dtype)
        return made.transpose(1, 2)

    few = max(1, problem.heads // problem.group)
    heads = few * problem.group
    bias = None
    if problem.biased:
        bias = torch.randn(heads, problem.rows, problem.columns, device=device, dtype=problem.dtype)
    return (
        normal(heads, problem.rows, problem.width),
        normal(few, problem.columns, problem.width),
        normal(few, problem.columns, problem.value_width),
        bias,
    )


def _settings(problem: AttentionProblem) -> tuple[float, float, int | None, int | None]:
    left = problem.window - 1 if problem.window else None
    right = problem.columns - problem.rows if problem.causal else None
    return problem.width**-0.5, _CAP if problem.capped else 0.0, left, right


def _dropping(problem: AttentionProblem, operands: tuple[Any, ...]) -> tuple[float, torch.Tensor | None]:
    if not problem.drops:
        return 0.0, None
    return _RATE, torch.zeros(1, dtype=torch.int64, device=operands[0].device)


def _saved(problem: AttentionProblem, device: torch.device) -> tuple[Any, ...]:
    """What a backward takes: the gradient, operands, output and log-sum-exp."""
    operands = _operands(problem, device)
    query, key, value, bias = operands
    if device.type == "meta":
        output, sums = result_buffers(query, value)
    else:
        given = _dropping(problem, operands)
        output, sums = attention_plain(query, key, value, bias, *_settings(problem), *given)
    return torch.randn_like(output), *operands, output, sums


def _run_forward(
    kernels: Any, processors: int, problem: AttentionProblem, operands: tuple[Any, ...], launch: Launch
) -> Sequence[torch.Tensor]:
    query, key, value, bias = operands
    settings = (*_settings(problem), *_dropping(problem, operands))
    return launching.forward(kernels, query, key, value, bias, *settings, launch=launch)


def _forward_reference(problem: AttentionProblem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    query, key, value, bias = operands
    return attention_plain(query, key, value, bias, *_settings(problem), *_dropping(problem, operands))


def _backward(mask: list[bool]) -> Callable[..., Sequence[torch.Tensor]]:
    def run(
        kernels: Any, processors: int, problem: AttentionProblem, operands: tuple[Any, ...], launch: Launch
    ) -> Sequence[torch.Tensor]:
        dy, query, key, value, bias, output, sums = operands
        settings = (*_settings(problem), mask, *_dropping(problem, operands))
        found = launching.backward(
            kernels, dy, query, key, value, bias, output, sums, *settings, launch=launch
        )
        return [x for x, wanted in zip(found, mask, strict=True) if wanted]

    return run


def _backward_reference(mask: list[bool]) -> Callable[..., Sequence[torch.Tensor]]:
    def reference(problem: AttentionProblem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
        dy, query, key, value, bias, output, sums = operands
        settings = (*_settings(problem), mask, *_dropping(problem, operands))
        found = attention_backward_plain(dy, query, key, value, bias, output, sums, *settings)
        return [x for x, wanted in zip(found, mask, strict=True) if wanted]

    return reference


def _estimated(problem: AttentionProblem, launch: Launch) -> Usage:
    """A tile of scores, one of results and the running sums in registers; tiles that are read in shared
    memory, those of a loop once for each stage."""
    width, itemsize, biased, capped, drops = problem.size
    threads = 32 * launch.warps
    words = launch.rows * launch.columns * (1.5 + 0.5 * (biased + capped + drops)) + launch.rows * width
    needed = round(words / threads) + 48
    shared = itemsize * width * (launch.rows + 2 * launch.columns * launch.stages)
    return Usage(min(needed, 255), 4 * max(0, needed - 255), shared)


def _predicted(problem: AttentionProblem, launch: Launch, usage: Usage, gpu: Gpu) -> float:
    held = resident(usage, launch.warps, gpu)
    if not held:
        return float("inf")
    programs = problem.heads * -(-problem.rows // launch.rows)
    busy = gpu.processors * held
    waves = -(-programs // busy)
    uneven = waves * busy / programs
    idle = max(1.0, _BUSY_WARPS / (held * launch.warps))
    # Each step of a loop waits for its products and rescales what is there; masked tiles lie along an edge.
    steps = 1 + 16 / launch.columns + 16 / launch.rows
    edges = 1 + problem.causal * (launch.rows + launch.columns) / max(1, problem.columns)
    spill = 1 + usage.spilled / 64
    return float(uneven * idle * steps * edges * spill)
