"""The policy by itself on small curves, and through ``optimize``."""

from __future__ import annotations

import itertools

import torch
from torch import nn

import graphopt
from graphopt import Frontier, FrontierPoint, PolicyQuestion, Schedule, Selection
from graphopt.plugins import default_host
from graphopt_frugal.policy import frugal


def curve(*points: tuple[int, float]) -> Frontier:
    """Points of so many bytes at the peak, all of them retained, and so many seconds."""
    made = (FrontierPoint(Schedule((f"{b}/{s}",)), b, b, b, 0, s) for b, s in points)
    return Frontier("test", tuple(made))


def question(*frontiers: Frontier, step_seconds: float) -> PolicyQuestion:
    fastest = Selection(tuple(min(f.points, key=lambda p: p.seconds) for f in frontiers))

    def peak(selection: Selection) -> int:
        return sum(point.retained for point in selection.points)

    device = default_host().device("h100")
    return PolicyQuestion(frontiers, (1,) * len(frontiers), step_seconds, None, device, fastest, peak)


def chosen(asked: PolicyQuestion, share: float) -> list[int]:
    return [point.retained for point in frugal(asked, share=share).points]


def test_it_spends_the_time_it_may_and_no_more() -> None:
    frontier = curve((10, 0.0), (6, 1.0), (4, 2.0), (1, 50.0))
    asked = question(frontier, step_seconds=100.0)
    assert [chosen(asked, share) for share in (0.0, 0.01, 0.02, 0.5)] == [[10], [6], [4], [1]]


def test_programs_of_one_kind_stay_alike() -> None:
    frontier, other = curve((10, 0.0), (6, 1.0)), curve((10, 0.0), (9, 3.0))
    asked = question(frontier, other, frontier, step_seconds=100.0)
    assert chosen(asked, 0.02) == [6, 10, 6]
    assert chosen(asked, 0.01) == [10, 10, 10]
    assert chosen(asked, 0.05) == [6, 9, 6]


def test_what_takes_more_memory_is_never_taken() -> None:
    for points in itertools.permutations([(5, 0.0), (7, 0.0), (9, 1.0)]):
        assert chosen(question(curve(*points), step_seconds=10.0), 0.5) == [5]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def test_a_model_trains_in_less_memory_with_the_same_gradients() -> None:
    model, x = Model(), torch.randn(512, 64)
    plans = {
        name: graphopt.plan(model, (x,), emit="eager", policy=name) for name in (None, "frugal", "frugal-10")
    }
    assert [plan.policy for plan in plans.values()] == ["", "frugal", "frugal-10"]
    peaks = [plan.predicted.peak_bytes for plan in plans.values()]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0]
    for plan, share in zip(plans.values(), (0.0, 0.02, 0.10), strict=True):
        assert plan.predicted.seconds <= plans[None].predicted.seconds * (1 + share) * (1 + 1e-9)
    fast = graphopt.optimize(model, (x,), emit="eager", policy="frugal-10", on_error="raise")
    wanted = list(model.parameters())
    for a, b in zip(torch.autograd.grad(fast(x), wanted), torch.autograd.grad(model(x), wanted), strict=True):
        assert torch.equal(a, b)


def test_a_budget_holds() -> None:
    model, x = Model(), torch.randn(512, 64)
    plan = graphopt.plan(model, (x,), emit="eager")
    budget = int(plan.predicted.peak_bytes * 0.9)
    tight = graphopt.plan(model, (x,), emit="eager", budget=budget, policy="frugal-10")
    assert tight.policy == "frugal-10" and tight.predicted.peak_bytes <= budget
