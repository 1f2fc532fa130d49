"""What is known of nodes before a search: never too little, once for nodes that look the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx

from graphopt.rules import either, matching, operator
from graphopt.rules.matching import Found, match_pattern
from graphopt.rules.pattern import Pattern
from graphopt.rules.reach import Reaches

aten = torch.ops.aten

plus = operator(aten.add.Tensor, commutes=True)
times = operator(aten.mul.Tensor, commutes=True)
minus = operator(aten.sub.Tensor)
tanh = operator(aten.tanh.default)
exp = operator(aten.exp.default)
smooth = operator(aten.tanh.default, aten.exp.default)
cat = operator(aten.cat.default)
total = operator(aten.sum.dim_IntList)


def _twice(x: Any) -> Any:
    inner = exp(x)
    return plus(times(inner, 2), inner)


PATTERNS: tuple[Callable[..., Any], ...] = (
    lambda x, y: tanh(times(exp(x), y)),
    lambda x, y: times(plus(x, tanh(y)), plus(exp(x), y)),
    lambda x, s: tanh(either(times(x, s), x)),
    lambda x, y: plus(either(times(tanh(x), y), exp(x)), tanh(x)),
    lambda x, y, d: cat([tanh(x), y], d),
    lambda x, y: minus(plus(x, y, alpha=2), either(exp(x), tanh(exp(x)))),
    lambda x, k: total(times(x, 1.0), [-1], k),
    lambda x: exp(smooth(smooth(x))),
    lambda x, y: times(minus(x, y), minus(y, x)),
    lambda x: tanh(plus(x, ...)),
    lambda x, y: exp(cat([either(tanh(x), x), times(x, y)], ...)),
    _twice,
)


def drawn(seed: int, length: int) -> fx.Graph:
    """A graph of the operators that the patterns know, wired at random to values not far back."""
    draw = random.Random(seed)
    graph = fx.Graph()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    for _ in range(length):
        recent = values[-4:]
        one, other = draw.choice(recent), draw.choice([*recent, 1, 2, 1.0, True])
        call = draw.choice([
            (aten.add.Tensor, (one, other), {}), (aten.add.Tensor, (one, other), {"alpha": 2}),
            (aten.mul.Tensor, (one, other), {}), (aten.mul.Tensor, (other, one), {}),
            (aten.sub.Tensor, (one, other), {}), (aten.tanh.default, (one,), {}),
            (aten.exp.default, (one,), {}),
            (aten.cat.default, ([one, draw.choice(recent)], draw.choice([0, -1])), {}),
            (aten.cat.default, ([one],), {}), (aten.sum.dim_IntList, (one, [-1], draw.choice([True, 1])), {}),
            (aten.relu.default, (one,), {}),
        ])  # fmt: skip
        values.append(graph.call_function(*call))
    graph.output(values[-1])
    return graph


@pytest.mark.parametrize("seed", range(6))
def test_a_search_never_goes_further_than_was_known(seed: int) -> None:
    patterns = [Pattern.of(function) for function in PATTERNS]
    reaches = Reaches(patterns)
    found = missed = 0
    for node, state in reaches.walk(drawn(seed, 300)):
        for pattern, root in zip(patterns, reaches.roots, strict=True):
            reach, result = state.of(root), match_pattern(pattern, node)
            if isinstance(result, Found):
                found += 1
                assert reach.may_match and reach.whole >= len(result.nodes), (node.format_node(), pattern)
            else:
                missed += reach.most > 0
                assert result.matched <= reach.most, (node.format_node(), pattern, result)
    assert found > 20 and missed > 20


def test_it_rules_out_what_differs_by_operators_literals_and_defaults() -> None:
    """Where no value is captured twice, what may match does."""
    patterns = [Pattern.of(function) for function in (PATTERNS[0], PATTERNS[2], PATTERNS[4], PATTERNS[6])]
    reaches = Reaches(patterns)
    for node, state in reaches.walk(drawn(11, 300)):
        for pattern, root in zip(patterns, reaches.roots, strict=True):
            assert state.of(root).may_match == isinstance(match_pattern(pattern, node), Found)


def library(size: int) -> list[Pattern]:
    """Patterns that end alike and differ deep inside."""
    unary = [operator(getattr(aten, name).default) for name in ("sin", "cos", "erf", "abs", "neg", "log")]

    def different(outer: Any, inner: Any) -> Pattern:
        return Pattern.of(lambda x, w: times(w, times(x, tanh(outer(inner(exp(x)))))))

    return [different(unary[k % 6], unary[k // 6 % 6]) for k in range(size)]


def layered(layers: int) -> fx.Graph:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("w")
    for _ in range(layers):
        inner = graph.call_function(aten.exp.default, (x,))
        scale = graph.call_function(aten.tanh.default, (graph.call_function(aten.sin.default, (inner,)),))
        scaled = graph.call_function(aten.mul.Tensor, (x, scale))
        x = graph.call_function(aten.add.Tensor, (x, graph.call_function(aten.mul.Tensor, (weight, scaled))))
    graph.output(x)
    return graph


def test_nodes_that_look_the_same_are_worked_out_once() -> None:
    counts = []
    for layers in (4, 8, 16):
        reaches = Reaches(library(36))
        walked = sum(1 for _ in reaches.walk(layered(layers)))
        assert walked == 5 * layers
        counts.append(reaches.worked_out)
    assert counts[0] == counts[1] == counts[2] > 0


def test_parts_in_common_are_compared_once() -> None:
    """Rules that say the same add nothing, however many there are."""
    once, often = Reaches(library(36)), Reaches(library(36) * 5)
    for reaches in (once, often):
        for _ in reaches.walk(layered(4)):
            pass
    assert once.worked_out == often.worked_out


def test_other_roots_are_looked_for_above_what_few_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that every layer reads does not make the search for one of them grow with the others."""
    pattern = Pattern.of(lambda x, c, s: (tanh(times(x, c)), exp(times(x, s))))

    def graph(layers: int) -> fx.Graph:
        made = fx.Graph()
        x, cos, sin = (made.placeholder(name) for name in ("x", "cos", "sin"))
        for _ in range(layers):
            one = made.call_function(aten.tanh.default, (made.call_function(aten.mul.Tensor, (x, cos)),))
            other = made.call_function(aten.exp.default, (made.call_function(aten.mul.Tensor, (x, sin)),))
            x = made.call_function(aten.add.Tensor, (one, other))
        made.output(x)
        return made

    visits = 0
    original = matching._Search.call

    def call(self: Any, *args: Any) -> Any:
        nonlocal visits
        visits += 1
        return original(self, *args)

    monkeypatch.setattr(matching._Search, "call", call)
    counts = []
    for layers in (8, 16, 32):
        visits = 0
        nodes = [node for node in graph(layers).nodes if node.target is aten.tanh.default]
        assert all(isinstance(match_pattern(pattern, node), Found) for node in nodes)
        counts.append(visits)
    assert counts == [counts[0], 2 * counts[0], 4 * counts[0]]
