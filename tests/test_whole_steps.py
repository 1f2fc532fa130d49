"""Steps of more than one call: several forwards before a backward, several backwards, several models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.measure import allocator_peak
from graphopt.plans import Plan


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Tanh(), nn.Linear(128, 128))
        self.head = nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sigmoid(torch.tanh(self.layers(x))))


class Broken(Encoder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layers(x)
        print(end="")
        return self.head(torch.sigmoid(torch.tanh(h)))


def _made(kind: type[Encoder] = Encoder) -> tuple[Encoder, torch.Tensor, torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return kind(), torch.randn(256, 32), torch.randn(256, 32)


Step = Callable[[nn.Module], torch.Tensor]


def _contrast(a: torch.Tensor, b: torch.Tensor) -> Step:
    def step(module: nn.Module) -> torch.Tensor:
        loss = (module(a) - module(b)).square().mean()
        loss.backward()
        return loss.detach()

    return step


def _accumulate(a: torch.Tensor, b: torch.Tensor) -> Step:
    def step(module: nn.Module) -> torch.Tensor:
        losses = []
        for x in (a, b):
            loss = module(x).square().mean()
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


def _check(model: Encoder, make: Callable[..., Step], emit: str, *inputs: torch.Tensor) -> None:
    step, plain = make(*inputs), copy.deepcopy(model)
    expected = step(plain)

    def made(budget: int | None) -> graphopt.Optimized:
        torch._dynamo.reset()
        return graphopt.optimize(copy.deepcopy(model), step=step, emit=emit, budget=budget, on_error="raise")

    free = made(None)
    most = free.plan.predicted.peak_bytes
    assert free.measure(repeats=1).peak_bytes == most
    with pytest.raises(graphopt.BudgetError) as caught:
        made(most // 3)
    least = caught.value.least_bytes
    assert least < most
    fast = made(least)
    assert fast.plan.predicted.peak_bytes <= least
    # Measured from outside too: weights, both inputs, and what the step allocates.
    static = sum(4 * t.numel() for t in (*fast.parameters(), *inputs))
    assert static + allocator_peak(lambda: step(fast), torch.device("cpu")) == fast.plan.predicted.peak_bytes
    fast.zero_grad()
    torch.testing.assert_close(step(fast), expected)
    for (name, p), q in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("emit", ["eager", "inductor"])
@pytest.mark.parametrize("make", [_contrast, _accumulate])
def test_what_a_step_of_several_calls_takes_is_planned_to_the_byte(
    make: Callable[..., Step], emit: str
) -> None:
    model, *inputs = _made()
    _check(model, make, emit, *inputs)


def test_a_step_of_several_calls_of_several_graphs() -> None:
    model, *inputs = _made(Broken)
    _check(model, _contrast, "eager", *inputs)


def test_capture_of_a_step_puts_everything_back() -> None:
    model, *inputs = _made()
    step = _contrast(*inputs)
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    fast = graphopt.optimize(model, step=step, emit="eager", on_error="raise")
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in fast.parameters())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert fast.report.diagnostics == ()
    assert [p.name for p in fast.programs if p.level == "semantic"] == ["g0"]
    assert fast._driver.session._seen is not None and fast._driver.session._seen[1].calls == [2]


def test_a_plan_of_a_step_is_stored_replayed_and_refused(tmp_path: Any) -> None:
    model, *inputs = _made(Broken)
    step = _contrast(*inputs)
    settings: dict[str, Any] = {"emit": "eager", "on_error": "raise"}
    free = graphopt.optimize(model, step=step, **settings)
    lower = free.frontier()[0].peak_bytes
    torch._dynamo.reset()
    within = graphopt.optimize(model, step=step, budget=lower, **settings)
    within.plan.save(tmp_path / "plan.json")
    stored = Plan.load(tmp_path / "plan.json")
    torch._dynamo.reset()
    again = graphopt.optimize(model, step=step, plan=stored, **settings)
    assert again.plan.choices == within.plan.choices
    assert again.plan.predicted.peak_bytes == within.plan.predicted.peak_bytes == lower
    torch._dynamo.reset()
    longer = [torch.cat([x, x]) for x in inputs]
    with pytest.raises(
        graphopt.StalePlanError, match=r"program 'g0' has fingerprint .*: the model, its input"
    ):
        graphopt.optimize(model, step=_contrast(*longer), plan=stored, **settings)
    torch._dynamo.reset()
    with pytest.raises(
        graphopt.StalePlanError, match="the plan has program 'g1', which the captured model lacks"
    ):
        plain, *others = _made()
        graphopt.optimize(plain, step=_contrast(*others), plan=_first_of(stored, plain, others), **settings)


def _first_of(plan: Plan, plain: Encoder, inputs: list[torch.Tensor]) -> Plan:
    """``plan`` with the fingerprint of the whole model's only program in its first choice."""
    from dataclasses import replace

    whole = graphopt.plan(plain, None, step=_contrast(*inputs), emit="eager")
    torch._dynamo.reset()
    return replace(plan, choices=(whole.choices[0], *plan.choices[1:]))


def test_steps_that_cannot_be_planned_say_why() -> None:
    model, *_ = _made()
    with pytest.raises(graphopt.InputsError, match="step is 3: expected a function of the module"):
        graphopt.optimize(model, step=3)  # type: ignore[arg-type]
    with pytest.raises(graphopt.InputsError, match="step never ran the model: expected calls of the module"):
        graphopt.optimize(model, step=lambda module: None)
    with pytest.raises(graphopt.InputsError, match="step raised ZeroDivisionError: integer division"):
        graphopt.optimize(model, step=lambda module: 1 // 0)


def test_calls_that_the_plan_does_not_count_are_noted() -> None:
    model, a, b = _made()
    fast = graphopt.optimize(model, (a,), emit="eager", on_error="raise")
    _contrast(a, b)(fast)
    assert fast.report.diagnostics == (
        "the module was called 2 times before a backward: every call holds what it saves, the plan counts 1; "
        "give optimize() the whole step as step=",
    )


def test_gradients_that_the_plan_does_not_count_are_noted() -> None:
    model, a, b = _made()
    fast = graphopt.optimize(model, (a,), emit="eager", on_error="raise")
    _accumulate(a, b)(fast)
    size = graphopt.budget.format_bytes(sum(4 * p.numel() for p in model.parameters()))
    assert fast.report.diagnostics == (
        f"gradients of {size} are held as the next step begins, which the plan does not count: set them to "
        "None before, or give optimize() the whole step as step=",
    )


def test_steps_as_planned_are_not_noted() -> None:
    model, a, b = _made()
    fast = graphopt.optimize(model, (a,), emit="eager", on_error="raise")
    fast(a)  # dropped: holds nothing
    for x in (a, b, a):
        fast(x).square().mean().backward()
        fast.zero_grad()
    assert fast.report.diagnostics == ()
    model, a, b = _made()
    for step in (_contrast(a, b), _accumulate(a, b)):
        torch._dynamo.reset()
        fast = graphopt.optimize(model, step=step, emit="eager", on_error="raise")
        for _ in range(3):
            step(fast)
            fast.zero_grad()
        assert fast.report.diagnostics == ()
