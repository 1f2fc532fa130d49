"""A deep compiled net under a budget that only rows of blocks that run again can keep."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt

DEPTH = 12


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up = nn.BatchNorm1d(width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.relu(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(DEPTH)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.inlet(x)).square().mean()


X = (torch.randn(2048, 8),)


def _optimized(model: nn.Module, **options: object) -> graphopt.Optimized:
    torch._dynamo.reset()
    return graphopt.optimize(copy.deepcopy(model), inputs=X, emit="inductor", on_error="raise", **options)


def _step(fast: graphopt.Optimized, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fast.load_state_dict(state)
    torch.manual_seed(3)
    loss = fast(*X)
    loss.backward()
    found = {f"{name}.grad": p.grad for name, p in fast.named_parameters()}
    for parameter in fast.parameters():
        parameter.grad = None
    buffers = {name: b.clone() for name, b in fast.named_buffers()}
    return {"loss": loss.detach(), "random": torch.get_rng_state(), **found, **buffers}


def test_blocks_run_again_and_nothing_but_the_memory_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Deep()
    state = copy.deepcopy(model.state_dict())
    free = _optimized(model)
    # Less than the streams between the blocks alone.
    stream = X[0].shape[0] * 64 * 4
    budget = free.plan.baseline.weight_bytes + X[0].nbytes + int(0.8 * DEPTH * stream)
    tight = _optimized(model, budget=budget)
    plan = tight.plan
    assert plan.reruns and not free.plan.reruns
    assert plan.predicted.peak_bytes <= budget
    assert plan.predicted.flops > free.plan.predicted.flops
    assert tight.measure(X, repeats=1).peak_bytes <= budget
    assert f"calls {plan.reruns[0].start} to {plan.reruns[0].stop - 1} run again" in str(plan)

    expected, found = _step(free, state), _step(tight, state)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)

    plan.save(tmp_path / "plan.json")
    again = _optimized(model, plan=graphopt.Plan.load(tmp_path / "plan.json"))
    assert again.plan.reruns == plan.reruns
    for name, value in _step(again, state).items():
        assert torch.equal(value, found[name]), name


def test_without_a_pass_that_recomputes_nothing_runs_again() -> None:
    with pytest.raises(graphopt.BudgetError, match="no plan fits"):
        _optimized(Deep(), budget="6MiB", pipeline=["normalize"])
