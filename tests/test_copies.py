"""Copies of an optimized module: by ``copy`` and by pickling."""

from __future__ import annotations

import copy
import pickle
from io import BytesIO

import pytest
import torch
from torch import nn

import graphopt
from tests.steps import assert_same, run_step

X = (torch.randn(32, 8),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[m for _ in range(4) for m in (nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1))]
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.body(x)


def squared(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


@pytest.fixture
def fast() -> graphopt.Optimized:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return graphopt.optimize(
        Net(), X, budget="80%", emit="eager", loss_fn=squared, pipeline=iter(["default"])
    )


def pickled(fast: graphopt.Optimized) -> graphopt.Optimized:
    return pickle.loads(pickle.dumps(fast))


def saved(fast: graphopt.Optimized) -> graphopt.Optimized:
    stream = BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved])
def test_copies_are_optimized_modules_of_their_own(fast: graphopt.Optimized, make) -> None:
    fast.note = [1]
    other = make(fast)
    assert isinstance(other, graphopt.Optimized) and other.note == [1] and other.note is not fast.note
    ours, theirs = dict(fast.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[name]) and p is not theirs[name] for name, p in ours.items())
    with pytest.raises(graphopt.CaptureError, match="the model was not captured: it was not called yet"):
        _ = other.plan
    assert_same(run_step(other, X, squared), run_step(fast, X, squared))
    assert other.plan.choices[0].schedule == fast.plan.choices[0].schedule
    assert other.plan.budget == fast.plan.budget
    # A step of one leaves the other as it is.
    with torch.no_grad():
        next(iter(theirs.values())).zero_()
    assert next(iter(ours.values())).any()
    run_step(other, X, squared)
    assert (fast.calls.item(), other.calls.item()) == (1, 2)
    assert other.measure(X, repeats=1).peak_bytes == fast.measure(X, repeats=1).peak_bytes


def test_a_deep_copy_keeps_mode_hooks_and_example_inputs(fast: graphopt.Optimized) -> None:
    seen: list[str] = []
    fast.register_forward_hook(lambda *_: seen.append("called"))
    fast.eval()
    other = copy.deepcopy(fast)
    assert not other.training and not other.body.training
    other.train()
    assert fast.body.training is False
    other.measure(repeats=1)
    assert seen


def test_a_deep_copy_inside_a_larger_object_shares_what_was_shared(fast: graphopt.Optimized) -> None:
    pair = copy.deepcopy({"fast": fast, "again": fast, "weight": fast.body[0].weight})
    assert pair["fast"] is pair["again"]
    assert pair["weight"] is pair["fast"].body[0].weight


def test_a_shallow_copy_shares_the_model(fast: graphopt.Optimized) -> None:
    other = copy.copy(fast)
    assert other.body is fast.body and other._driver is not fast._driver
    expected = run_step(fast, X, squared)
    assert torch.equal(run_step(other, X, squared).outputs[0], expected.outputs[0])


def test_an_average_of_weights_can_be_kept(fast: graphopt.Optimized) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(fast)
    averaged.update_parameters(fast)
    assert averaged(*X).shape == (32, 8)


def test_what_cannot_be_pickled_is_named() -> None:
    fast = graphopt.optimize(Net(), loss_fn=lambda output: output.sum())
    with pytest.raises(Exception, match="lambda"):
        pickle.dumps(fast)
