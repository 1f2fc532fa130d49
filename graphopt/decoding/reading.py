"""What is made of an encoder's output once for each sequence, and kept in stores.

Before, in a program over tokens [B, S] and a source [B, T, D]::

    k = linear(source, wk)   v = linear(source, wv)   attention(q[B,H,S,D], k[B,Hkv,T,D], v, shown[B,T])

After, in a program that runs once::

    store_k[:B, :, :T] = k   store_v[:B, :, :T] = v   shown_0[:B, :T] = shown

and in the one of a step (``graphopt.decoding.insert``)::

    attend_cross(q[B,H,n,D], store_k, store_v, source_end, shown_0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import alias_map
from graphopt.decoding.capture import Uncached
from graphopt.decoding.closure import closure
from graphopt.decoding.masks import MASKED
from graphopt.decoding.regions import Region
from graphopt.decoding.sites import Site
from graphopt.errors import CaptureError
from graphopt.order import has_effect
from graphopt.program import layer_of

__all__ = ["ReadGraph", "read_graph", "shown_by", "shown_tensors"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ReadGraph:
    """A graph over a source: placeholders are weights, then ``inputs``; it gives nothing and writes the
    stores' tensors (``stores``: names and ``(site, tensor)``) and what is kept of masks (``lasting``)."""

    gm: fx.GraphModule
    inputs: tuple[str, ...]
    stores: dict[str, tuple[int, str]]
    lasting: tuple[str, ...]
    weights: dict[str, torch.Tensor]


def shown_by(sites: Sequence[Site]) -> dict[int, str]:
    """For each site that reads a source through a mask the name of what is kept of it: one for all that read
    through the same."""
    names: dict[object, str] = {}
    found: dict[int, str] = {}
    for index, site in enumerate(sites):
        if site.spec.source and site.spec.mask.padding:
            key = tuple((entry.kind, entry.node) for entry in site.region.added)
            found[index] = names.setdefault(key, f"shown_{len(names)}")
    return found


def shown_tensors(sites: Sequence[Site], batch: int) -> dict[str, tuple[int, int]]:
    """Shapes of what is kept of masks of the source, bool, by name."""
    return {name: (batch, sites[index].spec.source) for index, name in shown_by(sites).items()}


def read_graph(uncached: Uncached, sites: Sequence[Site], batch: int, capacity: int) -> ReadGraph:
    """The graph that reads a source into stores of ``batch`` sequences. Raises ``CaptureError`` where keys or
    values are not of the source alone."""
    return _Reading(uncached, sites, batch, capacity).result()


