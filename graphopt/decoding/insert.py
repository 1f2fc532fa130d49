"""From a graph over whole sequences to one over new rows that reads and writes stores.

Before, for tokens [B, S]::

    attention(q[B,H,S,D], k[B,Hkv,S,D], v, mask[S,S])        arange(S)        table[:S]      logits [B,S,V]

After, for the n tokens at ``slots`` [n]::

    attend_full(q[B,H,n,D], k[B,Hkv,n,D], v, stores.., slots) slots            table[slots]   logits [B,n,V]

What makes the masks is dead then. All else works row by row, or the numbers will not be those of the captured
graph, which ``graphopt.decoding.check`` finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.capture import Uncached
from graphopt.decoding.convolutions import OPERATOR, Convolution, causal_convolutions
from graphopt.decoding.dead import remove_dead
from graphopt.decoding.distance_bias import biased_by
from graphopt.decoding.layouts import name_of
from graphopt.decoding.reading import shown_by, shown_tensors
from graphopt.decoding.regions import Region
from graphopt.decoding.sites import Site
from graphopt.decoding.states import states_of
from graphopt.errors import CaptureError
from graphopt.packing.scheme import operator_named
from graphopt.program import layer_of

__all__ = ["StepGraph", "step_graph", "turn_of"]

aten = torch.ops.aten

_CONVOLUTIONS = ("conv1d", "convolution")


@dataclass(frozen=True)
class StepGraph:
    """A graph over new rows: placeholders are the weights, then ``inputs``; the output is logits [B, n, V].

    ``inputs``: tokens [B, n], mask [B, n] and positions [B, n] where the model takes them, ``slots`` int64
    [n], ``valid`` bool [max batch, capacity] where it takes a mask, ``source_end`` int64 [1] where it reads a
    source, whose last row that is, ``lasting``: what is kept of the source's masks
    (``graphopt.decoding.reading``) and tables of biases (``graphopt.decoding.distance_bias``), then the
    stores' tensors, ``stores``: names and ``(site, tensor)``; numbers behind those of sites are of
    convolutions, those behind them of recurrences. ``rows``: the n that it is for, any where it is 0.
    """

    gm: fx.GraphModule
    inputs: tuple[str, ...]
    stores: dict[str, tuple[int, str]]
    weights: dict[str, torch.Tensor]
    lasting: tuple[str, ...] = ()
    rows: int = 0


def step_graph(
    uncached: Uncached, sites: Sequence[Site], batch: int, capacity: int, length: int
) -> StepGraph:
    """The graph of one step for stores of ``batch`` sequences of ``capacity`` positions, none of which is at
    or beyond ``length``. Raises ``CaptureError`` for what is left that mixes positions."""
    return _Insertion(uncached, sites, batch, capacity, length).result()


class _Insertion:
    def __init__(
        self, uncached: Uncached, sites: Sequence[Site], batch: int, capacity: int, length: int
    ) -> None:
        self.uncached, self.sites = uncached, sites
        self.batch, self.capacity, self.length = batch, capacity, length
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(uncached.gm.graph, self.copies))
        self.mode = _torch.fake_mode_of([self.node(uncached.placeholder(uncached.tokens)).meta["val"]])
        self.stores: dict[str, tuple[int, str]] = {}
        self.slopes: dict[tuple[float, ...], fx.Node] = {}
        self.fitted: dict[int, dict[str, fx.Node]] = {}
        self.end: fx.Node | None = None
        self.shown: dict[str, fx.Node] = {}
        self.biases: dict[str, fx.Node] = {}
        self.weights = dict(uncached.weights)
        self.convolutions = causal_convolutions(uncached)
        self.shown_by, self.biased_by = shown_by(sites), biased_by(sites)
        self.states = states_of(uncached)

    def node(self, of: fx.Node) -> fx.Node:
        return self.copies[of]

    def result(self) -> StepGraph:
        uncached = self.uncached
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        tensors: dict[tuple[int, str], fx.Node] = {}
        # Of the example's batch at least: taking its rows must not look impossible while tracing.
        most = max(self.batch, _torch.hint(uncached.batch))
        behind = len(self.sites) + len(self.convolutions)
        with self.graph.inserting_after(last):
            for index, loop in reversed(list(enumerate(self.states, behind))):
                for name, state in reversed(list(loop.kinds.items())):
                    rows = (most, *state.shape)
                    tensors[index, name] = self._placeholder(f"store_{index}_{name}", rows, state.dtype)
            for index, one in reversed(list(enumerate(self.convolutions, len(self.sites)))):
                rows = (most, one.channels, one.reach)
                tensors[index, "history"] = self._placeholder(f"store_{index}_history", rows, one.dtype)
            for index, site in reversed(list(enumerate(self.sites))):
                if site.source != index:
                    continue
                kinds = site.store.tensors(site.spec, self.batch, self.capacity)
                for name, (shape, dtype) in reversed(list(kinds.items())):
                    tensors[index, name] = self._placeholder(f"store_{index}_{name}", shape, dtype)
            for name, (_, seen) in shown_tensors(self.sites, self.batch).items():
                self.shown[name] = self._placeholder(name, (most, seen), torch.bool)
            for index, name in biased_by(self.sites).items():
                if name not in self.biases:
                    distances = (self.sites[index].spec.heads, self.capacity)
                    self.biases[name] = self._placeholder(name, distances, torch.float32)
            if any(site.spec.source for site in self.sites):
                self.end = self._placeholder("source_end", (1,), torch.int64)
            valid = None
            if uncached.mask is not None:
                valid = self._placeholder("valid", (most, self.capacity), torch.bool)
            slots = self._placeholder("slots", (uncached.length,), torch.int64)
        self._place_slopes()
        self._place_fitted()
        first = next(n for n in self.graph.nodes if n.op == "call_function")
        with self.graph.inserting_before(first):
            if valid is not None:
                self._note_valid(valid, slots)
        uses_padding = any(site.spec.mask.padding for site in self.sites)
        for index, site in enumerate(self.sites):
            held = [tensors[site.source, name] for name in site.store.tensors(site.spec, 1, self.capacity)]
            self._attend(index, site, held, slots, valid if uses_padding else None)
        for index, one in enumerate(self.convolutions, len(self.sites)):
            self._convolve(one, tensors[index, "history"], slots)
        for index, loop in enumerate(self.states, behind):
            self._carry(loop.node, [tensors[index, name] for name in loop.kinds], slots)
        remove_dead(self.graph)
        self._count_padding(valid, slots)
        self._take_positions(slots)
        remove_dead(self.graph)
        self._drop_source()
        self._refuse_rest()
        self.graph.lint()
        # In the order of the placeholders: the sites', and that in which operators take a store's tensors.
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        self.stores = {tensors[key].name: key for key in sorted(tensors, key=lambda key: order[tensors[key]])}
        placeholders = (node.name for node in self.graph.nodes if node.op == "placeholder")
        names = [name for name in placeholders if name not in self.weights]
        lasting = tuple(node.name for node in (*self.shown.values(), *self.biases.values()))
        gm = fx.GraphModule(torch.nn.Module(), self.graph)
        return StepGraph(gm, tuple(names), self.stores, self.weights, lasting)

    def _place_slopes(self) -> None:
        """What heads add for each position, as a weight: once for all sites that add the same."""
        tokens = self.node(self.uncached.placeholder(self.uncached.tokens))
        for site in self.sites:
            slopes = site.spec.mask.slopes
            if slopes and slopes not in self.slopes:
                with self.graph.inserting_before(tokens):
                    node = self._placeholder(f"slopes_{len(self.slopes)}", (len(slopes),), torch.float32)
                self.slopes[slopes] = node
                self.weights[node.name] = torch.tensor(slopes, device=tokens.meta["val"].device)

    def _place_fitted(self) -> None:
        """What stores were fitted to, as weights."""
        tokens = self.node(self.uncached.placeholder(self.uncached.tokens))
        for index, site in enumerate(self.sites):
            for name, tensor in site.spec.fitted.items() if site.source == index else ():
                with self.graph.inserting_before(tokens):
                    node = self._placeholder(f"fitted_{index}_{name}", tensor.shape, tensor.dtype)
                self.fitted.setdefault(index, {})[name] = node
                self.weights[node.name] = tensor

    def _placeholder(self, name: str, shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> fx.Node:
        node = self.graph.placeholder(name)
        device = self.node(self.uncached.placeholder(self.uncached.tokens)).meta["val"].device
        with self.mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=device)
        return node

    def call(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        """A new call at the place of insertion, its value known."""
        node = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        given: Any = (args, kwargs)
        values = fx.node.map_arg(given, lambda ref: ref.meta["val"])
        with self.mode, torch.no_grad(), _torch.python_dispatcher():
            node.meta["val"] = target(*values[0], **values[1])  # type: ignore[operator]
        return node

    def _note_valid(self, valid: fx.Node, slots: fx.Node) -> None:
        """Keep which of the new tokens are padding."""
        assert self.uncached.mask is not None
        mask = self.node(self.uncached.placeholder(self.uncached.mask))
        size = self.call(aten.sym_size.int, mask, 0)
        rows = self.call(aten.narrow.default, valid, 0, 0, size)
        self.call(aten.index_copy_.default, rows, 1, slots, self.call(aten.ne.Scalar, mask, 0))

    def _attend(
        self, index: int, site: Site, held: Sequence[fx.Node], slots: fx.Node, valid: fx.Node | None
    ) -> None:
        region, spec = site.region, site.spec
        output = self.node(region.output)
        with self.graph.inserting_before(output):
            query = self._heads_apart(self.node(region.query), region)
            key = value = None
            brings = site.source == index or site.store.takes_turns or site.store.joins
            if brings and not spec.source:
                made_by = self.sites[index if site.store.joins else site.source].region
                key = self.node(made_by.key)
                if made_by.key_transposed:
                    key = self.call(aten.transpose.int, key, -2, -1)
                key = self._heads_apart(key, made_by)
                value = self._heads_apart(self.node(made_by.value), made_by)
            sinks = slopes = None
            if region.sinks is not None:
                sinks = self.call(aten.reshape.default, self.node(region.sinks), [spec.heads])
            if spec.mask.slopes:
                slopes = self.slopes[spec.mask.slopes]
            bias = self.biases[self.biased_by[index]] if spec.mask.bias else None
            spec = replace(spec, fitted=self.fitted.get(site.source, {}), bias=bias)
            query, key, value = site.store.enter(self.call, spec, query, key, value)
            places, length = slots, self.length
            valid = valid if spec.mask.padding or spec.mask.slopes else None
            if spec.source:
                # What the source is was said before the first step, and nothing of it changes.
                places, length, valid = self._end(), spec.source, self.shown.get(self.shown_by.get(index, ""))
            made = self.call(
                operator_named(site.store.attend_op), query, key, value, *held, places, valid, slopes, sinks,
                spec.scale, spec.softcap, spec.mask.window, length,
                *site.store.constants(replace(spec, turn=turn_of(self.sites, index))),
            )  # fmt: skip
            made.meta["nn_module_stack"] = output.meta.get("nn_module_stack")
            made = site.store.leave(self.call, spec, made)
            if region.flat:
                made = self.call(aten.flatten.using_ints, made, 0, 1)
        output.replace_all_uses_with(made)
        self.graph.erase_node(output)

    def _end(self) -> fx.Node:
        assert self.end is not None
        return self.end

    def _drop_source(self) -> None:
        """Nothing but keys and values of attentions, and what they leave out, is made of the source."""
        source = self.uncached.source
        if source is None:
            return
        tokens = self.node(self.uncached.placeholder(self.uncached.tokens))
        for name in source.inputs:
            node = self.node(self.uncached.placeholder(name))
            for user in list(node.users):
                if name_of(user) == "sym_size" and _torch.is_same_size(user.meta["val"], self.uncached.batch):
                    user.update_arg(0, tokens)
            if node.users:
                user = next(iter(node.users))
                raise CaptureError(
                    f"{_where(user)} reads the source at every step: only attention to it is understood, "
                    "whose keys and values are computed once"
                )
            self.graph.erase_node(node)

    def _convolve(self, one: Convolution, history: fx.Node, slots: fx.Node) -> None:
        output = self.node(one.output)
        with self.graph.inserting_before(output):
            bias = None if one.bias is None else self.node(one.bias)
            made = self.call(
                operator_named(OPERATOR), self.node(one.source), self.node(one.weight), bias, history, slots,
                one.dilation, one.groups,
            )  # fmt: skip
            made.meta["nn_module_stack"] = output.meta.get("nn_module_stack")
        output.replace_all_uses_with(made)
        self.graph.erase_node(output)
        self.graph.erase_node(self.node(one.node))

    def _carry(self, node: fx.Node, held: Sequence[fx.Node], slots: fx.Node) -> None:
        """Begin a recurrence with what was kept, behind position 0, and keep what it leaves."""
        call = self.node(node)
        initial: Any = call.args[0]
        with self.graph.inserting_before(call):
            tokens = self.node(self.uncached.placeholder(self.uncached.tokens))
            size = self.call(aten.sym_size.int, tokens, 0)
            first = self.call(aten.eq.Scalar, self.call(aten.select.int, slots, 0, 0), 0)
            rows = [self.call(aten.narrow.default, store, 0, 0, size) for store in held]
            # Not a product: what was never written may be anything.
            begun = [
                self.call(aten.where.self, first, one, kept) for one, kept in zip(initial, rows, strict=True)
            ]
        call.update_arg(0, begun)
        at = call
        for number, row in enumerate(rows, len(call.meta["val"]) - len(held)):
            with self.graph.inserting_after(at):
                end = self.graph.call_function(getitem, (call, number))
                end.meta["val"] = call.meta["val"][number]
            with self.graph.inserting_after(end):
                at = self.call(aten.copy_.default, row, end)

    def _heads_apart(self, node: fx.Node, region: Region) -> fx.Node:
        if not region.flat:
            return node
        return self.call(aten.unflatten.int, node, 0, [-1, region.heads])

    def _count_padding(self, valid: fx.Node | None, slots: fx.Node) -> None:
        """``cumsum(mask)`` counts from the start of the sequence, not of the step."""
        if valid is None or self.uncached.mask is None:
            return
        mask = self.node(self.uncached.placeholder(self.uncached.mask))
        for node in list(self.graph.nodes):
            source = node.args[0] if name_of(node) == "cumsum" else None
            while isinstance(source, fx.Node) and name_of(source) in ("to", "_to_copy", "ne", "long", "int"):
                source = source.args[0]
            if source is not mask or source is None:
                continue
            with self.graph.inserting_before(node):
                size = self.call(aten.sym_size.int, mask, 0)
                rows = self.call(aten.narrow.default, valid, 0, 0, size)
                dtype = node.meta["val"].dtype
                counted = self.call(aten.cumsum.default, self.call(aten.to.dtype, rows, dtype), -1)
                here = self.call(aten.index_select.default, counted, 1, slots)
            node.replace_all_uses_with(here)
            self.graph.erase_node(node)

    def _take_positions(self, slots: fx.Node) -> None:
        """Positions that were counted from 0 are those of the step's rows."""
        for node in list(self.graph.nodes):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            if name_of(node) == "arange" and self.uncached.is_length(value.shape[0]):
                start, step = _from_and_by(node)
                if start != 0 or step != 1:
                    raise CaptureError(
                        f"{_where(node)}: positions {start}, {start} + {step}, ..: only those that count "
                        "from 0 are understood"
                    )
                with self.graph.inserting_before(node):
                    made = slots
                    if value.dtype is not torch.int64:
                        made = self.call(aten.to.dtype, slots, value.dtype)
                node.replace_all_uses_with(made)
                self.graph.erase_node(node)
            elif name_of(node) in ("slice", "narrow") and self._takes_rows(node):
                dim = _dimension(node)
                with self.graph.inserting_before(node):
                    made = self.call(aten.index_select.default, node.args[0], dim, slots)
                node.replace_all_uses_with(made)
                self.graph.erase_node(node)

    def _takes_rows(self, node: fx.Node) -> bool:
        """Whether ``node`` is the first rows, as many as the sequence has, of a table of fixed length."""
        source = node.args[0]
        dim = _dimension(node)
        if not isinstance(source, fx.Node):
            return False
        before, after = source.meta["val"].shape[dim], node.meta["val"].shape[dim]
        if not self._has_length(after) or self._has_length(before):
            return False
        start = node.args[2] if len(node.args) > 2 else 0
        if start not in (0, None) or not self.uncached.is_length(after):
            raise CaptureError(
                f"{_where(node)}: takes {after} rows of a table from {start} on: only the first ones, as "
                "many as the sequence has, are understood"
            )
        return True

    def _has_length(self, size: object) -> bool:
        return self.uncached.has_length(size)

    def _refuse_rest(self) -> None:
        """Values of length times length are left of what was not understood as attention."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if node.op != "call_function" or not isinstance(value, torch.Tensor):
                continue
            if name_of(node) in _CONVOLUTIONS and self._has_length(node.args[0].meta["val"].shape[-1]):
                raise CaptureError(
                    f"{_where(node)} convolves positions in a way that was not recognised as causal",
                    hint="recognised is conv1d(x, w, padding=dilation * (taps - 1))[..., :length], stride 1",
                )
            if sum(self._has_length(size) for size in value.shape) > 1:
                raise CaptureError(
                    f"{_where(node)} makes a value of {list(map(str, value.shape))}: positions are mixed "
                    "there in a way that was not recognised as attention",
                    hint="recognised are scaled_dot_product_attention and softmax(q @ k.mT * scale + mask) "
                    "@ v",
                )


def turn_of(sites: Sequence[Site], index: int) -> int:
    """Which of the sites that read one store site ``index`` is, as ``SiteSpec`` says."""
    source = sites[index].source
    readers = [i for i, site in enumerate(sites) if site.source == source]
    if len(readers) == 1:
        return 0
    return 1 if index == readers[0] else 3 if index == readers[-1] else 2


def _dimension(node: fx.Node) -> int:
    """Along which dimension a slice is taken."""
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return int(dim)


def _from_and_by(node: fx.Node) -> tuple[object, object]:
    overload = str(node.target).rsplit(".", 1)[-1]
    if overload == "default":
        return 0, 1
    return node.args[0], node.args[2] if len(node.args) > 2 else 1


def _where(node: fx.Node) -> str:
    layer = layer_of(node)
    return f"{node.name} of {layer}" if layer else node.name
