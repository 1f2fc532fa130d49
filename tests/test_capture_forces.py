"""Models that differentiate inside themselves: forces of an energy."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

import graphopt

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


class Potential(nn.Module):
    """Forces are what the energy loses by moving. ``detached``: nothing returned can be differentiated."""

    def __init__(self, *, create_graph: bool, detached: bool = False) -> None:
        super().__init__()
        self.create_graph, self.detached = create_graph, detached
        torch.manual_seed(0)
        self.parts = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Sigmoid())
        self.last = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.last(self.parts(x).square()).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=self.create_graph)
        if self.detached:
            energy, slope = energy.detach(), slope.detach()
        return {"energy": energy, "forces": -slope}


def optimized(model: nn.Module, emit: str) -> graphopt.Optimized:
    return graphopt.optimize(model, (X,), emit=emit, cache=False)


def same_as_in_double(fast: graphopt.Optimized, model: Potential) -> None:
    expected = copy.deepcopy(model).double()(X.double())
    for _ in range(2):
        found = fast(X)
        for name in ("energy", "forces"):
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("emit", ["inductor", "eager"])
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
@pytest.mark.parametrize("create_graph", [False, True])
def test_forces_in_inference_are_the_models(
    emit: str, context: type[AbstractContextManager[None]], create_graph: bool
) -> None:
    torch._dynamo.reset()
    model = Potential(create_graph=create_graph).eval()
    with context():
        fast = optimized(model, emit)
        same_as_in_double(fast, model)
    report = fast.report
    assert report.plan is not None and len(report.programs) == 3
    unseen = [note for note in report.diagnostics if "no whole step was seen" in note]
    kept = "no whole step was seen: a backward keeps its graph for another one, and with it what was saved"
    assert [note.endswith(kept) for note in unseen] == [True] * create_graph


@pytest.mark.parametrize("emit", ["inductor", "eager"])
def test_forces_of_which_nothing_is_differentiated_again_are_compiled_in_training(emit: str) -> None:
    torch._dynamo.reset()
    model = Potential(create_graph=True, detached=True)
    fast = optimized(model, emit)
    assert fast.report.plan is not None
    same_as_in_double(fast, model)


@pytest.mark.parametrize("emit", ["inductor", "eager"])
def test_a_model_that_is_trained_on_its_forces_runs_as_it_did(emit: str) -> None:
    torch._dynamo.reset()
    model = Potential(create_graph=True)
    fast = optimized(model, emit)
    (note,) = (text for text in fast.report.diagnostics if "runs as it did" in text)
    assert note.endswith("torch.compile with aot_autograd does not currently support double backward")
    gradients = []
    for module, x in ((fast, X), (copy.deepcopy(model).double(), X.double())):
        for _ in range(2):
            module.zero_grad()
            found = module(x)
            (found["energy"] + found["forces"].square().sum()).backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    ours, right = gradients
    assert len(ours) == len(right) == 6
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("emit", ["inductor", "eager"])
def test_a_graph_may_be_kept_though_its_backward_writes_over_what_was_saved(emit: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 1))
    fast = optimized(model, emit)
    assert fast.report.plan is not None
    fast(X).sum().backward()
    weights = list(model.parameters())
    expected = torch.autograd.grad(model(X).sum(), weights)
    loss = fast(X).sum()
    for keep in (True, True, False):
        found = torch.autograd.grad(loss, weights, retain_graph=keep)
        torch.testing.assert_close(found, expected)