class _Reading:
    def __init__(self, uncached: Uncached, sites: Sequence[Site], batch: int, capacity: int) -> None:
        self.uncached, self.sites, self.batch, self.capacity = uncached, sites, batch, capacity
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.graph.graph_copy(uncached.gm.graph, self.copies)
        self.output = self.graph.output(())
        self.example = self.copies[uncached.placeholder(uncached.tokens)].meta["val"]
        self.mode = _torch.fake_mode_of([self.example])
        self.made: set[fx.Node] = set()

    def result(self) -> ReadGraph:
        source = self.uncached.source
        assert source is not None
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        # Of the example's size at least: taking its rows must not look impossible while tracing.
        most = max(self.batch, _torch.hint(self.uncached.batch))
        held: dict[tuple[int, str], fx.Node] = {}
        shown: dict[str, fx.Node] = {}
        rows_at_least = _torch.hint(source.rows)
        with self.graph.inserting_before(last.next):
            for index, site in enumerate(self.sites):
                if not site.spec.source or site.source != index:
                    continue
                spec = replace(site.spec, source=max(site.spec.source, rows_at_least))
                for name, (shape, dtype) in site.store.tensors(spec, most, self.capacity).items():
                    held[index, name] = self._placeholder(f"store_{index}_{name}", shape, dtype)
            for name, (_, rows) in shown_tensors(self.sites, self.batch).items():
                shape = (most, max(rows, rows_at_least))
                shown[name] = self._placeholder(name, shape, torch.bool)
        with self.graph.inserting_before(self.output):
            for index, site in enumerate(self.sites):
                if site.spec.source and site.source == index:
                    self._write(index, site, held)
            done: set[str] = set()
            for index, name in shown_by(self.sites).items():
                if name not in done:
                    self._show(self.sites[index].region, shown[name])
                    done.add(name)
        self._keep_what_is_written()
        stores = {node.name: key for key, node in held.items()}
        kept = {*stores, *(node.name for node in shown.values())}
        weights, inputs = {}, []
        for node in list(self.graph.nodes):
            if node.op != "placeholder":
                continue
            if not node.users:
                self.graph.erase_node(node)
            elif node.name in self.uncached.weights:
                weights[node.name] = self.uncached.weights[node.name]
            elif node.name not in kept:
                inputs.append(node.name)
        self.graph.lint()
        gm = fx.GraphModule(torch.nn.Module(), self.graph)
        names = tuple(shown)
        return ReadGraph(gm, (*inputs, *stores, *names), stores, names, weights)

    def _keep_what_is_written(self) -> None:
        """Drop all but what is written and what that is made of: attention, which draws where there is
        dropout, would keep the decoder's own layers."""
        written = [node for node in self.made if has_effect(node)]
        needed = set(closure(written, alias_map(self.graph)))
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and node not in needed:
                self.graph.erase_node(node)

    def _placeholder(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=self.example.device)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call at the end of the graph, its value known."""
        node = self.graph.call_function(target, args, kwargs)
        self.made.add(node)
        given: Any = fx.node.map_arg((args, kwargs), lambda ref: ref.meta["val"])
        with self.mode, torch.no_grad(), _torch.python_dispatcher():
            node.meta["val"] = target(*given[0], **given[1])
        return node

    def _write(self, index: int, site: Site, held: dict[tuple[int, str], fx.Node]) -> None:
        region = site.region
        key, value = self.copies[region.key], self.copies[region.value]
        if region.key_transposed:
            key = self.call(aten.transpose.int, key, -2, -1)
        if region.flat:
            key, value = (self.call(aten.unflatten.int, x, 0, [-1, region.heads]) for x in (key, value))
        names = site.store.tensors(site.spec, self.batch, self.capacity)
        site.store.write(self.call, site.spec, key, value, [held[index, name] for name in names])

    def _show(self, region: Region, shown: fx.Node) -> None:
        """Which rows of the source the first row of the decoder reads: all read the same."""
        allowed: fx.Node | None = None
        for entry in region.added:
            assert entry.node is not None
            node = self.copies[entry.node]
            if entry.kind == "bias":
                node = self.call(aten.gt.Scalar, node, MASKED)
            else:
                node = self.call(aten.to.dtype, node, torch.bool)
                if entry.kind == "hide":
                    node = self.call(aten.logical_not.default, node)
            node = self._first_row(node, region)
            allowed = node if allowed is None else self.call(aten.logical_and.default, allowed, node)
        key = self.copies[region.key]
        rows = self.call(aten.sym_size.int, key, -1 if region.key_transposed else -2)
        assert self.uncached.source is not None
        leaf = self.copies[self.uncached.placeholder(self.uncached.source.leaves[0])]
        batch = self.call(aten.sym_size.int, leaf, 0)
        part = self.call(aten.narrow.default, shown, 0, 0, batch)
        part = self.call(aten.narrow.default, part, 1, 0, rows)
        self.call(aten.copy_.default, part, allowed)

    def _first_row(self, node: fx.Node, region: Region) -> fx.Node:
        """[B or 1, T] of what is added to scores [B, H, S, T] or [B * H, S, T]."""
        dims = node.meta["val"].dim()
        if dims == 3 and region.flat:
            node = self.call(aten.unflatten.int, node, 0, [-1, region.heads])
            dims = 4
        if not 2 <= dims <= 4:
            raise CaptureError(
                f"{layer_of(region.output) or region.output.name}: a mask of {dims} dimensions is added to "
                "scores of a source: expected [batch, heads, rows, rows of the source]"
            )
        node = self.call(aten.select.int, node, -2, 0)
        if dims > 2:
            node = self.call(aten.select.int, node, -2, 0)
        return node
