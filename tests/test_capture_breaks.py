"""Models that are several graphs, models that change their mode, and calls of other shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from tests.steps import assert_close, assert_same, deterministic, run_step


class Broken(nn.Module):
    """Four graphs: a branch on data, a print, and ``item()``; statistics and dropout among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 16)
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.gelu(self.a(x))
        if h.sum() > 1e9:
            h = h * 2
        h = torch.tanh(self.norm(self.b(h)))
        print(end="")
        h = nn.functional.dropout(h, 0.3, self.training)
        times = int((x[0, 0] > 100).item()) + 1
        return (self.c(h) * times).square().mean()


def _broken() -> tuple[Broken, torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Broken(), torch.randn(64, 16)


def test_capture_leaves_buffers_and_random_state_alone() -> None:
    model, x = _broken()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    graphopt.optimize(model, (x,), emit="eager", on_error="raise")
    assert torch.equal(state, torch.get_rng_state())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_several_graphs_share_one_budget_and_one_report() -> None:
    model, x = _broken()
    plain, free_model = copy.deepcopy(model), copy.deepcopy(model)
    free = graphopt.optimize(free_model, (x,), emit="eager", on_error="raise")
    session = free._driver.session
    least, most = session.curve(session.static_bytes or 0)[0][0], free.plan.baseline.peak_bytes
    assert least < most
    torch._dynamo.reset()
    budget = (least + most) // 2
    fast = graphopt.optimize(model, (x,), emit="eager", on_error="raise", budget=budget)
    assert [choice.program for choice in fast.plan.choices] == ["g0", "g1", "g2", "g3"]
    assert fast.plan.predicted.peak_bytes <= budget
    assert any(choice.schedule.recomputed for choice in fast.plan.choices)
    assert fast.report.diagnostics == ("not one graph: Unsupported: Data-dependent branching",)
    assert fast.measure((x,), repeats=1).peak_bytes <= budget
    with deterministic():
        for seed in range(3):
            expected = run_step(plain, (x,), seed=seed)
            unbudgeted, within = run_step(free, (x,), seed=seed), run_step(fast, (x,), seed=seed)
            assert_close(unbudgeted, expected)
            assert_same(within, unbudgeted)


def test_a_budget_that_no_plan_of_all_graphs_fits_is_refused() -> None:
    model, x = _broken()
    text = r"no plan fits 60\.00 KiB: the least that fits is"
    with pytest.raises(graphopt.BudgetError, match=text) as caught:
        graphopt.optimize(model, (x,), emit="eager", budget="60KiB")
    assert caught.value.least_bytes > 60 * 1024


def test_modes_and_inference_follow_the_model() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 4))
    x = torch.randn(32, 16)
    model = copy.deepcopy(plain)
    fast = graphopt.optimize(model, (x,), emit="eager", on_error="raise")
    for training in (True, False, True):
        fast.train(training)
        plain.train(training)
        assert model.training is training and fast.training is training
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                torch.manual_seed(3)
                ours = fast(x)
                torch.manual_seed(3)
                theirs = plain(x)
            assert ours.requires_grad is gradients
            torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.dropout(nn.functional.gelu(self.a(x)), 0.1)
        return (self.b(h.view(x.shape[0], -1)) * x.shape[0]).square().mean()


@pytest.mark.parametrize(("dynamic", "programs"), [(None, 2), (True, 1), (False, 3)])
def test_calls_of_other_shapes(dynamic: bool | None, programs: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Sized()
    model = copy.deepcopy(plain)
    inputs = (torch.randn(64, 16),)
    fast = graphopt.optimize(
        model, inputs, emit="eager", on_error="raise", dynamic_shapes=dynamic, budget="99.9%"
    )
    for rows in (64, 48, 80):
        x = torch.randn(rows, 16)
        assert_close(run_step(fast, (x,)), run_step(plain, (x,)))
    assert len(fast._driver.session.captured) == programs
    assert fast.report.diagnostics == ()
    sizes = [s for n in fast.programs[0].nodes() for s in getattr(n.meta.get("val"), "shape", ())]
    assert any(isinstance(size, torch.SymInt) for size in sizes) is (dynamic is not False)
