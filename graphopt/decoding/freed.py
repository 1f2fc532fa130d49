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
from graphopt.decoding.insert import step_graph
from graphopt.decoding.last_row import last_row
from graphopt.decoding.layouts import name_of
from graphopt.decoding.part import Part, following
from graphopt.decoding.recurrence import shortened
from graphopt.decoding.regions import Region
from graphopt.decoding.reroot import streams_into
from graphopt.decoding.share import between
from graphopt.decoding.sites import Site
from graphopt.decoding.states import kept_tensors
from graphopt.program import InputSpec

__all__ = ["Promise", "flops_of_prompt", "flops_of_token", "promised", "promised_prompt"]


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


def promised_prompt(
    uncached: Uncached,
    regions: Sequence[Region],
    sources: Mapping[int, int],
    streams: Mapping[int, int],
    tokens: int,
) -> int:
    """FLOPs of a prompt of ``tokens`` tokens in products with weights that ``streams`` are to save: all rows
    but the last of what is behind the last attention that makes keys and values of its own stream, and makes
    none. What is behind the last attention of all sees the last row as it is."""
    graph = uncached.gm.graph
    entering = streams_into(uncached, regions)
    first = max(i for i in range(len(regions)) if i not in streams and i not in sources)
    stream = entering[first]
    if stream is None:
        return 0
    kept: dict[fx.Node, float] = dict.fromkeys(following(graph, [regions[-1].output]), 1.0)
    for index in range(first, len(regions)):
        start = entering[index]
        if start is None:
            return 0
        behind = following(graph, [start])
        region = regions[index]
        asking = _between(graph, start, {region.query.name}, behind)
        if index == len(regions) - 1:
            kept |= dict.fromkeys(asking, 1.0)
        if index not in sources:
            for node in _between(graph, start, {region.key.name, region.value.name}, behind):
                asked = _asked(node, region.query, asking) if node in asking and node not in kept else 0.0
                kept[node] = 1.0 - asked
    flops = 0.0
    for node in following(graph, [stream]):
        for source in node.all_input_nodes if name_of(node) in PRODUCTS else ():
            while name_of(source) in TURNS and isinstance(source.args[0], fx.Node):
                source = source.args[0]
            tensor = uncached.weights.get(source.name)
            if tensor is not None and tensor.dim() == 2:
                flops += 2 * tensor.numel() * (1.0 - kept.get(node, 0.0))
    return round(flops) * (tokens - 1)


def _between(graph: fx.Graph, start: fx.Node, ends: set[str], behind: set[fx.Node]) -> set[fx.Node]:
    return {node for node in Part(graph, ends, {start.name}).nodes if node in behind}


def _asked(node: fx.Node, query: fx.Node, asking: set[fx.Node]) -> float:
    """The share of the columns of a product that queries are made of; 1 for what is no product."""
    if name_of(node) not in PRODUCTS:
        return 1.0
    known = columns_of(node)
    columns: set[int] = set()
    for held, numbers in known.items():
        read = held is query or any(user in asking and user not in known for user in held.users)
        if isinstance(numbers, torch.Tensor) and read:
            columns.update(numbers.flatten().tolist())
    return len(columns) / int(node.meta["val"].shape[-1])


def flops_of_prompt(uncached: Uncached, sites: Sequence[Site], tokens: int, cost: CostModel) -> int:
    """FLOPs of the step that takes in a prompt of ``tokens`` tokens of one sequence at once."""
    step = last_row(step_graph(uncached, sites, 1, tokens, tokens), uncached, sites)
    kinds = kept_tensors(uncached, sites, 1, tokens)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    shapes = dict.fromkeys(uncached.inputs, ((1, tokens), torch.int64))
    shapes |= {"slots": ((tokens,), torch.int64), "valid": ((1, tokens), torch.bool)}
    shapes |= {name: kinds[key] for name, key in step.stores.items()}
    given = [shapes[name] for name in step.inputs]
    # A row of each loop: they are the same before and after.
    return _flops("prompt", shortened(step.gm, 1), list(step.weights.values()), given, cost)


def flops_of_token(uncached: Uncached, cost: CostModel) -> int:
    """FLOPs of the program for a single token of a single sequence."""
    shapes = [((1, 1), torch.int64)] * len(uncached.inputs)
    return _flops("token", uncached.gm, list(uncached.weights.values()), shapes, cost)


def _flops(
    name: str,
    gm: fx.GraphModule,
    weights: list[torch.Tensor],
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]],
    cost: CostModel,
) -> int:
    traced = _torch.retraced_at(gm, weights, list(shapes))
    roles = ["parameter"] * len(weights) + ["input"] * len(shapes)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    specs = [InputSpec(node.name, role) for node, role in zip(placeholders, roles, strict=True)]
    program = semantic_program(name, traced, specs)
    return int(sum(cost.node(node).flops for node in program.nodes()))
