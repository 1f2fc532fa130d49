"""Operators that never run again: collectives, random draws, what is not deterministic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphopt
from graphopt_cost_model import workspace
from tests.steps import assert_close, run_step


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank."""
    place = Path(tmp_path_factory.mktemp("ranks")) / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Tail(nn.Module):
    """``spread`` between two stretches of values that may be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 128), nn.Linear(128, 128), nn.Linear(128, 32)

    def spread(self, h: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.spread(torch.tanh(self.a(x)))
        h = torch.sigmoid(self.b(torch.tanh(h)))
        return self.c(h).square().mean()


class Gathered(Tail):
    def spread(self, h: torch.Tensor) -> torch.Tensor:
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        gathered = torch.ops._c10d_functional_autograd.all_gather_into_tensor(h, 1, group)
        return torch.ops._c10d_functional.wait_tensor(gathered)


def _least(model: nn.Module, inputs: tuple[Any, ...], emit: str) -> graphopt.Optimized:
    torch._dynamo.reset()
    settings: dict[str, Any] = {"emit": emit, "on_error": "raise", "pipeline": "insert-checkpoints"}
    free = graphopt.optimize(copy.deepcopy(model), inputs, **settings)
    with pytest.raises(graphopt.BudgetError) as caught:
        torch._dynamo.reset()
        graphopt.optimize(
            copy.deepcopy(model), inputs, budget=free.plan.predicted.peak_bytes // 3, **settings
        )
    torch._dynamo.reset()
    return graphopt.optimize(copy.deepcopy(model), inputs, budget=caught.value.least_bytes, **settings)


@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_collectives_run_once_and_are_reported(alone: None, emit: str) -> None:
    torch.manual_seed(0)
    model, inputs = Gathered(), (torch.randn(256, 32),)
    fast = _least(model, inputs, emit)
    again = [item.op for choice in fast.plan.choices for item in choice.recomputed]
    assert again and not any("c10d" in op for op in again)
    reasons = {miss.at: miss.reason.text for miss in fast.report.near_misses}
    assert reasons["wait_tensor"] == "a collective never runs again: other ranks would not take part"
    assert reasons.keys() == {"all_gather_into_tensor", "wait_tensor"}
    assert "a collective never runs again" in str(fast.report)
    # Gloo's own thread lets go of what it read, and of its copy of that, some time after the wait.
    late = 2 * 256 * 128 * 4 + 8
    assert fast.measure(inputs, repeats=1).peak_bytes <= fast.plan.predicted.peak_bytes + late
    assert_close(run_step(fast, inputs), run_step(model, inputs))


def test_planning_communicates_with_nobody(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    original = workspace._probe
    monkeypatch.setattr(workspace, "_probe", lambda call: probed.append(call.name) or original(call))
    torch._dynamo.reset()
    # Sizes that no other test has: what was probed before is not probed again.
    plan = graphopt.plan(Gathered(), (torch.randn(193, 32),), emit="eager", pipeline="insert-checkpoints")
    assert plan.choices and probed and not [name for name in probed if "c10d" in name]


@torch.library.custom_op(
    "graphopt_test::unsteady", mutates_args=(), tags=(torch.Tag.nondeterministic_bitwise,)
)
def unsteady(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@unsteady.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


unsteady.register_autograd(lambda ctx, gradient: gradient * 2)


class Unsteady(Tail):
    def spread(self, h: torch.Tensor) -> torch.Tensor:
        return unsteady(h)


class Dropping(Tail):
    def spread(self, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(h, 0.5)


@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_what_is_not_deterministic_runs_once_and_is_reported(emit: str) -> None:
    torch.manual_seed(0)
    model, inputs = Unsteady(), (torch.randn(256, 32),)
    fast = _least(model, inputs, emit)
    again = [item.op for choice in fast.plan.choices for item in choice.recomputed]
    assert again and not any("unsteady" in op for op in again)
    assert {miss.reason.text for miss in fast.report.near_misses} == {
        "it is not deterministic: run again, it would not give the same bits"
    }
    assert_close(run_step(fast, inputs), run_step(model, inputs))


def test_random_draws_are_replayed_op_by_op_and_pinned_where_kernels_are_fused() -> None:
    torch.manual_seed(0)
    model, inputs = Dropping(), (torch.randn(256, 32),)
    eager, fused = _least(model, inputs, "eager"), _least(model, inputs, "inductor")
    assert not eager.report.near_misses
    assert_close(run_step(eager, inputs), run_step(model, inputs))
    assert {miss.reason.text for miss in fused.report.near_misses} == {
        "it draws random numbers, which would be others if it ran again"
    }
