"""What a model gives once stores keep less than it made, over whole sequences at once.

Before::

    attention(q[B,H,S,D], k[B,Hkv,S,D], v, mask)

After, for a site whose store is not exact::

    store.whole(q, k, v, valid)          each row as if it had come by itself

A token by token run would take S steps; this is one, and it owes nothing to how a store packs what it keeps.
So decoders are compared with it, and what stores cost in divergence is measured by it: for one site after the
other, what comes before the site being run once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.regions import Region
from graphopt.decoding.stores import CacheStore, SiteSpec, called
from graphopt.order import has_effect
from graphopt.quality import row_divergences

__all__ = ["Fitted", "Given", "Whole", "heads_apart", "single_divergences", "with_outputs", "with_stores"]

Fitted = Mapping[tuple[int, str], Mapping[str, torch.Tensor]]
"""What stores were fitted to, by site and spelling."""


def heads_apart(
    region: Region, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The values that a region reads as [B, H, S, D], [B, Hkv, S, D] and [B, Hkv, S, Dv]."""
    if region.key_transposed:
        key = key.transpose(-2, -1)
    if region.flat:
        query, key, value = (x.reshape(-1, region.heads, *x.shape[1:]) for x in (query, key, value))
    return query, key, value


class Whole(torch.nn.Module):
    """``store.whole`` for the layout that the values of a region have."""

    def __init__(self, region: Region, spec: SiteSpec, store: CacheStore) -> None:
        super().__init__()
        self.region, self.spec, self.store = region, spec, store

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        query, key, value = heads_apart(self.region, query, key, value)
        spec = self.spec
        slopes = None
        if spec.mask.slopes:
            slopes = torch.tensor(spec.mask.slopes, device=query.device)
        valid = None
        if mask is not None and (spec.mask.padding or spec.mask.slopes):
            valid = mask != 0
        if sinks is not None:
            sinks = sinks.reshape(self.region.heads)
        made = self.store.whole(spec, query, key, value, valid, slopes, sinks)
        return made.flatten(0, 1) if self.region.flat else made


def with_stores(
    uncached: Uncached,
    regions: Sequence[Region],
    specs: Sequence[SiteSpec],
    stores: Mapping[int, CacheStore],
) -> Uncached:
    """The same program, but region ``index`` gives what ``stores[index]`` makes of its keys and values."""
    wholes = {index: Whole(regions[index], specs[index], store) for index, store in stores.items()}
    return _replaced(uncached, regions, wholes)


class Given(torch.nn.Module):
    """``made`` [B, H, S, Dv], what an operator gave, in the place of what a region gives. ``ends``: the
    queries, keys and values, heads apart, that the operator would have been given."""

    def __init__(self, region: Region, spec: SiteSpec, store: CacheStore, made: torch.Tensor) -> None:
        super().__init__()
        self.region, self.spec, self.store, self.made = region, spec, store, made
        self.ends: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: torch.Tensor | None
    ) -> torch.Tensor:
        query, key, value = heads_apart(self.region, query, key, value)
        self.ends = self.store.enter(called, self.spec, query, key, value)
        made: torch.Tensor = self.store.leave(called, self.spec, self.made[:, :, : query.shape[2]])
        return made.flatten(0, 1) if self.region.flat else made


def with_outputs(
    uncached: Uncached,
    regions: Sequence[Region],
    specs: Sequence[SiteSpec],
    stores: Mapping[int, CacheStore],
    outputs: Mapping[int, torch.Tensor],
) -> tuple[Uncached, dict[int, Given]]:
    """The same program, but region ``index`` gives what operators of ``stores[index]`` made, the rows of
    ``outputs[index]`` [B, H, S, Dv], and what keeps the queries, keys and values that these would have been
    given."""
    given = {i: Given(regions[i], specs[i], stores[i], made) for i, made in outputs.items()}
    return _replaced(uncached, regions, given), given


def _replaced(
    uncached: Uncached, regions: Sequence[Region], modules: Mapping[int, torch.nn.Module]
) -> Uncached:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(uncached.gm.graph, copies))
    root = torch.nn.Module()
    mask = copies[uncached.placeholder(uncached.mask)] if uncached.mask is not None else None
    for index, module in modules.items():
        region, name = regions[index], f"whole_{index}"
        root.add_module(name, module)
        sinks = copies[region.sinks] if region.sinks is not None else None
        output = copies[region.output]
        with graph.inserting_before(output):
            given = (copies[region.query], copies[region.key], copies[region.value], mask, sinks)
            made = graph.call_module(name, given)
        made.meta = dict(output.meta)
        output.replace_all_uses_with(made)
        graph.erase_node(output)
    graph.eliminate_dead_code(lambda node: node.op == "placeholder" or has_effect(node))
    return replace(uncached, gm=fx.GraphModule(root, graph))


