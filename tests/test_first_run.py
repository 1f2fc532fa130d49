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
from graphopt.first_run import FirstRun, Untouched
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


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return self.norm(x).square()


@pytest.mark.parametrize("inputs", [False, True], ids=["buffers", "inputs"])
def test_buffers_that_a_program_wrote_before_it_failed_are_put_back(
    inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(half: Any, run: Callable[..., Any], **about: Any) -> Callable[..., Any]:
        def fails(args: list[Any]) -> list[Any]:
            for x in args:
                if x.shape != X.shape or inputs:
                    x.detach().add_(3)
            raise RuntimeError("no kernel for that")

        return _torch.boxed(fails)

    torch._dynamo.reset()
    monkeypatch.setattr(api, "resolve_emitter", lambda *args: EagerEmitter(failing))
    plain, model = Counted(), Counted()
    fast = graphopt.optimize(model, (X,), emit="eager", cache=False)
    if inputs:
        # Nobody knows what they were.
        with pytest.raises(RuntimeError, match="no kernel for that"):
            fast(X.clone())
        return
    for _ in range(2):
        assert torch.equal(fast(X.clone()), plain(X.clone()))
    assert REASON in str(fast.report.diagnostics)
    for name, value in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), value), name


def test_buffers_without_plain_memory_are_not_copied() -> None:
    kinds = [torch.eye(3).to_sparse(), torch.ones(3, device="meta"), "no tensor", torch.ones(3)]
    before = Untouched(kinds, kinds)
    kinds[3].add_(1)
    assert before.put_back() and torch.equal(kinds[3], torch.ones(3))
    with torch.no_grad():
        kinds[0].mul_(2)
    assert not before.put_back(), "nobody knows what it was"


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


class Picked(nn.Module):
    """What torch bounds by the elements of ``x`` alone, although the mask is broadcast with it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.masked_select(nn.functional.dropout(x * self.scale, 0.5), mask).sum()


def test_a_model_that_runs_is_left_as_it_is_where_all_that_was_captured_fails() -> None:
    torch._dynamo.reset()
    inputs = (torch.randn(10), torch.ones(10, 10, dtype=torch.bool))
    plain, fast = Picked(), graphopt.optimize(Picked(), inputs, emit="eager", cache=False)
    for seed in (1, 2):
        assert_same(*(run_step(module, inputs, seed=seed) for module in (fast, plain)))
    assert not fast.report.programs
    (note,) = fast.report.diagnostics
    assert note.startswith("not captured, runs as it did: what was captured fails: RuntimeError: Runtime ass")
    torch._dynamo.reset()
    strict = graphopt.optimize(Picked(), inputs, emit="eager", cache=False, on_error="raise")
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):
        strict(*inputs)


def test_inputs_that_the_model_refuses_get_its_own_error_and_leave_it_captured() -> None:
    torch._dynamo.reset()
    plain = nn.Embedding(4, 2)
    fast = graphopt.optimize(plain, (torch.tensor([1]),), emit="eager", cache=False)
    with pytest.raises(IndexError, match="index out of range"):
        fast(torch.tensor([7]))
    assert torch.equal(fast(torch.tensor([3])), plain(torch.tensor([3])))
    assert fast.report.programs and not fast.report.diagnostics


def test_what_was_written_to_before_it_failed_is_not_run_again() -> None:
    x = torch.zeros(2)
    before = Untouched([x, "no tensor"])
    state = torch.get_rng_state()
    torch.rand(3)
    assert before.put_back() and torch.equal(torch.get_rng_state(), state)
    x.add_(1)
    torch.rand(3)
    assert not before.put_back() and not torch.equal(torch.get_rng_state(), state)
