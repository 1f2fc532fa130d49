"""What values of a graph are made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.fx as fx

from graphopt.capture.aliasing import Aliases, written_inputs

__all__ = ["closure"]


def closure(
    nodes: Sequence[fx.Node], aliases: Aliases, stop: Collection[fx.Node] = ()
) -> list[fx.Node]:
    """``nodes`` and all that they are made of, what writes into those included, in order; not what ``stop``
    is made of."""
    if not nodes:
        return []
    graph = nodes[0].graph
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for written in written_inputs(node):
            for root in aliases.roots[written]:
                writers.setdefault(root, []).append(node)
    place = {node: i for i, node in enumerate(graph.nodes)}
    last = max(place[node] for node in nodes)
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if node in stop:
            continue
        pending.extend(node.all_input_nodes)
        for root in aliases.roots.get(node, ()):
            pending.extend(writer for writer in writers.get(root, ()) if place[writer] <= last)
    return sorted(found, key=place.__getitem__)