def single_divergences(
    uncached: Uncached,
    regions: Sequence[Region],
    specs: Sequence[SiteSpec],
    candidates: Mapping[int, Sequence[CacheStore]],
    batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    readers: Mapping[int, Sequence[int]] | None = None,
    told: Callable[[int, int], None] | None = None,
    fitted: Fitted | None = None,
) -> dict[tuple[int, CacheStore], float]:
    """KL(model || model with that one store at that one site), mean over rows of logits that are no padding,
    in nats.

    ``readers``: sites that read the store of a site besides itself, by its index. ``batches``: tokens int64
    [B, S] and their mask or ``None``. A site costs the part of a forward behind it for each of its stores;
    values that this part reads, and the logits twice, are in memory. ``told(done, of)`` is called after each.
    ``fitted``: what those of the stores that need it were fitted to (``fit_stores``).
    """
    sums: dict[tuple[int, CacheStore], float] = {}
    rows, done = 0, 0
    total = len(batches) * sum(len(stores) for stores in candidates.values())
    for tokens, mask in batches:
        shown = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        rows += int(shown.sum())
        reference = uncached.run(tokens, mask)[shown]
        for key, logits in _variants(
            uncached, regions, specs, candidates, readers or {}, tokens, mask, fitted or {}
        ):
            off = row_divergences(reference, logits[shown]).double().sum()
            sums[key] = sums.get(key, 0.0) + float(off)
            done += 1
            if told is not None:
                told(done, total)
    return {key: off / rows for key, off in sums.items()}


def _variants(
    uncached: Uncached,
    regions: Sequence[Region],
    specs: Sequence[SiteSpec],
    candidates: Mapping[int, Sequence[CacheStore]],
    readers: Mapping[int, Sequence[int]],
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    fitted: Fitted,
) -> Iterator[tuple[tuple[int, CacheStore], torch.Tensor]]:
    """Logits with one store at one site, and at those that read it, site by site."""
    nodes = list(uncached.gm.graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    at = {places[regions[index].output]: index for index in candidates}
    last = {node: max((places[user] for user in node.users), default=-1) for node in nodes}
    given = arguments_of(uncached, tokens, mask, None)
    shown = uncached.placeholder(uncached.mask) if uncached.mask is not None else None
    for index in {*candidates, *(one for group in readers.values() for one in group)}:
        region = regions[index]
        for node in (region.query, region.key, region.value, region.sinks, shown):
            if node is not None:
                last[node] = max(last[node], places[region.output])
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for place, node in enumerate(nodes):
            if place in at:
                index = at[place]
                for store in candidates[index]:
                    own = fitted.get((index, str(store)), {})
                    swapped = {
                        regions[one].output: (
                            regions[one], Whole(regions[one], replace(specs[one], fitted=own), store)
                        )
                        for one in (index, *readers.get(index, ()))
                    }
                    yield (index, store), _rest(nodes, place, dict(known), last, swapped, shown)
                if place == max(at):
                    return
            known[node] = _value(node, known, uncached, given)
            _forget(node, known, last, place)


def _rest(
    nodes: Sequence[fx.Node],
    place: int,
    known: dict[fx.Node, Any],
    last: Mapping[fx.Node, int],
    swapped: Mapping[fx.Node, tuple[Region, Whole]],
    mask: fx.Node | None,
) -> torch.Tensor:
    """The logits, from the node at ``place`` on; outputs of regions that are ``swapped`` are what their
    stores give."""
    for later in range(place, len(nodes)):
        node = nodes[later]
        if node.op == "output":
            given: Any = node.args[0]
            (logits,) = fx.node.map_arg(given, known.__getitem__)
            result: torch.Tensor = logits
            return result
        if node in swapped:
            region, whole = swapped[node]
            ends = (region.query, region.key, region.value, mask, region.sinks)
            known[node] = whole(*(None if end is None else known[end] for end in ends))
        else:
            known[node] = _call(node, known)
        _forget(node, known, last, later)
    raise AssertionError("a graph without an output")


def _value(
    node: fx.Node, known: Mapping[fx.Node, Any], uncached: Uncached, given: Mapping[str, torch.Tensor]
) -> Any:
    if node.op == "placeholder":
        return given[node.name] if node.name in given else uncached.weights[node.name]
    return _call(node, known)


def _call(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, known.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
    if node.op != "call_function":
        raise AssertionError(f"a captured program has no {node.op}: {node.name}")
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _forget(node: fx.Node, known: dict[fx.Node, Any], last: Mapping[fx.Node, int], place: int) -> None:
    """Drop what nothing behind ``place`` reads."""
    for read in (node, *node.all_input_nodes):
        if last[read] <= place:
            known.pop(read, None)
