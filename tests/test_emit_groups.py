"""Which operators share a kernel, and what that holds in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.program import Level
from graphopt_kernels.emit.groups import Grouping, grouped, peak_ungrouped
from graphopt_kernels.emit.halves import owned_inputs
from graphopt_kernels.emit.order import Step, live_bytes, ordered, peak_bytes, root

KIB = 1024


def traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.Graph:
    with FakeTensorMode():
        return make_fx(function, tracing_mode="real")(*[torch.empty(shape) for shape in shapes]).graph


def steps_of(graph: fx.Graph, grouping: Grouping) -> tuple[list[Step], list[fx.Node]]:
    (output,) = [node for node in graph.nodes if node.op == "output"]
    results = list(dict.fromkeys(output.all_input_nodes))
    groups = [Step(k.nodes, tuple(dict.fromkeys(map(root, k.inputs))), k.outputs) for k in grouping.kernels]
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return ordered(calls, groups, results), results


def names(grouping: Grouping) -> list[str]:
    return [kernel.file.text.name for kernel in grouping.kernels]


def test_a_chain_becomes_one_kernel() -> None:
    grouping = grouped(traced(lambda x: F.gelu(x) * 2 + 1, (16, 16)))
    assert names(grouping) == ["gelu_mul_add"] and not grouping.left


def test_an_operator_by_itself_stays_with_the_library() -> None:
    assert not grouped(traced(lambda x: x.relu().t().cumsum(0), (16, 16))).kernels


def test_nothing_is_merged_around_what_has_to_run_in_between() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        a = F.silu(x) * 2
        return (a.cumsum(0) + a).exp() * a

    grouping = grouped(traced(function, (16, 16)))
    assert names(grouping) == ["silu_mul", "add_exp_mul"]


def test_readers_of_one_value_share_a_kernel() -> None:
    grouping = grouped(traced(lambda x: (x.sigmoid() * 2, x.tanh() + 1), (64, 64)))
    assert names(grouping) == ["sigmoid_mul_tanh_add"]


def test_a_view_of_what_a_kernel_makes_stays_one() -> None:
    grouping = grouped(traced(lambda x: (x.exp() * 2).t().cumsum(0), (16, 16)))
    (kernel,) = grouping.kernels
    assert [node.name for node in kernel.outputs] == ["mul"]


def test_bytes_that_are_alive() -> None:
    graph = traced(lambda x: (x + 1).t().exp().sum(), (256, KIB))  # 1 MiB each
    steps, results = steps_of(graph, Grouping((), ()))
    mib = 1024 * KIB
    assert live_bytes(steps, (), results) == [(0, mib), (mib, 2 * mib), (mib, mib + 4)]
    (x,) = [node for node in graph.nodes if node.op == "placeholder"]
    assert live_bytes(steps, (x,), results)[0] == (mib, 2 * mib)
    assert peak_bytes(steps, (x,), results) == 2 * mib


def test_a_merge_that_would_hold_more_is_left_out_and_allowed_where_there_is_room() -> None:
    """Both ends read ``x``: in one kernel, run at the end, ``y`` would be held while the products run."""

    def function(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        early = (x.exp() * y).sum(0)
        for _ in range(3):
            w = (w @ w) @ w
        return early, w, x.sin() * 3

    graph = traced(function, (64, 64), (64, 64), (64, 64))
    owned = [node for node in graph.nodes if node.op == "placeholder"][:2]
    tight = grouped(graph, owned)
    steps, results = steps_of(graph, tight)
    assert peak_bytes(steps, owned, results) <= peak_ungrouped(graph, owned)
    assert names(tight) == ["exp_mul_sum", "sin_mul"]
    assert names(grouped(graph, owned, sys.maxsize)) == ["exp_mul_sum_sin"]


def step_programs(model: nn.Module, inputs: Any, **options: Any) -> list[graphopt.Program]:
    fast = graphopt.optimize(model, inputs, emit="eager", dynamic_shapes=False, **options)
    return [program for program in fast.programs if program.level is Level.LOWERED]


def fused_peak(program: graphopt.Program, owned: Collection[fx.Node], limit: int) -> int:
    steps, results = steps_of(program.graph, grouped(program.graph, owned, limit))
    return peak_bytes(steps, owned, results)


def test_kernels_hold_no_more_than_the_operators_of_the_plan() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(5) for m in (nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.1))]
    model, x = nn.Sequential(*layers), (torch.randn(256, 64),)
    points = graphopt.optimize(model, x, emit="eager", dynamic_shapes=False).frontier()
    for point in (points[0], points[len(points) // 2], points[-1]):
        halves = step_programs(model, x, budget=point.peak_bytes)
        limit = max(peak_ungrouped(half.graph, owned_inputs(half)) for half in halves)
        for half in halves:
            assert fused_peak(half, owned_inputs(half), limit) <= limit
