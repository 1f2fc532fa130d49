"""Calls of other input shapes: when they are captured again, and that the report says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.report import Report
from graphopt.report_html import report_html
from graphopt.report_table import program_lines
from tests.steps import assert_close, run_step

STEPS_ABOVE = (
    "the step above; sizes with names may differ, of larger ones a step may take more than the budget"
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[m for _ in range(3) for m in (nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


def rows(count: int) -> tuple[torch.Tensor]:
    return (torch.randn(count, 16),)


def optimized(dynamic: bool | None, budget: str | int | None = None) -> graphopt.Optimized:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return graphopt.optimize(Net(), rows(64), emit="eager", dynamic_shapes=dynamic, budget=budget)


def told(fast: graphopt.Optimized) -> list[tuple[str, str]]:
    """Name and input types of each program, symbols called ``n``."""
    report = fast.report
    return [(program.name, _plain(program.inputs)) for program in (*report.earlier, *report.programs)]


def _plain(text: str) -> str:
    head, equals, size = text.partition("=")
    return f"{head[: head.index('[')]}[n={size}" if equals else text


@pytest.mark.parametrize(
    ("dynamic", "programs"),
    [
        (None, [("g0", "f32[64,16]"), ("g1", "f32[n=48,16]")]),
        (True, [("g0", "f32[n=64,16]")]),
        (False, [("g0", "f32[64,16]"), ("g1", "f32[48,16]"), ("g2", "f32[80,16]")]),
    ],
)
def test_what_is_captured_for_which_shapes(dynamic: bool | None, programs: list[tuple[str, str]]) -> None:
    fast = optimized(dynamic)
    for count in (64, 48, 80, 48):
        x = rows(count)
        assert_close(run_step(fast, x), run_step(fast._model, x))
    assert told(fast) == programs
    assert [program.name for program in fast.report.programs] == [programs[-1][0]]


def test_each_shape_is_planned_under_the_budget() -> None:
    fast = optimized(False, budget=200_000)
    small = fast.plan
    assert small.baseline.peak_bytes < 200_000
    run_step(fast, rows(128))
    assert fast.plan is not small and fast.plan.budget == 200_000 < fast.plan.baseline.peak_bytes
    assert fast.plan.choices[0].recomputed and not small.choices[0].recomputed
    assert fast.measure(rows(128), repeats=1).peak_bytes <= 200_000
    with pytest.raises(graphopt.BudgetError, match=r"no plan fits 195\.31 KiB"):
        fast(*rows(1024))


def test_the_report_names_shapes_where_there_are_several() -> None:
    fast = optimized(None, budget="90%")
    assert program_lines(fast.report) == []
    fast.measure(repeats=1)
    assert fast.report.measured is not None
    run_step(fast, rows(48))
    report = fast.report
    assert report.measured is None, "what was measured was another program"
    (symbolic,) = (program.inputs for program in report.programs)
    lines = ["g0 train f32[64,16]: captured earlier, has its own plan", f"g1 train {symbolic}: {STEPS_ABOVE}"]
    assert program_lines(report) == lines
    assert lines[0] in str(report) and lines[0] in report_html(report)
    assert Report.from_json(report.to_json()) == report


def test_inference_beside_training_is_a_program_of_its_own() -> None:
    fast = optimized(None)
    with torch.no_grad():
        fast(*rows(64))
    assert program_lines(fast.report) == [
        "g0 train f32[64,16]: captured earlier, has its own plan",
        "g1 infer f32[64,16]: the step above",
    ]


class Folds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        y = self.linear(x).view(rows * length, width)
        return (torch.cat([y, y]) + torch.arange(2 * rows * length).unsqueeze(1)).square().mean()


@pytest.mark.slow  # compiles C++
def test_numbers_that_are_made_of_sizes_are_found_by_the_schedule_again() -> None:
    """Traced once more for its code, a program has other names for them."""
    torch._dynamo.reset()
    model, x = Folds(), torch.randn(4, 3, 8)
    fast = graphopt.optimize(model, (x,), emit="inductor", dynamic_shapes=True, on_error="raise", cache=False)
    for count in (4, 7):
        inputs = (torch.randn(count, 3, 8),)
        assert_close(run_step(fast, inputs), run_step(model, inputs))
    assert len(fast.steps) == 1


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return nn.functional.dropout(y, rate).square().mean(), (y * rate).sum()


@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_numbers_that_change_from_call_to_call_stay_numbers(emit: str) -> None:
    """Dynamo would read them back from a tensor, by a method that no program can call."""
    model, x = Scaled(), torch.randn(4, 8)
    fast = graphopt.optimize(model, (x, 0.1), emit=emit, on_error="raise")
    for rate in (0.1, 0.2, 0.3):
        torch.manual_seed(0)
        expected = model(x, rate)
        torch.manual_seed(0)
        dropped, scaled = fast(x, rate)
        torch.testing.assert_close(scaled, expected[1])
        if emit == "eager":  # a code generator draws other random numbers
            assert torch.equal(dropped, expected[0])
        dropped.backward()
    assert not [note for note in fast.report.diagnostics if "as it did" in note or "as they did" in note]
