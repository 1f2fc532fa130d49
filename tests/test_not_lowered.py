"""Programs whose generated code says too little of its memory run operator by operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt
from graphopt import api
from graphopt.errors import LoweringError


class Counting(torch.nn.Module):
    """Makes as many rows as there are positive numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = int((x > 0).sum().item())
        torch._check(count >= 0)
        torch._check(count <= x.numel())
        return self.a(x).sum() + self.a(x.new_ones(count, 8)).square().sum()


@pytest.fixture
def generating(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default code is generated, as it is on CUDA."""
    resolve = api.resolve_emitter

    def as_on_cuda(emit: str, *rest: Any) -> Any:
        return resolve("inductor" if emit == "auto" else emit, *rest)

    monkeypatch.setattr(api, "resolve_emitter", as_on_cuda)


@pytest.mark.usefixtures("generating")
def test_sizes_that_are_read_out_of_tensors_run_operator_by_operator() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, y = Counting(), torch.randn(4, 8), torch.randn(4, 8)
    fast = graphopt.optimize(model, (x,), cache=False)
    said = [text for text in fast.report.diagnostics if text.startswith("runs operator by operator: ")]
    assert len(said) == 1 and "does not run without data" in said[0], fast.report.diagnostics
    for given in (x, y):
        assert torch.equal(fast(given), model(given))
    fast(x).backward()
    assert model.a.weight.grad is not None


@pytest.mark.usefixtures("generating")
@pytest.mark.parametrize("options", [{"on_error": "raise"}, {"emit": "inductor"}])
def test_who_asks_for_code_is_told_that_there_is_none(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    with pytest.raises(LoweringError, match="the generated wrapper does not run without data"):
        graphopt.optimize(Counting(), (torch.randn(4, 8),), cache=False, **options)
