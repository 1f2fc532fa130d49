"""pack-linears: linear layers that read the same value become one product.

Before::

    %q = aten.linear(%x, %wq)    %k = aten.linear(%x, %wk)    %v = aten.linear(%x, %wv)

After::

    %w = aten.cat([%wq, %wk, %wv])
    %y = aten.linear(%x, %w)
    %p = aten.split_with_sizes(%y, [2048, 512, 512], -1)
    %q = %p[0]    %k = %p[1]    %v = %p[2]

The backward makes the gradient of ``x`` in one product, where it made three and added them up, and the
gradients of the weights in one, of which each parameter is handed its rows. Small products that leave most
of a device idle become part of a larger one. Where the backward needs one result and not those beside it,
that one is copied, so that the others do not wait with it. It costs laying the weights side by side: where
autocast rounds them anyway, next to nothing; else a reading and a writing of them, which large weights do
not earn back.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.structure import Line, line_of
from graphopt.capture.trained import trained_values
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt_passes.pack_linears.price import Pack, ProductTimes
from graphopt_passes.pack_linears.readers import readers_of, waits
from graphopt_passes.pack_linears.siblings import (
    Product,
    difference,
    group_key,
    products,
    refusal,
    runs,
)

__all__ = ["PackLinears"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class PackLinears(Pass):
    """Packs linear layers that read the same value. ``everywhere``: also on devices of which nothing is known
    about how products fill them, priced without it."""

    name: ClassVar[str] = "pack-linears"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "compute linear layers that read the same value in one product"
    after: ClassVar[dict[str, str]] = {
        "normalize": "casts and copies that do nothing hide that layers read the same value",
        "functionalize": "results that are written in place stay apart",
    }
    before: ClassVar[dict[str, str]] = {
        "chunk": "products are cut as they will run",
        "insert-checkpoints": "packed weights wait for the backward or are laid side by side again",
    }

    everywhere: bool = False

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        line = line_of(program.graph)
        trained = trained_values(line) if ctx.mode == "train" else frozenset[fx.Node]()
        times = ProductTimes(ctx.cost)
        by_source: dict[fx.Node, list[Product]] = {}
        others: list[tuple[fx.Node, Reason]] = []
        for found in products(line.nodes):
            if isinstance(found, Product):
                by_source.setdefault(found.source, []).append(found)
            else:
                others.append(found)
        read = [source for source, _ in others]
        for source, reason in others:
            if source in by_source or read.count(source) > 1:
                yield self._missed(reason)
        for siblings in by_source.values():
            if len(siblings) > 1:
                yield from self._of(siblings, line, trained, times, ctx)

    def _of(
        self,
        siblings: Sequence[Product],
        line: Line,
        trained: Set[fx.Node],
        times: ProductTimes,
        ctx: PassContext,
    ) -> Iterator[Proposal]:
        device = times.device
        if not device.multiprocessors and not self.everywhere:
            yield self._missed(
                Reason(f"nothing is known of how products fill {device.name}", _names(siblings))
            )
            return
        groups: dict[Any, list[Product]] = {}
        for product in siblings:
            groups.setdefault(group_key(product, line, trained), []).append(product)
        kinds = list(groups.values())
        for other in kinds[1:]:
            yield self._missed(difference(kinds[0][0], other[0], line, trained))
        nodes = {product.node for product in siblings}
        for group in kinds:
            rows = runs(group, nodes, line, lambda node: ctx.cost.node(node).flops > 0)
            if len(rows) > 1:
                names = (rows[0][0].node.name, rows[1][0].node.name)
                yield self._missed(Reason("other products run in between: results would be held", names))
            for row in rows:
                if len(row) > 1:
                    yield from self._packs(row, line, trained, times, ctx)

    def _packs(
        self,
        row: Sequence[Product],
        line: Line,
        trained: Set[fx.Node],
        times: ProductTimes,
        ctx: PassContext,
    ) -> Iterator[Proposal]:
        taken: list[Product] = []
        width = sum(product.columns for product in row)
        for product in row:
            first = taken[0] if taken else product
            reason = refusal(product, first, taken, width, line, self.name)
            if reason is None:
                taken.append(product)
            else:
                yield self._missed(reason)
        while len(taken) > 1:
            delta, chosen, copied = _best(taken, line, trained, times, ctx)
            names = _names(chosen)
            apply = _packing(names, copied)
            yield Candidate(
                f"{self.name}@{names[0]}", self.name, names, delta, apply, exactness="reassociated"
            )
            taken = [product for product in taken if product not in chosen]
            if delta.seconds >= 0:
                return

    def _missed(self, reason: Reason) -> NearMiss:
        return NearMiss(self.name, reason.nodes[0], 1, 2, reason)


def _names(group: Sequence[Product]) -> tuple[str, ...]:
    return tuple(product.node.name for product in group)


def _best(
    group: Sequence[Product], line: Line, trained: Set[fx.Node], times: ProductTimes, ctx: PassContext
) -> tuple[CostDelta, list[Product], tuple[str, ...]]:
    """Those of the group whose pack gains most, bytes counted: all of them, or the narrowest, and the names
    of results to copy out. Every one saves the same sums of gradients, and costs its weight."""
    ranked = sorted(group, key=lambda product: product.columns)
    priced = []
    for count in range(len(ranked), 1, -1):
        narrow = ranked[:count]
        chosen = [product for product in group if product in narrow]
        pack = _pack(chosen, line, trained, ctx)
        out = [p for p, waits in zip(chosen, pack.waits, strict=True) if waits and times.copies_out(pack)]
        priced.append((times.delta(pack), chosen, _names(out)))
    return max(priced, key=lambda item: times.worth(item[0]))


def _pack(group: Sequence[Product], line: Line, trained: Set[fx.Node], ctx: PassContext) -> Pack:
    first = group[0]
    result = first.node.meta["val"]
    fused = ctx.emit != "eager"
    return Pack(
        rows=math.prod(_torch.hint(size) for size in result.shape[:-1]),
        depth=first.depth,
        columns=tuple(product.columns for product in group),
        copied=tuple(_read_by_library(product.node, line, ctx) for product in group),
        waits=tuple(waits(product.node, line, trained) for product in group),
        stored=first.weight.meta["val"].dtype,
        computed=result.dtype,
        biased=any(product.bias is not None for product in group),
        input_trained=first.node in trained and first.source in trained,
        weights_trained=first.node in trained and first.weight in trained,
        fused=fused,
    )


def _read_by_library(node: fx.Node, line: Line, ctx: PassContext) -> bool:
    """Whether the gradient of a value comes whole out of a library's kernel."""
    readers = readers_of(node, line)
    return len(readers) == 1 and ctx.cost.node(readers[0]).flops > 0


