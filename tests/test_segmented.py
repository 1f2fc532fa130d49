"""A step as a chain of compiled segments: same numbers, memory as the code says, budget kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, depth: int = 4, width: int = 32) -> None:
        super().__init__()
        self.inlet = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.outlet = nn.Linear(width, width)
        self.outlet.weight = self.inlet.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return self.outlet(x).square().mean()


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor]:
    return (torch.randn(256, 32),)


@pytest.fixture(scope="module")
def unbudgeted(inputs: tuple[torch.Tensor]) -> graphopt.Optimized:
    return graphopt.optimize(Stack(), inputs, emit="inductor", on_error="raise")


def gradients(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    for parameter in module.parameters():
        parameter.grad = None
    loss = module(*inputs)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_blocks_of_one_kind_are_compiled_once(unbudgeted: graphopt.Optimized) -> None:
    blocks = [choice for choice in unbudgeted.plan.choices if ".block" in choice.program]
    assert len(blocks) >= 2
    assert len({choice.fingerprint for choice in blocks}) == 1
    assert len({choice.schedule for choice in blocks}) == 1
    # Prologue, one kind of block, epilogue: three compilations however many calls.
    assert len({choice.fingerprint for choice in unbudgeted.plan.choices}) == 3


def test_values_and_gradients_are_the_models(
    unbudgeted: graphopt.Optimized, inputs: tuple[torch.Tensor]
) -> None:
    model = copy.deepcopy(unbudgeted._model)
    loss, grads = gradients(unbudgeted, inputs)
    expected_loss, expected = gradients(model, inputs)
    torch.testing.assert_close(loss, expected_loss)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_measured_peak_is_the_predicted_one(unbudgeted: graphopt.Optimized) -> None:
    predicted = unbudgeted.plan.predicted.peak_bytes
    assert unbudgeted.measure(repeats=1).peak_bytes == pytest.approx(predicted, rel=0.02)


def test_a_budget_is_kept_and_changes_no_number(inputs: tuple[torch.Tensor]) -> None:
    model = Stack()
    free = graphopt.optimize(model, inputs, emit="inductor", on_error="raise")
    curve = free.frontier()
    budget = (curve[0].peak_bytes * 3 + curve[-1].peak_bytes) // 4
    tight = graphopt.optimize(model, inputs, budget=budget, emit="inductor", on_error="raise")
    assert any(choice.recomputed for choice in tight.plan.choices)
    assert tight.plan.predicted.peak_bytes <= budget
    assert tight.measure(repeats=1).peak_bytes <= budget
    loss, grads = gradients(tight, inputs)
    other_loss, others = gradients(free, inputs)
    torch.testing.assert_close(loss, other_loss)
    for found, wanted in zip(grads, others, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("held", [False, True], ids=["none held", "gradients held"])
@pytest.mark.parametrize("within", [None, "60%"])
def test_a_plan_that_is_replayed_takes_what_it_was_predicted_to(
    inputs: tuple[torch.Tensor], within: str | None, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(**options: Any) -> graphopt.Optimized:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Stack()
        for parameter in model.parameters() if held else ():
            parameter.grad = torch.zeros_like(parameter)
        return graphopt.optimize(model, inputs, emit="inductor", on_error="raise", **options)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the plan says which schedule runs")

    first = made(budget=within)
    plan, expected = replace(first.plan, seconds_to_plan=0.0), gradients(first, inputs)[1]
    # Calls of one kind run schedules of their own.
    assert bool(within) == (len({(choice.fingerprint, choice.schedule) for choice in plan.choices}) > 3)
    monkeypatch.setattr("graphopt_passes.insert_checkpoints.search", never)
    for budget in (None, plan.budget):
        again = made(plan=plan, budget=budget)
        assert replace(again.plan, seconds_to_plan=0.0) == replace(plan, budget_bytes=budget)
        assert again.measure(repeats=1).peak_bytes == pytest.approx(plan.predicted.peak_bytes, rel=0.02)
        assert all(map(torch.equal, gradients(again, inputs)[1], expected))


def test_gradients_that_are_held_count_throughout(inputs: tuple[torch.Tensor]) -> None:
    model = Stack()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held = graphopt.optimize(model, inputs, emit="inductor", on_error="raise")
    measured = held.measure(repeats=1).peak_bytes
    assert measured == pytest.approx(held.plan.predicted.peak_bytes, rel=0.02)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_what_cannot_fit_is_refused_with_the_least(inputs: tuple[torch.Tensor]) -> None:
    with pytest.raises(graphopt.BudgetError, match="the least that fits is") as refused:
        graphopt.optimize(Stack(), inputs, budget="64KiB", emit="inductor", on_error="raise")
    assert refused.value.least_bytes > 64 * 1024


class Convolutions(nn.Module):
    """Estimates of its kernels are often off: convolutions choose their layouts late."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in ((3, 16), (16, 16), (16, 32)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


@pytest.mark.parametrize("share", [0.97, 0.8])
def test_what_is_refused_is_less_than_the_least_that_was_reached(share: float) -> None:
    images = (torch.randn(8, 3, 32, 32),)
    whole = graphopt.plan(Convolutions(), images, emit="inductor")
    budget = int(share * whole.baseline.peak_bytes)
    try:
        fast = graphopt.optimize(Convolutions(), images, emit="inductor", budget=budget, on_error="raise")
    except graphopt.BudgetError as error:
        assert error.least_bytes > budget
    else:
        assert fast.report.predicted.peak_bytes <= budget
