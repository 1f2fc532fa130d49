"""The edits behind packing: make ``p`` of ``x`` in the forward, and of ``p`` what the backward reads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.joint import FORWARD_TAG
from graphopt.edit import Edit
from graphopt_passes.compress_saved.saved import Read, SavedValues

__all__ = ["Rewriter", "held_by_forward"]

_NEAR = 16
"""Readers that are no further apart than so many nodes share what is unpacked for the first."""


class Rewriter:
    """Edits one joint program. ``opaque``: operators run one by one, so that custom ones are called;
    else their references are written out, for a code generator to fuse."""

    def __init__(self, edit: Edit, values: SavedValues, *, opaque: bool) -> None:
        self.edit, self.values, self.opaque = edit, values, opaque
        self._last: dict[fx.Node, fx.Node] = {}

    # --- the forward -----------------------------------------------------------------------

    def after(self, anchor: fx.Node, target: Any, args: Sequence[Any], kwargs: Any = None) -> fx.Node:
        """A call after ``anchor`` and after whatever was put there before."""
        made = self.edit.call_after(self._last.get(anchor, anchor), target, args, kwargs)
        self._last[anchor] = made
        return made

    def pack(
        self, node: fx.Node, anchor: fx.Node, op: Any, reference: Callable[..., Any], *rest: Any
    ) -> list[fx.Node]:
        """What ``op(node, *rest)`` gives, computed right after ``anchor`` by the forward."""
        if self.opaque:
            made = self.after(anchor, op, (node, *rest))
            results = self._elements(made, op, lambda t, a: self.after(anchor, t, a))
        else:
            results = self._traced(
                lambda *tensors: reference(*tensors, *rest),
                [node],
                lambda target, args, kwargs: self.after(anchor, target, args, kwargs),
            )
        return [held_by_forward(result) for result in results]

    def hold(self, node: fx.Node, anchor: fx.Node, op: Any, *rest: Any) -> fx.Node:
        """``op(node, *rest)``, one tensor, computed right after ``anchor`` by the forward."""
        return held_by_forward(self.after(anchor, op, (node, *rest)))

    def hoist(self, node: fx.Node, done: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, fx.Node]:
        """A copy of a backward node, and of what it is made of, in the forward; and the node after
        which it stands."""
        if node.name in self.values.forward:
            return node, node
        if node.op == "placeholder":
            return node, self._last_input()
        if node not in done:
            order = self.values.order
            parts = {source: self.hoist(source, done) for source in node.all_input_nodes}
            anchor = max((at for _, at in parts.values()), key=lambda n: order[n], default=self._last_input())
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: parts[n][0])
            made = self.after(anchor, node.target, args, kwargs)
            made.meta["val"] = node.meta["val"]
            done[node] = made, anchor
        return done[node]

    def viewed_ahead(self, view: fx.Node, start: fx.Node) -> fx.Node:
        """``view`` of ``start``, made right after ``start``."""
        copies = {start: start}
        for step in self.values.path(view, start):
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda n: copies.get(n, n))
            copies[step] = self.after(start, step.target, args, kwargs)
        return copies[view]

    def _last_input(self) -> fx.Node:
        """Calls that read inputs alone stand behind all of them."""
        inputs: list[fx.Node] = self.edit.graph.find_nodes(op="placeholder")
        return inputs[-1]

    # --- the backward ----------------------------------------------------------------------

    def feed(self, start: fx.Node, reads: Sequence[Read], unpack: Callable[[fx.Node], fx.Node]) -> None:
        """Let each of ``reads`` read what ``unpack(anchor)`` makes before it instead of ``start``."""
        order = self.values.order
        previous = -_NEAR - 1
        copies: dict[fx.Node, fx.Node] = {}
        for read in reads:
            if read.view not in read.reader.all_input_nodes:
                continue
            if order[read.reader] - previous > _NEAR:
                copies = {start: unpack(read.reader)}
            previous = order[read.reader]
            read.reader.replace_input_with(read.view, self.viewed(read.view, start, copies, read.reader))

    def viewed(
        self, view: fx.Node, start: fx.Node, copies: dict[fx.Node, fx.Node], anchor: fx.Node
    ) -> fx.Node:
        """``view`` of the copy of ``start``, its views made again before ``anchor``."""
        for step in self.values.path(view, start):
            if step not in copies:
                args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda n: copies.get(n, n))
                copies[step] = self.edit.call_before(anchor, step.target, args, kwargs, replaces=(step,))
                copies[step].meta.pop("partitioner_tag", None)
        return copies[view]

    def unpack(
        self, packed: Sequence[fx.Node], anchor: fx.Node, op: Any, reference: Callable[..., Any], *rest: Any
    ) -> fx.Node:
        """``op(*packed, *rest)`` right before ``anchor``."""
        if self.opaque:
            return self.edit.call_before(anchor, op, (*packed, *rest))
        return self._traced(
            lambda *tensors: reference(*tensors, *rest),
            packed,
            lambda target, args, kwargs: self.edit.call_before(anchor, target, args, kwargs),
        )[0]

    # --- inside ----------------------------------------------------------------------------

    def _elements(self, made: fx.Node, op: Any, call: Callable[..., fx.Node]) -> list[fx.Node]:
        count = len(op._schema.returns)
        if count == 1:
            return [made]
        return [call(operator.getitem, (made, index)) for index in range(count)]

    def _traced(
        self,
        function: Callable[..., Any],
        sources: Sequence[fx.Node],
        call: Callable[[Any, Any, Any], fx.Node],
    ) -> list[fx.Node]:
        """The operators of ATen that ``function`` comes to on ``sources``, each made by ``call``."""
        graph = _torch.traced_like(function, [self.value(source) for source in sources])
        copies: dict[fx.Node, fx.Node] = {}
        inputs = iter(sources)
        for node in graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)
            elif node.op == "output":
                results = node.args[0]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: copies[n])
                copies[node] = call(node.target, args, kwargs)
                copies[node].meta["val"] = node.meta["val"]
        return [copies[result] for result in (results if isinstance(results, (tuple, list)) else [results])]

    def value(self, node: fx.Node) -> torch.Tensor:
        """The value under a node, computed where it is new."""
        if "val" not in node.meta:
            assert callable(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
            like = next(source.meta["val"] for source in node.all_input_nodes)
            node.meta["val"] = _torch.call_on_fakes(like, node.target, args, kwargs)
        found: torch.Tensor = node.meta["val"]
        return found


def held_by_forward(node: fx.Node) -> fx.Node:
    """Tag a node as computed by the forward: no output needs it, the backward does."""
    node.meta["partitioner_tag"] = FORWARD_TAG
    return node
