"""Lets attentions read the keys and values of others, and takes away what made theirs.

Before, for ``sources`` {1: 0}::

    k0, v0 = norm(linear(x0, wk0)), linear(x0, wv0);  y0 = attention(q0, k0, v0)
    k1, v1 = norm(linear(x1, wk1)), linear(x1, wv1);  y1 = attention(q1, k1, v1)

After::

    k0, v0 = norm(linear(x0, wk0)), linear(x0, wv0);  y0 = attention(q0, k0, v0)
                                                      y1 = attention(q1, k0, v0)

Projections, norms and rotary embeddings of ``k1`` and ``v1`` are read by nobody then and go, their weights
with them; of a projection that makes queries too the columns go (``graphopt.decoding.narrow``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.fx as fx

from graphopt.decoding.capture import Uncached
from graphopt.decoding.dead import remove_dead
from graphopt.decoding.regions import Region
from graphopt.order import restore_order

__all__ = ["between", "redirected", "without_dead"]


def between(region: Region) -> set[fx.Node]:
    """What a region computes of queries, keys and values, its output included."""
    ends = {region.query, region.key, region.value}
    found: set[fx.Node] = set()
    pending = [region.output]
    while pending:
        node = pending.pop()
        if node in found or node in ends or node.op != "call_function":
            continue
        found.add(node)
        pending.extend(node.all_input_nodes)
    # Masks and sizes are made of other things than what is attended to.
    reached: set[fx.Node] = set()
    for node in sorted(found, key=_places(region.output.graph).__getitem__):
        if any(source in ends or source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def _places(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: place for place, node in enumerate(graph.nodes)}


def redirected(uncached: Uncached, regions: Sequence[Region], sources: Mapping[int, int]) -> Uncached:
    """The same program, but region ``consumer`` attends with keys and values of region ``source``.

    What made its own is still there. Regions must fit (``graphopt.decoding.sources``).
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(uncached.gm.graph, copies))
    for consumer, source in sources.items():
        reader, maker = regions[consumer], regions[source]
        for node in between(reader):
            for old, new in ((reader.key, maker.key), (reader.value, maker.value)):
                if old is not new and old in node.all_input_nodes:
                    copies[node].replace_input_with(copies[old], copies[new])
    restore_order(graph)
    return _with_graph(uncached, graph, uncached.weights)


def without_dead(uncached: Uncached) -> Uncached:
    """The same program without what nobody reads, weights included."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(uncached.gm.graph, {}))
    remove_dead(graph)
    weights = dict(uncached.weights)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in weights and not node.users:
            del weights[node.name]
            graph.erase_node(node)
    return _with_graph(uncached, graph, weights)


def _with_graph(uncached: Uncached, graph: fx.Graph, weights: Mapping[str, torch.Tensor]) -> Uncached:
    graph.lint()
    gm = fx.GraphModule(torch.nn.Module(), graph)
    return replace(uncached, gm=gm, weights=dict(weights))
