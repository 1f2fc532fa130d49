"""What sharing keys and values is to free, worked out on the program before anything is rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import alias_map, written_inputs
from graphopt.capture.semantic import semantic_program
from graphopt.cost import CostModel
from graphopt.decoding.capture import Uncached
from graphopt.decoding.columns import PRODUCTS, TURNS, columns_of
from graphopt.decoding.layouts import name_of
from graphopt.decoding.regions import Region
from graphopt.decoding.share import between
from graphopt.program import InputSpec

__all__ = ["Promise", "flops_of_token", "promised"]


@dataclass(frozen=True)
class Promise:
    """Bytes of weights that nobody will read, and FLOPs of a token in products with them."""

    weight_bytes: int
    flops: int


def promised(uncached: Uncached, regions: Sequence[Region], sources: Mapping[int, int]) -> Promise:
    """What letting ``sources`` be read is to free of weights."""
    other = _redirections(regions, sources)
    before, after = _live(uncached, {}), _live(uncached, other)
    kept: dict[int, float] = {}
    read: dict[int, tuple[torch.Tensor, bool]] = {}
    for live, shares in ((before, False), (after, True)):
        for node in live:
            for source in [] if name_of(node) in TURNS else node.all_input_nodes:
                while name_of(source) in TURNS and isinstance(source.args[0], fx.Node):
                    source = source.args[0]
                if source.name not in uncached.weights:
                    continue
                tensor = uncached.weights[source.name]
                if not shares:
                    multiplied = name_of(node) in PRODUCTS and tensor.dim() == 2
                    read[id(tensor)] = tensor, multiplied or read.get(id(tensor), (tensor, False))[1]
                else:
                    share = _share(node, live, other) if name_of(node) in PRODUCTS else 1.0
                    kept[id(tensor)] = max(kept.get(id(tensor), 0.0), share)
    gone = [(t, multiplied, 1 - kept.get(key, 0.0)) for key, (t, multiplied) in read.items()]
    return Promise(
        round(sum(tensor.numel() * tensor.element_size() * share for tensor, _, share in gone)),
        round(sum(2 * tensor.numel() * share for tensor, multiplied, share in gone if multiplied)),
    )


_Edges = Mapping[tuple[fx.Node, fx.Node], fx.Node]
"""What a node reads in the place of another one."""


def _redirections(regions: Sequence[Region], sources: Mapping[int, int]) -> _Edges:
    other: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for consumer, source in sources.items():
        here, there = regions[consumer], regions[source]
        for node in between(here):
            other |= {(node, here.key): there.key, (node, here.value): there.value}
    return other


def _live(uncached: Uncached, other: _Edges) -> set[fx.Node]:
    """Nodes that logits are made of where ``other`` ones are read."""
    graph = uncached.gm.graph
    aliases = alias_map(graph)
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for written in written_inputs(node):
            for root in aliases.roots[written]:
                writers.setdefault(root, []).append(node)
    found: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        pending.extend(other.get((node, source), source) for source in node.all_input_nodes)
        for root in aliases.roots.get(node, ()):
            pending.extend(writers.get(root, ()))
    return found


def _share(product: fx.Node, live: set[fx.Node], other: _Edges) -> float:
    """The share of the columns of ``product`` that something live reads."""
    known = columns_of(product)
    columns: set[int] = set()
    # Heads that attention repeats are read from elsewhere, though they look laid out from here.
    elsewhere = {reader for reader, _ in other}
    for node, held in known.items():
        if node in elsewhere:
            continue
        readers = (u for u in node.users if u in live and u not in known and (u, node) not in other)
        if isinstance(held, torch.Tensor) and any(True for _ in readers):
            columns.update(held.flatten().tolist())
    return len(columns) / int(product.meta["val"].shape[-1])


def flops_of_token(uncached: Uncached, cost: CostModel) -> int:
    """FLOPs of the program for a single token of a single sequence."""
    shapes = [((1, 1), torch.int64)] * len(uncached.inputs)
    traced = _torch.retraced_at(uncached.gm, list(uncached.weights.values()), shapes)
    roles = ["parameter"] * len(uncached.weights) + ["input"] * len(shapes)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    specs = [InputSpec(node.name, role) for node, role in zip(placeholders, roles, strict=True)]
    program = semantic_program("token", traced, specs)
    return int(sum(cost.node(node).flops for node in program.nodes()))
