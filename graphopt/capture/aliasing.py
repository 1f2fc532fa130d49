"""Which values of a graph may share memory, and which of them are written in place.

Semantic graphs are not functional: ``add_``, ``relu_``, statistics of batch norms. Two sources are
joined: the operator's schema (``Tensor(a) self -> Tensor(a)``) and the storages of the example
values, as an operator may hand its input through without saying so (dropout in evaluation).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.values import value_table

__all__ = ["Aliases", "alias_map", "written_inputs"]

# Operators that normalise a batch write these arguments while training, and their schemas say nothing.
STATISTICS = ("running_mean", "running_var")

_KNOWN = "_graphopt_aliases"
"""The attribute of a graph that holds its last map and what that was made from."""


@dataclass(frozen=True)
class Aliases:
    """``roots[v]``: the values that ``v`` may be a view of, itself where it is new memory.
    ``written``: roots that some node of the graph writes in place; ``changed``: those of them whose
    content that changes."""

    roots: dict[fx.Node, frozenset[fx.Node]]
    written: frozenset[fx.Node]
    changed: frozenset[fx.Node]


def written_inputs(node: fx.Node, *, statistics: bool = True) -> tuple[fx.Node, ...]:
    """The arguments that a call writes in place; without ``statistics`` those alone that what is written
    may carry a gradient into."""
    if node.op != "call_function":
        return ()
    nodes = []
    for index, name in _written_arguments(node.target, statistics and not _keeps_statistics(node)):
        nodes += _nodes_in(_argument(node, index, name))
    return tuple(nodes)


def _keeps_statistics(node: fx.Node) -> bool:
    """Whether a norm was told to read running statistics only."""
    switch = _statistics_switch(node.target)
    return switch is not None and _argument(node, *switch) is False


@functools.cache
def _statistics_switch(target: Any) -> tuple[int, str] | None:
    schema = _torch.schema_of(target)
    arguments = [] if schema is None else schema.arguments
    names = ("training", "use_input_stats")
    return next(((k, argument.name) for k, argument in enumerate(arguments) if argument.name in names), None)


@functools.cache
def _written_arguments(target: Any, statistics: bool) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that calls of ``target`` write."""
    schema = _torch.schema_of(target)
    arguments = [] if schema is None else schema.arguments
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or (statistics and argument.name in STATISTICS)
    )


def alias_map(graph: fx.Graph) -> Aliases:
    """Roots of every value of a graph whose nodes carry ``meta["val"]``."""
    # Passes ask one after another about a graph that stays as it is.
    made_from: list[Any] = [value_table(graph), *(node.kwargs for node in graph.nodes)]
    known: tuple[list[Any], Aliases] | None = getattr(graph, _KNOWN, None)
    if known is None or len(known[0]) != len(made_from) or not all(map(is_, known[0], made_from)):
        known = made_from, _alias_map(graph)
        setattr(graph, _KNOWN, known)
    return known[1]


def _alias_map(graph: fx.Graph) -> Aliases:
    by_name = {node.name: node for node in graph.nodes}
    table = value_table(graph)
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    written: set[fx.Node] = set()
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        sources = set(_schema_sources(node))
        leaves = table.get(node.name, ())
        sources.update(by_name[leaf.alias[0]] for leaf in leaves if leaf.alias is not None)
        sources.discard(node)
        found = frozenset(root for source in sources for root in roots[source])
        # A call that yields several tensors may yield new memory beside views.
        is_new = not sources or any(leaf.alias is None for leaf in leaves[1:])
        roots[node] = found | {node} if is_new else found
        targets = {root for ref in written_inputs(node) for root in roots[ref]}
        written |= targets
        # Cutting a tensor off from autograd in place changes none of its content.
        if node.target is not torch.ops.aten.detach_.default:
            changed |= targets
    return Aliases(roots, frozenset(written), frozenset(changed))


def _schema_sources(node: fx.Node) -> list[fx.Node]:
    if node.op != "call_function":
        return []
    nodes = []
    for index, name in _shown_arguments(node.target):
        nodes += _nodes_in(_argument(node, index, name))
    return nodes


@functools.cache
def _shown_arguments(target: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that results of ``target`` may be views of."""
    schema = _torch.schema_of(target)
    if schema is None or not any(value.alias_info is not None for value in schema.returns):
        return ()
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None
    )


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _nodes_in(value: Any) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    if isinstance(value, (tuple, list)):
        return [item for item in value if isinstance(item, fx.Node)]
    return []
