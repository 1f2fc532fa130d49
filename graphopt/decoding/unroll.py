"""A step for a number of rows that is known, its recurrences written out.

Before, for any n::

    y [B, n, D], h = recurrence([h0], [x [B, n, D]], [a])

After, for one row::

    h = add(mul(h0, a), select(x, 1, 0))         y = stack([h], 1)

So a program that passes see, that is priced and that is compiled holds operators alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.capture import Uncached
from graphopt.decoding.insert import StepGraph
from graphopt.decoding.recurrence import Recurrence

__all__ = ["STRETCH", "unrolled"]

aten = torch.ops.aten

STRETCH = 8
"""Rows of a prompt that a model with recurrences takes in at once: products read their weights once for as
many, and programs stay short."""


def unrolled(step: StepGraph, uncached: Uncached, rows: int) -> StepGraph:
    """``step`` for ``rows`` new tokens of any number of sequences, as a graph of its own."""
    return _Writing(step, uncached, rows).result()


class _Writing:
    def __init__(self, step: StepGraph, uncached: Uncached, rows: int) -> None:
        self.step, self.uncached, self.rows = step, uncached, rows
        self.graph = fx.Graph()
        self.known: dict[fx.Node, Any] = {}
        self.like = uncached.placeholder(uncached.tokens).meta["val"]

    def result(self) -> StepGraph:
        for node in self.step.gm.graph.nodes:
            if node.op == "placeholder":
                self.known[node] = self._placeholder(node)
            elif node.op == "output":
                self.graph.output(self._given(node.args[0]))
            elif isinstance(node.target, Recurrence):
                self.known[node] = self._written(node, node.target, *self._given(node.args))
            elif node.target is getitem and isinstance(self._given(node.args[0]), list):
                self.known[node] = self._given(node.args[0])[node.args[1]]
            else:
                self.known[node] = self._call(
                    node, node.target, self._given(node.args), self._given(dict(node.kwargs)), node.name
                )
        self.graph.lint()
        return replace(self.step, gm=fx.GraphModule(torch.nn.Module(), self.graph), rows=self.rows)

    def _given(self, value: Any) -> Any:
        return _mapped(value, self.known)

    def _placeholder(self, node: fx.Node) -> fx.Node:
        made = self.graph.placeholder(node.name)
        made.meta = dict(node.meta)
        value = node.meta["val"]
        shape = [self.rows if self.uncached.is_length(size) else size for size in value.shape]
        if shape != list(value.shape):
            kind = {"dtype": value.dtype, "device": value.device}
            made.meta["val"] = _torch.call_on_fakes(value, torch.empty, (shape,), kind)
        return made

    def _call(self, like: fx.Node, target: Any, args: Any, kwargs: Any, name: str = "") -> Any:
        """A call with its value; the number itself where it gives one that is known."""
        values = fx.node.map_arg((args, kwargs), lambda ref: ref.meta["val"])
        value = _torch.call_on_fakes(self.like, target, *values)
        if isinstance(value, int):
            return value
        made = self.graph.create_node("call_function", target, tuple(args), kwargs, name or None)
        made.meta = {**like.meta, "val": value}
        return made

    def _written(
        self,
        node: fx.Node,
        loop: Recurrence,
        states: Sequence[Any],
        sequences: Sequence[Any],
        fixed: Sequence[Any],
    ) -> list[Any]:
        """What is made of each sequence, and the states behind the last row."""
        made: list[Sequence[Any]] = []
        for row in range(self.rows):
            taken = [
                self._call(node, aten.select.int, (x, dim, row), {}) for x, dim in loop.along(sequences)
            ]
            states, parts = self._row(node, loop, [*states, *taken, *fixed])
            made.append(parts)
        laid = [
            self._call(node, aten.stack.default, (list(parts), dim), {})
            for parts, dim in zip(zip(*made, strict=True), loop.made, strict=True)
        ]
        return [*laid, *states]

    def _row(
        self, node: fx.Node, loop: Recurrence, given: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        known: dict[fx.Node, Any] = {}
        values = iter(given)
        for inner in loop.body.graph.nodes:
            if inner.op == "placeholder":
                known[inner] = next(values)
            elif inner.op == "output":
                found = _mapped(inner.args[0], known)
                return found[: loop.states], found[loop.states :]
            else:
                like = inner if "nn_module_stack" in inner.meta else node
                args, kwargs = _mapped(inner.args, known), _mapped(dict(inner.kwargs), known)
                known[inner] = self._call(like, inner.target, args, kwargs)
        raise AssertionError("a graph without an output")


def _mapped(value: Any, known: dict[fx.Node, Any]) -> Any:
    """``value`` with what is known of its nodes in their place, which may be a list or a number."""
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, slice):
        return slice(*(_mapped(part, known) for part in (value.start, value.stop, value.step)))
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_mapped(item, known) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, known) for key, item in value.items()}
    return value
