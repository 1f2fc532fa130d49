"""What is kept of the steps that a module has planned."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import ArtefactError, BudgetError
from graphopt.ambient_state import AmbientState
from graphopt.planned_step import Example


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [m for _ in range(3) for m in (nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def optimized(**options: Any) -> graphopt.Optimized:
    torch._dynamo.reset()
    torch.manual_seed(0)
    settings = {"emit": "eager", "dynamic_shapes": False, "cache": False} | options
    return graphopt.optimize(Net(), (torch.randn(64, 16),), **settings)


def test_each_step_shows_itself_as_it_did_when_it_was_the_present_one() -> None:
    fast = optimized(budget=200_000)
    found = []
    for count in (64, 128, 32):
        fast(torch.randn(count, 16)).backward()
        found.append((fast.plan, fast.memory(), fast.frontier(), fast.dump(), fast.explain_memory()))
    views = fast.steps
    assert [(v.plan, v.memory(), v.frontier(), v.dump(), v.explain_memory()) for v in views] == found
    assert [v.name for v in views] == [f"g{k} train f32[{n},16]" for k, n in enumerate((64, 128, 32))]
    assert repr(views[1]) == "<step g1 train f32[128,16]>"
    assert [p.name for v in views for p in v.report.programs] == ["g0", "g1", "g2"]
    assert not any(v.report.earlier for v in views)
    assert fast.plan is found[-1][0] and len(fast.report.earlier) == 2
    assert len(views[1].programs) == 4


def test_inputs_that_do_not_fit_leave_the_present_step_as_it_is() -> None:
    fast = optimized(budget=200_000)
    before = fast.plan, fast.report.programs
    with pytest.raises(BudgetError, match="no plan fits"):
        fast(torch.randn(1024, 16))
    assert (fast.plan, fast.report.programs) == before
    assert len(fast.steps) == 1 and not fast.report.earlier


class Store:
    """An object that holds memory."""


def test_an_example_keeps_neither_tensors_nor_objects_of_its_call() -> None:
    x, store = torch.randn(4), Store()
    gone = weakref.ref(x), weakref.ref(store)
    example = Example.of(((x, [store]), {}), (True,), {})
    del x, store
    assert [reference() for reference in gone] == [None, None]
    with pytest.raises(ArtefactError, match="a call has a Store, which an artefact cannot hold"):
        example.made()


def test_an_example_looks_like_its_call() -> None:
    whole, own = torch.randn(4, 6), torch.randn(3)
    trained = torch.ones(2).requires_grad_()
    call = ((whole, whole[1:, ::2], own), {"x": whole, "flags": [True, None, "text"], "y": trained})
    example = Example.of(call, (True,), {id(own): ()})
    (one, part, mine), kwargs = example.made()
    assert kwargs["x"] is one and mine is own and kwargs["flags"] == [True, None, "text"]
    assert kwargs["y"].requires_grad and kwargs["y"].is_leaf and not one.any()
    assert (part.shape, part.stride(), part.storage_offset()) == ((3, 3), (6, 2), 6)
    assert part.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()


def test_an_example_is_called_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        example = Example.of(((), {}), tuple(m.training for m in model.modules()), {})
    model.eval()
    with example.around(model):
        assert [m.training for m in model.modules()] == [True, True, False]
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.float16
    assert not any(m.training for m in model.modules())
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    model.append(nn.ReLU())
    with pytest.raises(ArtefactError, match="other modules than when"), example.around(model):
        raise AssertionError


def test_a_state_without_autocast_switches_it_off() -> None:
    state = AmbientState.now()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with state.again():
            assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()


def test_what_is_gone_back_from_is_no_step() -> None:
    fast = optimized()
    session, before = fast._driver.session, fast.plan
    go_back = session.checkpoint()
    fast(torch.randn(32, 16)).backward()
    assert len(fast.steps) == 2
    go_back()
    assert [view.name for view in fast.steps] == ["g0 train f32[64,16]"]
    assert fast.steps[0].plan is before and fast.plan is before