def _packing(names: Sequence[str], copied: Sequence[str]) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        nodes = [edit.node(name) for name in names]
        found = [product for product in products(nodes) if isinstance(product, Product)]
        first = found[0].node
        made: list[fx.Node] = []

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            made.append(edit.call_before(first, target, args, kwargs, replaces=nodes))
            return made[-1]

        weight = call(_aten.cat.default, [product.weight for product in found])
        bias = None
        if any(product.bias is not None for product in found):
            bias = call(_aten.cat.default, [_bias_of(product, found, call) for product in found])
        whole = call(_aten.linear.default, found[0].source, weight, bias)
        sizes = [product.columns for product in found]
        parts = call(_aten.split_with_sizes.default, whole, sizes, -1)
        for index, product in enumerate(found):
            piece = edit.call_before(first, operator.getitem, (parts, index), replaces=(product.node,))
            made.append(piece)
            if product.node.name in copied:
                piece = edit.call_before(
                    first,
                    _aten.clone.default,
                    (piece,),
                    {"memory_format": torch.contiguous_format},
                    replaces=(product.node,),
                )
                made.append(piece)
            edit.replace(product.node, piece)
        for node in made:
            # A region that the model checkpoints itself is one still.
            node.meta.update({key: first.meta[key] for key in _REGION if key in first.meta})

    return apply


_REGION = ("recompute", "ac_graph_id")


def _bias_of(product: Product, group: Sequence[Product], call: Callable[..., fx.Node]) -> fx.Node:
    if product.bias is not None:
        return product.bias
    known = next(other.bias for other in group if other.bias is not None).meta["val"]
    return call(_aten.zeros.default, [product.columns], dtype=known.dtype, device=known.device)
