"""Runs what some values of a graph need, beginning with values that are known already."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch.fx as fx

from graphopt.capture.aliasing import alias_map, written_inputs

__all__ = ["Part", "following"]


def following(graph: fx.Graph, starts: Iterable[fx.Node]) -> set[fx.Node]:
    """``starts`` and all that is made of them, memory that they write into included."""
    aliases = alias_map(graph)
    found: set[fx.Node] = set()
    pending = list(starts)
    while pending:
        node = pending.pop()
        if node in found or node.op == "output":
            continue
        found.add(node)
        pending.extend(node.users)
        for written in written_inputs(node):
            pending.extend(root for root in aliases.roots[written] if root.op == "call_function")
    return found


class Part:
    """What gives the values of ``wanted`` nodes, by name, where those of ``known`` ones are given.

    ``part(values)`` takes them and what placeholders stand for, by name; ``nodes`` are those that it
    computes, in order.
    """

    def __init__(self, graph: fx.Graph, wanted: Collection[str], known: Collection[str] = ()) -> None:
        self.wanted, self.known = frozenset(wanted), frozenset(known)
        every = list(graph.nodes)
        aliases = alias_map(graph)
        needed = {node for node in every if node.name in self.wanted}
        order: list[fx.Node] = []
        for node in reversed(every):
            writes = any(root in needed for one in written_inputs(node) for root in aliases.roots[one])
            if node.op == "output" or (node not in needed and not writes):
                continue
            order.append(node)
            if node.name not in self.known:
                needed.update(node.all_input_nodes)
                for one in node.all_input_nodes:
                    needed.update(aliases.roots.get(one, ()))
        order.reverse()
        self.order = order
        self.nodes = [n for n in order if n.name not in self.known and n.op != "placeholder"]
        last = {source: node for node in self.nodes for source in node.all_input_nodes}
        self._freed: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            self._freed.setdefault(node, []).append(source)

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        held: dict[fx.Node, Any] = {}
        found: dict[str, Any] = {}
        for node in self.order:
            if node.name in self.known or node.op == "placeholder":
                held[node] = values[node.name]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda ref: held[ref])
                target: Any = node.target
                held[node] = target(*args, **kwargs)
            if node.name in self.wanted:
                found[node.name] = held[node]
            for source in self._freed.get(node, ()):
                held.pop(source, None)
        return found
