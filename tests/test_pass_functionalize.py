"""functionalize: what is written in place becomes a value of its own, bit for bit; what stays, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.program import Program
from graphopt_passes.functionalize import Functionalize
from tests.programs import context, semantic

Function = Callable[..., Any]


def proposals(program: Program) -> tuple[list[Candidate], list[str]]:
    items = list(Functionalize().propose(program, context()))
    return (
        [item for item in items if isinstance(item, Candidate)],
        [item.reason.text for item in items if isinstance(item, NearMiss)],
    )


def residual(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x @ w
    y += x
    return F.relu(y, inplace=True) * 2.0


def read_between(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x @ w
    before = y * 1.5
    z = y.add_(1.0)
    after = y.exp()
    y.mul_(x)
    return before + after + z + y


def of_itself(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x @ w
    y.mul_(y)
    return y, y.sum()


def viewed_afterwards(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of what the last write returns, and of the name that the memory had before it."""
    y = x @ w
    z = y.add_(x)
    return z.t().contiguous(), y[:, 1:] * 2.0


@pytest.mark.parametrize("function", [residual, read_between, of_itself, viewed_afterwards])
def test_what_is_written_becomes_a_value_and_no_bit_changes(function: Function) -> None:
    x, w = torch.randn(4, 8), torch.randn(8, 8)[:, :8]
    program = semantic(function, x, w)
    candidates, missed = proposals(program)
    assert candidates and not missed
    with program.edit("functionalize") as edit:
        for candidate in candidates:
            candidate.apply(edit)
    assert not any(str(node.target).split(".")[1].endswith("_") for node in program.nodes())
    torch.testing.assert_close(program.gm(x, w), program_of(function, x, w), rtol=0, atol=0)


def program_of(function: Function, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = function(*args)
    return found if isinstance(found, tuple) else (found,)


def viewed(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    y[:, 1:].add_(1.0)
    return y * 2.0


def viewed_before(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    turned = y.t()
    y.add_(1.0)
    return turned * 2.0


def without_gradient(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    with torch.no_grad():
        y.mul_(2.0)
    return y * y


def drawn(x: torch.Tensor) -> torch.Tensor:
    return x.exp().bernoulli_(0.5) + 1.0


def promoted(x: torch.Tensor) -> torch.Tensor:
    y = x.to(torch.bfloat16) * 2
    y.add_(x)
    return y + 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (viewed, "views of it are taken"),
        (viewed_before, "views of it are taken"),
        (without_gradient, "autocast or gradients are switched before it is written"),
        (drawn, "it is written by what is no pointwise call"),
        (promoted, "a new value would be of another type"),
    ],
)
def test_what_stays_is_reported_with_the_reason(function: Function, reason: str) -> None:
    program = semantic(function, torch.rand(4, 8))
    before = program.fingerprint
    candidates, missed = proposals(program)
    assert not candidates and missed == [reason]
    assert program.fingerprint == before


def test_inputs_and_buffers_that_are_written_are_none_of_its_business() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x.add_(1.0)
        return x * 2.0

    assert proposals(semantic(function, torch.rand(4))) == ([], [])


def test_a_step_has_the_models_gradients() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.conv(x))
            y += x
            return F.relu_(y).square().mean()

    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 3, 8, 8)
    model(x).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    fast = graphopt.optimize(model, (x,), emit="eager", on_error="raise")
    fast(x).backward()
    assert ("functionalize", "applied") in [(step.id, step.status) for step in fast.report.steps]
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, wanted)
