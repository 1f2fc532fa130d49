"""The first training step is measured as it runs, where the allocator counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture.timeline import StatisticsTimeline
from graphopt.cost import Cost
from graphopt.first_step import FirstStep
from graphopt.observed import Gap


class Counters:
    """An allocator's counters, moved by hand."""

    def __init__(self) -> None:
        self.now = self.most = 1000
        self.resets = 0

    def take(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def allocated(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.most

    def reset_peak(self) -> None:
        self.most, self.resets = self.now, self.resets + 1


def test_stretches_are_told_apart_by_counters() -> None:
    counters = Counters()
    timeline = StatisticsTimeline(counters)

    def run() -> None:
        for first, second in ((100, -40), (50, -110), (7, 0)):
            counters.take(first)
            counters.take(second)
            timeline.mark()
        counters.take(-7)

    assert timeline.record(run) == [Gap(60, 100), Gap(-60, 50), Gap(7, 7), Gap(-7, 0)]


class Net(nn.Module):
    """Moves the counters in its forward and in its backward."""

    def __init__(self, counters: Counters) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.counters = counters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counters.take(300)
        y = x * self.weight
        y.register_hook(lambda gradient: (self.counters.take(200), self.counters.take(-500))[2:] or None)
        return y.sum()


def _step(first: FirstStep, net: Net) -> None:
    first.begin(5000)
    output = net(torch.ones(4))
    first.returned((output, {"aside": 3}))
    output.backward()
    # What an optimizer takes after the backward is no part of the step.
    net.counters.take(10_000)
    net.counters.take(-10_000)


def _watched(counters: Counters, **options: Any) -> tuple[FirstStep, Net, list[str]]:
    net, notes = Net(counters), list[str]()
    settings: dict[str, Any] = {"calls": 1, "held": False, "note": notes.append}
    return FirstStep(list(net.parameters()), counters, **settings | options), net, notes


def test_the_first_step_is_measured_once_and_ends_with_its_backward() -> None:
    counters = Counters()
    counters.take(50_000)
    counters.take(-50_000)
    first, net, notes = _watched(counters)
    _step(first, net)
    assert first.peak_bytes == 5000 + 500
    net.weight.grad = None
    counters.take(1)
    first.begin(5000)
    assert first.over and first.peak_bytes == 5500 and counters.resets == 1 and not notes


def test_a_step_that_begins_with_gradients_is_not_the_one_that_was_planned() -> None:
    first, net, _ = _watched(Counters())
    net.weight.grad = torch.ones(4)
    _step(first, net)
    assert first.peak_bytes is None and net.counters.resets == 0
    first, net, _ = _watched(Counters(), held=True)
    net.weight.grad = torch.ones(4)
    _step(first, net)
    assert first.peak_bytes == 5500


def test_a_step_in_which_libraries_take_their_workspace_is_not_the_one_that_is_measured() -> None:
    counters = Counters()
    first, net, notes = _watched(counters, workspace_bytes=64)

    def step(taken: int) -> None:
        first.begin(5000)
        output = net(torch.ones(4))
        first.returned(output)
        counters.take(taken)
        counters.take(16)
        output.backward()
        net.weight.grad = None
        counters.take(-16)

    step(64)
    assert first.peak_bytes is None and not first.over
    step(0)
    assert first.peak_bytes == 5516
    step(64)
    assert first.over and first.peak_bytes == 5516 and not notes
    # What each step keeps is measured, once it is seen to be no workspace.
    first, net, _ = _watched(counters, workspace_bytes=64)
    step(64)
    step(64)
    assert first.peak_bytes == 5580


def test_a_step_of_two_calls_ends_with_the_last_backward() -> None:
    first, net, notes = _watched(Counters(), calls=2)
    first.begin(5000)
    one = net(torch.ones(4))
    first.returned(one)
    first.begin(5000)
    two = net(torch.ones(4))
    first.returned(two)
    (one + two).backward()
    assert first.peak_bytes == 5000 + 600 + 200 and not notes


def test_outputs_that_nothing_can_be_differentiated_from_end_no_step() -> None:
    first, _, notes = _watched(Counters())
    for _ in range(3):
        first.begin(5000)
        first.returned(torch.ones(2))
    assert first.peak_bytes is None and not first.over and not notes


class Scored(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean()


@pytest.mark.parametrize(("most", "text"), [(10**6, "exceeds the budget of"), (100, "")])
def test_reports_compare_what_the_first_step_took(
    most: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters = Counters()
    monkeypatch.setattr("graphopt.capture.driver.statistics_of", lambda device: counters)
    model = Scored(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(16, 8)
    fast = graphopt.optimize(model, (x,), emit="eager", budget=10_000, on_error="raise")
    assert fast.report.measured is None and fast.report.peak_error is None
    output = fast(x)
    counters.take(most)
    output.backward()
    static = fast._driver.session.static_bytes
    assert static is not None
    report = fast.report
    assert report.predicted is not None
    assert report.measured == Cost(static + most, report.predicted.weight_bytes, None)
    assert report.peak_error == static + most - report.predicted.peak_bytes
    side = "above" if most > report.predicted.peak_bytes else "below"
    assert f"{side} the one predicted" in str(report)
    assert [text in note for note in report.diagnostics] == ([True] if text else [])
    # What is asked for goes before what came by itself.
    assert fast.measure((x,), repeats=1).peak_bytes == report.predicted.peak_bytes
    assert "the peak measured is the one predicted, to the byte" in str(fast.report)
    assert fast.report.diagnostics == ()


def test_a_step_on_the_cpu_is_measured_when_asked_alone() -> None:
    torch._dynamo.reset()
    model, x = nn.Linear(4, 4), torch.randn(4, 4)
    fast = graphopt.optimize(model, (x,), emit="eager", on_error="raise")
    fast(x).sum().backward()
    assert fast.report.measured is None
