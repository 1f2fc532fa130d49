"""Attentions that read the keys and values of later ones, in training (Wu and Tu 2024, arXiv 2405.10637).

Before, attention 3 being the source of attentions 1 and 2::

    x1 -> q1, k1, v1 -> attention 1 -> x2 -> q2, k2, v2 -> attention 2 -> x3 -> q3, k3, v3 -> attention 3

After, with ``iterations=3, backward_iterations=2``::

    q1 -> 0                      -> x2' -> q2' -> 0                      -> x3' -> k3', v3'  detached
    q1 -> attention 1 (k3', v3') -> x2" -> q2" -> attention 2 (k3', v3') -> x3" -> k3", v3"
    q1 -> attention 1 (k3", v3") -> x2  -> q2  -> attention 2 (k3", v3") -> x3  -> q3, k3, v3 -> attention 3

What lies between the first consumer and the keys and values of the source is computed again and again, with
those of the iteration before; what is before and behind is computed once. A row reads those before it, not
itself: decoding token by token, its own keys and values come out of the source when the consumers have run.
A row that is shown none reads one key and one value of zeros, and so does the first iteration: it gets zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from graphopt.capture.ambient import ambient_map, is_state_call
from graphopt.decoding.dead import remove_dead
from graphopt.decoding.regions import Region
from graphopt.decoding.share import between
from graphopt.edit import Edit
from graphopt.errors import InputsError
from graphopt_passes.share_kv.narrow import narrow_queries
from graphopt_passes.share_kv.training import CAUSAL, Trained, place_of

__all__ = ["Condensing", "repeated"]

_aten = torch.ops.aten
_END = 2**63 - 1


@dataclass(frozen=True)
class Condensing:
    """``plan``: attention ``consumer`` reads the keys and values of attention ``source``, of this iteration
    where that is earlier, of the one before where it is later. There are ``iterations`` of them, of which the
    last ``backward_iterations`` pass gradients."""

    trained: Trained
    plan: Mapping[int, int]
    iterations: int
    backward_iterations: int

    @property
    def later(self) -> dict[int, int]:
        return {consumer: source for consumer, source in self.plan.items() if source > consumer}

    @property
    def groups(self) -> list[dict[int, int]]:
        """Parts of ``later`` that are repeated one after the other: no attention of one lies between those of
        another."""
        found: list[dict[int, int]] = []
        reached = -1
        for consumer, source in sorted(self.later.items()):
            if consumer > reached:
                found.append({})
            found[-1][consumer] = source
            reached = max(reached, source)
        return found

    def __call__(self, edit: Edit) -> None:
        """The rewriting. Raises ``InputsError`` where keys or values of a consumer are read by something
        else, naming its layer."""
        edit.rule = "condense"
        regions = self.trained.regions
        products = {
            consumer: self._products(regions[consumer].key) | self._products(regions[consumer].value)
            for consumer in self.plan
        }
        masks: dict[fx.Node, fx.Node] = {}
        for consumer, source in self.plan.items():
            reader, maker = regions[consumer], regions[source]
            # Those of later sources are given to attentions that take the place of these.
            new_ones = (maker.key, maker.value) if source < consumer else (reader.query, reader.query)
            for node in between(reader):
                for old, new in zip((reader.key, reader.value), new_ones, strict=True):
                    if old is not new and old in node.all_input_nodes:
                        node.replace_input_with(old, new)
        remove_dead(edit.graph)
        left = set(edit.graph.nodes)
        for consumer in self.plan:
            for name, end in (("keys", regions[consumer].key), ("values", regions[consumer].value)):
                if end in left:
                    other = next(iter(end.users))
                    source = self.plan[consumer]
                    raise InputsError(
                        f"{place_of(regions[consumer])}: the {name} of attention {consumer} are read by "
                        f"{other.name} as well: they would stay although it reads those of {source}",
                        hint="let a model that returns them be called with use_cache=False, and attentions "
                        "that share them share others",
                    )
        for found in products.values():
            for product in found & left:
                narrow_queries(edit, product)
        remove_dead(edit.graph)
        for group in self.groups:
            _Unrolled(edit, self, group, masks).make()

    def _products(self, end: fx.Node) -> set[fx.Node]:
        behind = self.trained.behind_projection(end)
        return {node for node in behind if self.trained.is_projection(node)}


def repeated(trained: Trained, group: Mapping[int, int]) -> list[fx.Node]:
    """What is computed in every iteration, in order: what follows attentions of ``group`` and makes the keys
    and values of their sources.

    Raises ``InputsError``, naming the layer, for what cannot run more than once.
    """
    regions = trained.regions
    starts = {regions[consumer].output: regions[consumer] for consumer in group}
    nodes = list(regions[0].output.graph.nodes)
    behind: set[fx.Node] = set()
    pending = list(starts)
    while pending:
        node = pending.pop()
        if node not in behind:
            behind.add(node)
            pending.extend(node.users)
    ahead: set[fx.Node] = set()
    pending = [end for source in set(group.values()) for end in (regions[source].key, regions[source].value)]
    while pending:
        node = pending.pop()
        if node not in ahead:
            ahead.add(node)
            pending.extend([starts[node].query] if node in starts else trained.made_of(node))
    states = ambient_map(nodes).states
    keys = {node: state.key for node, state in zip(nodes, states, strict=False)}
    found = [node for node in nodes if node in behind and node in ahead]
    for source in sorted(set(group.values())):
        if regions[source].key not in behind and regions[source].value not in behind:
            consumer = next(one for one, other in group.items() if other == source)
            raise InputsError(
                f"{place_of(regions[consumer])}: the keys and values of attention {source} are not made of "
                f"what attention {consumer} gives: nothing is to be repeated",
                hint=f"leave {consumer} out of the plan",
            )
    again = set(found)
    for node in found:
        why = ""
        lasting = [root for root in trained.written_by(node) if root not in again]
        if lasting:
            why = f"{node.name} ({node.target}) writes into {lasting[0].name}, which is made once"
        elif is_state_call(node) or keys[node] != keys[found[0]]:
            why = f"autocast or the gradient mode is another at {node.name} than at {found[0].name}"
        if why:
            ends = f"attentions {min(group)} and {max(group.values())}"
            raise InputsError(
                f"{place_of(node)}: what lies between {ends} is to be computed several times: {why}",
                hint="let the model do that once, before or behind these attentions",
            )
    return found


@dataclass
class _Unrolled:
    edit: Edit
    condensing: Condensing
    group: Mapping[int, int]
    masks: dict[fx.Node, fx.Node]
    """What is shown of the rows before, by the mask of the model, made once for all."""
    moved: dict[tuple[fx.Node, bool], fx.Node] = field(default_factory=dict)
    """Keys and values without their last row, or behind a row of zeros."""

    def make(self) -> None:
        trained, edit = self.condensing.trained, self.edit
        regions = trained.regions
        again = repeated(trained, self.group)
        readers = {regions[consumer].output: consumer for consumer in self.group}
        held: dict[int, tuple[fx.Node, fx.Node]] | None = None
        last_without = self.condensing.iterations - self.condensing.backward_iterations
        for number in range(1, self.condensing.iterations):
            copies: dict[fx.Node, fx.Node] = {}

            def copied(node: fx.Node, copies: dict[fx.Node, fx.Node] = copies) -> fx.Node:
                return copies.get(node, node)

            for node in again:
                if node in readers:
                    query = copied(regions[readers[node]].query)
                    copies[node] = self._attention(again[0], readers[node], query, held)
                else:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), copied)
                    copies[node] = edit.call_before(again[0], node.target, args, kwargs, replaces=(node,))
            held = {
                source: (copied(regions[source].key), copied(regions[source].value))
                for source in sorted(set(self.group.values()))
            }
            if number == last_without:
                held = {
                    source: (self._detached(again[0], key), self._detached(again[0], value))
                    for source, (key, value) in held.items()
                }
        for node, consumer in readers.items():
            new = self._attention(node, consumer, regions[consumer].query, held)
            edit.replace(node, new)
            # Attention may draw random numbers, so it does not go by itself.
            edit.erase(node)

    def _call(self, anchor: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.edit.call_before(anchor, target, args, kwargs)

    def _detached(self, anchor: fx.Node, node: fx.Node) -> fx.Node:
        return self._call(anchor, _aten.detach.default, node)

    def _attention(
        self, anchor: fx.Node, consumer: int, query: fx.Node, held: Mapping[int, tuple[fx.Node, ...]] | None
    ) -> fx.Node:
        """What attention ``consumer`` gives for ``query`` where keys and values are those ``held``."""
        region = self.condensing.trained.regions[consumer]
        if held is None:
            nothing = self._call(anchor, _aten.zeros_like.default, query)
            off = int(region.value.meta["val"].shape[-1]) - int(region.query.meta["val"].shape[-1])
            return self._call(anchor, _aten.constant_pad_nd.default, nothing, [0, off]) if off else nothing
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, region.output.args, strict=False)) | dict(region.output.kwargs)
        kept = {name: given[name] for name in ("scale", "enable_gqa") if name in given}
        dropout = given.get("dropout_p", 0.0)
        causal = self.condensing.trained.reads[consumer] == CAUSAL
        maker = self.condensing.trained.regions[self.group[consumer]]
        groups = 1 if given.get("enable_gqa") else region.heads // region.kv_heads
        key, value = (
            self._handed(anchor, node, like.meta["val"].shape, groups, shorter=causal)
            for node, like in zip(held[maker.index], (maker.key, maker.value), strict=True)
        )
        attention = _aten.scaled_dot_product_attention.default
        if causal:
            # The first row reads nothing. Row i + 1 reads rows 0 to i: a triangle again, one row smaller.
            rows = self._call(anchor, _aten.slice.Tensor, query, 2, 1, _END)
            found = self._call(anchor, attention, rows, key, value, None, dropout, True, **kept)
            return self._call(anchor, _aten.constant_pad_nd.default, found, [0, 0, 1, 0])
        mask = self._shown(anchor, region)
        return self._call(anchor, attention, query, key, value, mask, dropout, False, **kept)

    def _handed(
        self, anchor: fx.Node, node: fx.Node, shape: torch.Size, groups: int, *, shorter: bool
    ) -> fx.Node:
        """Keys or values ``node`` of ``shape`` [B, Hkv, S, D], each head ``groups`` times, without the last
        row or behind a row of zeros."""
        made = self.moved.get((node, shorter))
        if made is None and shorter:
            made = self._call(anchor, _aten.slice.Tensor, node, 2, 0, -1)
        elif made is None:
            made = self._call(anchor, _aten.constant_pad_nd.default, node, [0, 0, 1, 0])
        self.moved[node, shorter] = made
        if groups > 1:
            length = shape[2] + (-1 if shorter else 1)
            size = length if isinstance(length, int) else self._call(anchor, _aten.sym_size.int, made, 2)
            apart = self._call(anchor, _aten.unsqueeze.default, made, 2)
            wide = self._call(anchor, _aten.expand.default, apart, [-1, -1, groups, -1, -1])
            sizes = [-1, groups * int(shape[1]), size, int(shape[3])]
            # Heads are repeated for each attention anew, as models do: grouped-attention looks for that.
            made = self._call(anchor, _aten.reshape.default, wide, sizes)
        return made

    def _shown(self, anchor: fx.Node, region: Region) -> fx.Node:
        """The mask [.., S, S + 1] over a row of zeros and all rows: those that the model's shows, but not the
        row itself, and the zeros where it shows no other."""
        (entry,) = region.added
        assert entry.node is not None
        if entry.node not in self.masks:
            before = self._call(anchor, _aten.tril.default, entry.node, -1)
            some = self._call(anchor, _aten.any.dim, before, -1, True)
            none = self._call(anchor, _aten.logical_not.default, some)
            self.masks[entry.node] = self._call(anchor, _aten.cat.default, [none, before], -1)
        return self.masks[entry.node]
