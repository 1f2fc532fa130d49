"""A loop over the rows of a sequence as one node of a graph: what each row takes over from the one before.

``Recurrence.body`` is the graph of one row::

    body(*states, *rows, *fixed) -> (*states behind the row, *rows that are made)

and the node that calls it over a whole sequence of S rows, laid along any dimension::

    y [B, S, D], .., h [B, N, D], .. = recurrence([h0, ..], [x [B, S, D], ..], [weights, ..])

``graphopt.decoding.roll`` finds it in a graph whose loop was written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

__all__ = ["Recurrence", "body_form", "recurrences_in", "shortened"]


@dataclass(frozen=True, eq=False)
class Recurrence:
    """Calls ``body`` for row after row. ``states``: how many values a row takes over; ``rows`` and ``made``:
    the dimension along which rows of each sequence that is read, and that is made, lie. ``times``: rows that
    are really run where only the kinds of results count, all where it is 0."""

    body: fx.GraphModule
    states: int
    rows: tuple[int, ...]
    made: tuple[int, ...]
    times: int = 0

    @property
    def __name__(self) -> str:
        # fx writes calls of what has a name into the code of a graph.
        return "recurrence"

    def __call__(
        self, initial: Sequence[Any], rows: Sequence[torch.Tensor], fixed: Sequence[Any]
    ) -> tuple[torch.Tensor, ...]:
        """What is made of each sequence in ``rows``, and the states behind the last row. ``initial``: the
        states before the first one; ``fixed``: what all rows read."""
        states: Sequence[Any] = initial
        count = rows[0].shape[self.rows[0]]
        made: list[Sequence[torch.Tensor]] = []
        for at in range(self.times or count):
            states, row = self.row(states, [x.select(dim, at) for x, dim in self.along(rows)], fixed)
            made.append(row)
        if self.times:
            made = made[-1:] * count
        return (
            *(torch.stack(parts, dim) for parts, dim in zip(zip(*made, strict=True), self.made, strict=True)),
            *states,
        )

    def along(self, rows: Sequence[Any]) -> zip[tuple[Any, int]]:
        """Each of ``rows`` and the dimension along which its rows lie."""
        return zip(rows, self.rows, strict=True)

    def row(
        self, states: Sequence[Any], rows: Sequence[torch.Tensor], fixed: Sequence[Any]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """States behind a row, and what is made of it."""
        found = self.body(*states, *rows, *fixed)
        return found[: self.states], found[self.states :]

    def kinds(
        self, initial: Sequence[Any], rows: Sequence[torch.Tensor], fixed: Sequence[Any]
    ) -> tuple[torch.Tensor, ...]:
        """Tensors of the shapes and dtypes of results, made of fake ones of any number of rows."""
        count = rows[0].shape[self.rows[0]]
        first = [x.select(dim, 0) for x, dim in self.along(rows)]
        # The second row: states behind the first may have other shapes than those that it begins with.
        states, _ = self.row(initial, first, fixed)
        states, made = self.row(states, first, fixed)
        laid = []
        for part, dim in zip(made, self.made, strict=True):
            shape = list(part.shape)
            shape.insert(dim, count)
            laid.append(part.new_empty(shape))
        return (*laid, *states)


def recurrences_in(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The calls of recurrences, in the order of the graph."""
    return tuple(node for node in graph.nodes if isinstance(node.target, Recurrence))


def shortened(gm: fx.GraphModule, times: int) -> fx.GraphModule:
    """``gm`` whose recurrences run ``times`` rows and take what they made for that of all: results are of
    no use but for their kinds."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in recurrences_in(graph):
        assert isinstance(node.target, Recurrence)
        node.target = replace(node.target, times=times)
    return fx.GraphModule(torch.nn.Module(), graph)


def body_form(graph: fx.Graph) -> str:
    """The nodes of a graph without their names."""
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}

    def shown(value: Any) -> Any:
        return fx.node.map_arg(value, number.__getitem__)

    return "\n".join(
        f"{node.op} {node.target if node.op == 'call_function' else ''} "
        f"{shown(node.args)} {shown(node.kwargs)}"
        for node in graph.nodes
    )
