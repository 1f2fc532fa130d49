"""Values that kernels lay out otherwise than they were traced, and those that are made of them."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

import graphopt
from graphopt import _torch
from graphopt.capture.true_layouts import settle_layouts

aten = torch.ops.aten


def behind_a_norm(target: Any, *more: Any, first: tuple[Any, ...] = ()) -> tuple[fx.GraphModule, fx.Node]:
    """``target(*first, %t, *more)`` of a batch norm's result, transposed: traced as if it had no gaps."""
    graph = fx.Graph()
    mode = _torch.fake_mode()
    with mode:
        value = torch.empty(4, 8, 6).transpose(1, 2)
        weight = torch.empty(6)

    def call(function: Any, *args: Any) -> fx.Node:
        node = graph.call_function(function, args)
        given = fx.node.map_arg(args, lambda source: source.meta["val"])
        with mode:
            node.meta["val"] = function(*given)
        return node

    x, w = graph.placeholder("x"), graph.placeholder("w")
    x.meta["val"], w.meta["val"] = value, weight
    norm = call(aten.native_batch_norm.default, x, w, w, None, None, True, 0.1, 1e-5)
    # As it is traced, the result lies like the input.
    traced = _torch.call_on_fakes(value, aten.empty_like.default, (value,), {})
    norm.meta["val"] = (traced, *norm.meta["val"][1:])
    first_of = graph.call_function(operator.getitem, (norm, 0))
    first_of.meta["val"] = norm.meta["val"][0]
    turned = call(aten.transpose.int, first_of, 1, 2)
    made = call(target, *first, turned, *more)
    graph.output(made)
    return fx.GraphModule({}, graph), made


def test_what_can_be_computed_anew_is() -> None:
    gm, made = behind_a_norm(aten.sin.default)
    assert made.meta["val"].stride() == (48, 6, 1)
    assert settle_layouts(gm) == ()
    assert made.meta["val"].stride() == (48, 1, 8)


@pytest.mark.parametrize(
    ("target", "more", "first", "why"),
    [
        (aten.view.dtype, (torch.int16,), (), "self.stride(-1) must be 1"),
        (torch.ops.higher_order.run_and_save_rng_state, (), (aten.rand_like.default,), "graphs of its own"),
    ],
    ids=["an operator that refuses", "a higher-order operator"],
)
def test_what_cannot_be_computed_anew_stays_and_is_told(
    target: Any, more: tuple[Any, ...], first: tuple[Any, ...], why: str
) -> None:
    gm, made = behind_a_norm(target, *more, first=first)
    before = made.meta["val"]
    (told,) = settle_layouts(gm)
    assert told.startswith(f"{made.name} reads what lies otherwise than it was traced, and keeps its layout")
    assert why in told
    assert made.meta["val"] is before


def test_an_error_of_another_kind_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = behind_a_norm(aten.sin.default)

    def broken(*args: Any) -> Any:
        raise AssertionError("a mistake")

    monkeypatch.setattr(_torch, "call_on_fakes", broken)
    with pytest.raises(AssertionError, match="a mistake"):
        settle_layouts(gm)


def test_the_report_says_what_could_not_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.offered_schedules.settle_layouts", lambda gm: ("mm keeps its layout",))
    torch._dynamo.reset()
    fast = graphopt.optimize(nn.Linear(4, 4), (torch.randn(2, 4),), emit="eager", cache=False)
    assert fast.report.diagnostics.count("g0: mm keeps its layout") == 1
