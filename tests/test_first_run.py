"""A program that fails when it is first run: the graph that it was made of runs in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import _torch, api
from graphopt.emit.eager import EagerEmitter
from graphopt.errors import BudgetError
from graphopt.first_run import FirstRun
from tests.steps import assert_same, run_step

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
REASON = "runs as it was captured, and its plan does not hold: RuntimeError: no kernel for that"


class Net(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.broken = nn.Linear(8, 8), nn.Linear(8, 8), broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.dropout(self.a(x), 0.5)
        if self.broken:
            torch._dynamo.graph_break()
        return self.b(h)


def _failing(half: Any, run: Callable[..., Any], **about: Any) -> Callable[..., Any]:
    def fails(args: list[Any]) -> list[Any]:
        torch.rand(3)
        raise RuntimeError("no kernel for that\nat all")

    return _torch.boxed(fails)


@pytest.mark.parametrize(("broken", "programs"), [(False, ["g0"]), (True, ["g0", "g1"])])
def test_the_graph_runs_as_it_was_captured(
    broken: bool, programs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(api, "resolve_emitter", lambda *args: EagerEmitter(_failing))
    plain = Net(broken)
    fast = graphopt.optimize(Net(broken), (X,), emit="eager", cache=False)
    for seed in (1, 2):
        assert_same(*(run_step(module, (X.clone(),), seed=seed) for module in (fast, plain)))
    notes = [note for note in fast.report.diagnostics if "not one graph" not in note]
    assert notes == [f"{name}: {REASON}" for name in programs]


def test_developers_get_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(api, "resolve_emitter", lambda *args: EagerEmitter(_failing))
    fast = graphopt.optimize(Net(), (X,), emit="eager", cache=False, on_error="raise")
    with pytest.raises(RuntimeError, match="no kernel for that"):
        fast(X)


def _tried(error: Exception, write: bool = False, plain: Callable[..., Any] = torch.neg) -> list[str]:
    notes: list[str] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        if write:
            x.add_(1)
        raise error

    first = FirstRun(run, plain, notes.append)
    for _ in range(2):
        assert torch.equal(first(torch.ones(2)), torch.tensor([-1.0, -1.0]))
    return notes


def test_what_is_raised_after_all() -> None:
    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise IndexError("the model's own")

    assert len(_tried(ValueError("that"))) == 1
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        _tried(torch.OutOfMemoryError("no room"))
    with pytest.raises(BudgetError, match="nothing fits"):
        _tried(BudgetError("nothing fits", least_bytes=1, budget_bytes=0))
    with pytest.raises(ValueError, match="that"):
        _tried(ValueError("that"), write=True)
    with pytest.raises(IndexError, match="the model's own"):
        _tried(ValueError("that"), plain=refuses)


def test_a_program_that_ran_once_is_not_left() -> None:
    calls = []

    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 2:
            raise ValueError("later")
        return x

    first = FirstRun(run, torch.neg, calls.append)
    first(X)
    with pytest.raises(ValueError, match="later"):
        first(X)
    assert first(X) is X
