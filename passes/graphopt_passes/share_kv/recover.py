"""Fits the queries and outputs of attentions to the keys and values that they come to read.

Each consumer by itself, first to last: its projections of queries and of what it attended to are trained so
that the stream behind it is what it was in the model as it is, given the stream before it as it is now. So
what consumers before it have done wrong is made up for as far as it can be. Nothing is propagated back
through the model; programs, bytes and time of the result are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.layouts import name_of
from graphopt.decoding.part import Part, following
from graphopt.decoding.projections import projection_before, projection_behind, weights_of
from graphopt.decoding.regions import Region, attention_regions
from graphopt.decoding.reroot import as_assigned
from graphopt.errors import InputsError

__all__ = ["recovered"]

_AT_ONCE = 512
"""Tokens of a step."""

_RATE = 2e-3
_PASSING = ("dropout", "view", "reshape", "_unsafe_view", "to", "_to_copy", "clone", "contiguous")


@dataclass(frozen=True)
class _Local:
    """The part of a program around a consumer: from its projection of queries to the stream behind it.
    ``trained``: placeholders of weights; ``boundary``: what comes from outside."""

    end: str
    trained: tuple[str, ...]
    boundary: frozenset[str]


def recovered(
    uncached: Uncached,
    regions: Sequence[Region],
    sources: Mapping[int, int],
    rows: torch.Tensor,
    steps: int,
    tell: Callable[[str], None],
    streams: Mapping[int, int],
) -> dict[str, torch.Tensor]:
    """New weights by placeholder of the program that is made of ``uncached``, trained for ``steps`` steps
    each on ``rows`` int64[N, S]. Attentions of ``streams`` have their projections of keys and values trained
    as well.

    Raises ``InputsError`` where a consumer has no projection of its own that could be trained.
    """
    shared = as_assigned(uncached, regions, sources, streams)
    regions = attention_regions(shared)
    order = sorted({*sources, *streams})
    locals_ = {index: _local(shared, regions[index], index in streams) for index in order}
    device = uncached.placeholder(uncached.tokens).meta["val"].device
    size = max(1, _AT_ONCE // rows.shape[1])
    parts = [part.to(device) for part in torch.split(rows, size) if len(part) == min(size, len(rows))]
    whole = Part(uncached.gm.graph, {one.end for one in locals_.values()})
    with torch.no_grad():
        targets = [whole(_given(uncached, part, {})) for part in parts]
    weights: dict[str, torch.Tensor] = {}
    # What was computed stays: consumers come in order, and none changes what is before it.
    known: list[dict[str, Any]] = [{} for _ in parts]
    for number, index in enumerate(order):
        one = locals_[index]
        early = {sources[later] for later in order[number:] if sources.get(later, index) < index}
        read = {node.name for source in early for node in (regions[source].key, regions[source].value)}
        before = Part(shared.gm.graph, one.boundary | read, set(known[0]))
        with torch.no_grad():
            for place, part in enumerate(parts):
                known[place] |= before({**_given(shared, part, weights), **known[place]})
        inside = Part(shared.gm.graph, {one.end}, one.boundary)
        values = [_given(shared, part, weights) | known[place] for place, part in enumerate(parts)]
        new, first, last = _trained(one, inside, values, [part[one.end] for part in targets], steps)
        weights |= new
        with torch.no_grad():
            for place in range(len(parts)):
                known[place] |= inside({**values[place], **new})
        tell(f"share-kv: attention {index}: the stream behind it is off by {first:.3g} -> {last:.3g}")
    return weights


def _given(uncached: Uncached, part: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {**uncached.weights, **weights, **arguments_of(uncached, part, None, None)}


def _trained(
    one: _Local,
    inside: Part,
    values: Sequence[Mapping[str, Any]],
    targets: Sequence[torch.Tensor],
    steps: int,
) -> tuple[dict[str, torch.Tensor], float, float]:
    """Weights, and by which share of its variance the stream is off on all rows before and after."""
    kinds = {name: values[0][name].dtype for name in one.trained}
    leaves = {name: values[0][name].detach().float().clone().requires_grad_() for name in one.trained}
    spread = sum(float((t.float() - t.float().mean(0)).square().mean()) for t in targets) / len(targets)

    def off(index: int) -> torch.Tensor:
        given = {name: leaf.to(kinds[name]) for name, leaf in leaves.items()}
        found = inside({**values[index], **given})[one.end]
        error: torch.Tensor = (found.float() - targets[index].float()).square().mean() / max(spread, 1e-20)
        return error

    def whole() -> float:
        with torch.no_grad():
            return sum(float(off(index)) for index in range(len(targets))) / len(targets)

    first = whole()
    optimizer = torch.optim.Adam(leaves.values(), lr=_RATE, betas=(0.9, 0.98))
    best, kept = first, {name: leaf.detach().clone() for name, leaf in leaves.items()}
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            torch.autograd.backward(off(step % len(targets)))
            optimizer.step()
    last = whole()
    if last < best:
        best, kept = last, {name: leaf.detach() for name, leaf in leaves.items()}
    return {name: value.to(kinds[name]) for name, value in kept.items()}, first, best


def _local(shared: Uncached, region: Region, makes: bool) -> _Local:
    """``makes``: keys and values are made anew, of another stream."""
    graph = shared.gm.graph
    query = projection_before(shared, region.query)
    output = projection_behind(shared, region.output)
    made = [projection_before(shared, node) for node in (region.key, region.value) if makes]
    if query is None or output is None:
        where = region.layer or region.output.name
        what = "queries" if query is None else "what it attended to"
        raise InputsError(
            f"{where}: attention {region.index} has no projection of {what} that could be fitted",
            hint='leave recover="local" out',
        )
    end = _stream_behind(output)
    trained: list[fx.Node] = []
    turns: set[fx.Node] = set()
    products = list(dict.fromkeys([query, *(one for one in made if one is not None), output]))
    for product in products:
        for weight, turned in weights_of(shared, product):
            if len(weight.users) == 1 and shared.weights[weight.name].is_floating_point():
                trained.append(weight)
                turns.update(turned)
    behind = following(graph, products)
    nodes = [node for node in Part(graph, {end.name}).nodes if node in behind or node in turns]
    inside = set(nodes)
    boundary = {
        source.name for node in nodes for source in node.all_input_nodes
        if source not in inside and source.name not in shared.weights
    }  # fmt: skip
    return _Local(end.name, tuple(node.name for node in trained), frozenset(boundary))


def _stream_behind(product: fx.Node) -> fx.Node:
    """Where the stream that goes past an attention takes its output in, if it does so at once."""
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        if name_of(user) in ("add", "add_") and len(user.all_input_nodes) == 2:
            one, other = user.all_input_nodes
            shapes = [source.meta["val"].shape for source in (one, other)]
            same = len(shapes[0]) == len(shapes[1]) and all(map(_torch.is_same_size, *shapes))
            return user if same else product
        if name_of(user) not in _PASSING:
            return product
        node = user
    return product
