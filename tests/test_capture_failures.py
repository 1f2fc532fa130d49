"""What cannot be captured runs as it did and says why; wrong inputs are the caller's error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.report import Report


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    @torch._dynamo.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).sum()


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> int:
        return 3


def test_a_model_that_cannot_be_captured_runs_as_it_did() -> None:
    torch._dynamo.reset()
    model, x = Hidden(), torch.randn(2, 4)
    fast = graphopt.optimize(model, (x,), emit="eager", budget="1GiB")
    fast(x).backward()
    ours, model.a.weight.grad = model.a.weight.grad, None
    model(x).backward()
    assert torch.equal(ours, model.a.weight.grad)
    report = fast.report
    assert report.baseline is None and report.predicted is None and report.plan is None
    assert report.budget == 1024**3
    reason = "not captured, runs as it did: CaptureError: dynamo captured no graph of the model"
    assert report.diagnostics[-1] == reason
    assert reason in str(report) and "predicted" not in str(report)
    assert reason in report._repr_html_()
    assert Report.from_json(report.to_json()) == report
    assert fast.measure(repeats=1).peak_bytes > 0
    assert fast.report.measured is not None and "measured" in str(fast.report)
    with pytest.raises(graphopt.CaptureError, match=r"the model was not captured: .*captured no graph"):
        _ = fast.plan


def test_a_model_that_computes_nothing_runs_as_it_did() -> None:
    torch._dynamo.reset()
    fast = graphopt.optimize(Constant(), (torch.randn(2),), emit="eager")
    assert fast(torch.randn(2)) == 3
    assert fast.report.diagnostics == (
        "not captured, runs as it did: CaptureError: the model runs no tensor operation that can be captured",
    )


def test_on_error_raise_raises() -> None:
    torch._dynamo.reset()
    expected = "the model could not be captured: CaptureError: dynamo captured no graph of the model"
    with pytest.raises(graphopt.CaptureError, match=expected):
        graphopt.optimize(Hidden(), (torch.randn(2, 4),), emit="eager", on_error="raise")


def test_before_the_first_call_there_is_no_report() -> None:
    fast = graphopt.optimize(nn.Linear(4, 4), emit="eager")
    with pytest.raises(graphopt.CaptureError, match="it was not called yet and no inputs were given"):
        _ = fast.report


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (torch.ones(2, 4), "inputs is a Tensor: expected a tuple of positional arguments or a dict of"),
        ({"inputt": torch.ones(2, 4)}, "Linear.forward has no argument 'inputt'; did you mean 'input'?"),
        ({"zzzzz": torch.ones(2, 4)}, "Linear.forward has no argument 'zzzzz'"),
        ((1, 2), "Linear.forward does not take these inputs: too many positional arguments"),
        ((), "Linear.forward does not take these inputs: missing a required argument: 'input'"),
        ((torch.ones(2, 5),), "the model does not run with these inputs: RuntimeError: mat1 and mat2 shapes"),
        (("a",), "the model does not run with these inputs: TypeError: linear(): argument 'input'"),
    ],
)
def test_wrong_inputs_are_named(inputs: Any, text: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(graphopt.InputsError) as caught:
        graphopt.optimize(nn.Linear(4, 4), inputs, emit="eager")
    assert text in str(caught.value)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(graphopt.InputsError, match=r"model is a function: expected a torch\.nn\.Module"):
        graphopt.optimize(lambda x: x, (torch.ones(2),))  # type: ignore[arg-type]
