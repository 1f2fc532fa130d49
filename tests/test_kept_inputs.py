"""Inputs that were captured with do not stay beside those that a model runs on."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.fx as fx
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graphopt
from graphopt import kept_inputs
from graphopt.kept_inputs import KeptExample, TracedInputs
from graphopt.program import InputSpec


@pytest.mark.parametrize("emit", ["eager", "inductor"])
@pytest.mark.parametrize("train", [True, False])
def test_a_batch_that_was_captured_goes(emit: str, train: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).train(train)
    with torch.set_grad_enabled(train):
        fast = graphopt.optimize(model, (torch.randn(4, 8),), dynamic_shapes=False, emit=emit, cache=False)
        x = torch.randn(6, 8)
        gone, y = weakref.ref(x), fast(x)
        if train:
            y.sum().backward()
        del x, y
    gc.collect()
    assert gone() is None and len(fast.steps) == 2


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(y).square().mean()


@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_several_graphs_are_compiled_without_the_batch_that_they_were_captured_with(emit: str) -> None:
    model = Broken()
    fast = graphopt.optimize(model, (torch.randn(4, 8),), emit=emit, cache=False)
    for rows in (4, 6):
        x = torch.randn(rows, 8)
        model.zero_grad()
        model(x).backward()
        expected = [p.grad for p in model.parameters()]
        model.zero_grad()
        fast(x).backward()
        for p, right in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, right)


def test_what_is_there_is_given_and_what_is_gone_is_described() -> None:
    weight, batch, bare = nn.Parameter(torch.ones(3)), torch.randn(2, 3), torch.randn(4)
    graph = fx.Graph()
    described = FakeTensorMode().from_tensor(batch)
    for name, value in (("weight", described), ("batch", described), ("bare", None)):
        graph.placeholder(name).meta["example_value"] = value
    graph.output(())
    roles = (("weight", "parameter"), ("batch", "input"), ("bare", "input"))
    specs = [InputSpec(name, role, None) for name, role in roles]  # type: ignore[arg-type]
    traced = TracedInputs(fx.GraphModule({}, graph), (weight, batch, bare), specs)
    assert all(a is b for a, b in zip(traced.inputs(), (weight, batch, bare), strict=True))
    gone, undescribed = weakref.ref(batch), weakref.ref(bare)
    del batch, bare
    gc.collect()
    assert gone() is None and traced.inputs() == [weight, described, undescribed()]


def test_examples_of_other_devices_wait_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_inputs, "_HOST", ())
    x, y = torch.randn(3), torch.randn(2, requires_grad=True)
    kept = KeptExample({"x": x, "again": [x, 3], "y": y})
    found = kept.inputs()
    assert torch.equal(found["x"], x) and found["again"][0] is found["x"] and found["again"][1] == 3
    assert torch.equal(found["y"], y) and found["y"].requires_grad and found["y"].is_leaf
    waiting = [v.values for v in torch.utils._pytree.tree_leaves(kept._inputs) if not isinstance(v, int)]
    assert len({id(v) for v in waiting}) == 2 and all(v.device.type == "cpu" for v in waiting)


def test_examples_come_back_as_they_lay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_inputs, "_HOST", ())
    whole = torch.randn(4, 6)
    given = {"turned": whole.t(), "repeated": torch.randn(4, 1).expand(4, 5), "part": whole[:, ::2]}
    kept = KeptExample(given)
    for name, found in kept.inputs().items():
        assert torch.equal(found, given[name]) and found.stride() == given[name].stride(), name
    assert kept.inputs()["part"] is given["part"]  # a copy would have no gaps
    assert kept.inputs()["turned"] is not given["turned"]


def test_examples_on_the_host_stay_what_they_are() -> None:
    x = torch.randn(3)
    assert KeptExample((x,)).inputs()[0] is x
