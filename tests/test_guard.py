"""A program that measures worse than the model it was made from is not kept, and trying changes nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.guard import ROUNDS, WARM_STEPS
from graphopt.measure import Measurement
from tests.steps import assert_same, run_step

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Dropout, statistics, a buffer that is replaced, a counter of plain Python."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.register_buffer("last", torch.zeros(8))
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        h = self.norm(self.a(x))
        self.last = h.detach().sum(0)
        return self.b(nn.functional.dropout(h, 0.5, self.training))


class Clock:
    """Runs a step and says what it was told that the step takes: the program's, then the model's."""

    def __init__(self, *taken: tuple[float, int]) -> None:
        self.taken = taken
        self.steps = 0

    def __call__(
        self,
        step: Callable[[], object],
        *,
        device: torch.device,
        static_bytes: int,
        before: Callable[[], object],
    ) -> Measurement:
        before()
        step()
        random.random()
        seconds, peak = self.taken[self.steps % len(self.taken)]
        self.steps += 1
        return Measurement(peak, seconds)


def _guarded(clock: Callable[..., Measurement], model: nn.Module, **options: Any) -> graphopt.Optimized:
    torch._dynamo.reset()
    fast = graphopt.optimize(model, (X,), emit="eager", cache=False, guard="measure", **options)
    assert fast._driver.guard is not None
    fast._driver.guard.measurer = clock
    return fast


@pytest.mark.parametrize("slower", [True, False])
def test_what_measures_slower_is_replaced_and_trying_leaves_no_trace(slower: bool) -> None:
    clock = Clock((0.02 if slower else 0.0101, 2048), (0.01, 1024))
    plain = Net()
    fast = _guarded(clock, Net())
    for seed in (1, 2):
        expected, found = (run_step(module, (X.clone(),), seed=seed) for module in (plain, fast))
        assert_same(found, expected)
        assert (fast.count, random.getstate()) == (plain.count, random.getstate())
    assert clock.steps == 2 * ROUNDS
    if slower:
        told = "20.0 ms and 2.00 KiB against 10.0 ms and 1.00 KiB of the model as it was"
        assert fast.report.diagnostics == (f"training runs as it did: optimized it measured {told}",)
    else:
        assert fast.report.diagnostics[0].startswith("training measured 10.1 ms and 2.00 KiB against 10.0 ms")
    guard = fast._driver.guard
    assert guard is not None and guard.replaced(True) is slower and not guard.replaced(False)


def test_inference_is_judged_by_itself() -> None:
    clock = Clock((0.02, 1024), (0.01, 1024))
    fast = _guarded(clock, Net().eval())
    with torch.no_grad():
        expected = fast._model(X)
        assert torch.equal(fast(X), expected) and torch.equal(fast(X), expected)
    assert clock.steps == 2 * ROUNDS
    assert "inference runs as it did: optimized it measured 20.0 ms" in fast.report.diagnostics[0]


def test_a_budget_counts_before_time() -> None:
    """The model is faster and takes more than the budget: the program stays."""
    budget = graphopt.optimize(Net(), (X,), emit="eager", cache=False).plan.baseline.peak_bytes
    fast = _guarded(Clock((0.02, budget), (0.01, budget + 1)), Net(), budget=budget)
    fast(X).sum().backward()
    assert fast.report.diagnostics[0].startswith("training measured 20.0 ms")
    fast = _guarded(Clock((0.01, budget + 1), (0.02, budget)), Net(), budget=budget)
    fast(X).sum().backward()
    assert fast.report.diagnostics[0].startswith("training runs as it did: optimized it measured 10.0 ms")


class Writing(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x.clone())
        x.add_(h.detach())
        return h


class Refusing(Clock):
    def __call__(self, step: Callable[[], object], **options: Any) -> Measurement:
        raise torch.OutOfMemoryError("there is no room")


@pytest.mark.parametrize(
    ("make", "clock", "reason"),
    [
        (Writing, Clock((1.0, 1)), "it writes its inputs"),
        (Net, Refusing((1.0, 1)), "OutOfMemoryError: there is no room"),
    ],
)
def test_what_cannot_be_tried_is_kept_and_said(make: type[Net], clock: Clock, reason: str) -> None:
    x = X.clone()
    fast = _guarded(clock, make())
    fast(x).sum().backward()
    assert fast.report.diagnostics == (f"training was not measured against the model's own: {reason}",)
    assert clock.steps == 0 and (make is Net or not torch.equal(x, X))


def test_hooks_that_wait_for_gradients_are_not_called_in_vain() -> None:
    called: list[torch.Tensor] = []
    model = Net()
    model.b.weight.register_post_accumulate_grad_hook(called.append)
    fast = _guarded(Clock((1.0, 1)), model)
    fast(X).sum().backward()
    assert len(called) == 1
    assert fast.report.diagnostics[0].endswith("hooks wait for its gradients")


def test_real_steps_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's call is held up: it measures slower by the real clock."""
    torch._dynamo.reset()
    fast = graphopt.optimize(Net().eval(), (X,), emit="eager", cache=False, guard="measure")
    inner = fast._driver.call
    assert inner is not None

    def held_up(*args: Any) -> Any:
        time.sleep(0.002)
        return inner(*args)

    monkeypatch.setattr(fast._driver, "call", held_up)
    with torch.no_grad():
        fast(X)
    assert "inference runs as it did: optimized it measured" in fast.report.diagnostics[0]


def test_nothing_is_measured_on_a_cpu_unless_asked() -> None:
    assert graphopt.optimize(Net(), emit="eager")._driver.guard is None
    with pytest.raises(graphopt.UnknownNameError, match=r"unknown value of guard 'mesure'.*measure"):
        graphopt.optimize(Net(), emit="eager", guard="mesure")


@pytest.mark.parametrize(
    ("emit", "guard", "measured"),
    [
        ("inductor", None, True),
        ("inductor", "off", False),
        ("eager", None, False),
        ("eager", "measure", True),
    ],
)
def test_programs_that_are_compiled_for_a_gpu_are_measured(
    emit: str, guard: str | None, measured: bool
) -> None:
    model = nn.Module()
    with torch._subclasses.FakeTensorMode():
        model.weight = nn.Parameter(torch.empty(4, device="cuda"))
    fast = graphopt.optimize(model, emit=emit, guard=guard, device="h200")
    assert (fast._driver.guard is not None) == measured


def test_steps_to_warm_up_are_enough_for_a_recorder() -> None:
    from graphopt.recording import WARM

    assert WARM_STEPS > WARM
