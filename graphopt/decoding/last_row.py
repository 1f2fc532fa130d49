"""A step that gives the last row alone computes the others only where keys and values are made of them.

Before, for a prompt of n tokens, the last attention having four heads::

    y [B, n, D] = add(x, linear(attend(q [B, 4, n, W], k, v, ..), wo))
    logits [B, n, V] = linear(mlp(norm(y)), head)

After::

    y [B, 1, D] = add(x[:, -1:], linear(attend(q [B, 4, 1, W], k, v, ..), wo))
    logits [B, 1, V] = linear(mlp(norm(y)), head)

Outside of attention each row is made of the same row of other values, which decoding builds on everywhere and
``graphopt.decoding.check`` compares. So what nothing but the last row of the logits is made of is computed
for that row. Attentions behind the last one that makes keys of its own do not see the prompt at all (layers
that read another's keys, arXiv 2405.05254; those whose keys are made of an early stream, arXiv 2410.03960).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import Aliases, alias_map, written_inputs
from graphopt.decoding.capture import Uncached
from graphopt.decoding.dead import remove_dead
from graphopt.decoding.insert import StepGraph
from graphopt.decoding.recurrence import Recurrence
from graphopt.decoding.sites import Site
from graphopt.packing.scheme import operator_named

__all__ = ["last_row"]

aten = torch.ops.aten


def last_row(step: StepGraph, uncached: Uncached, sites: Sequence[Site]) -> StepGraph:
    """``step``, which gives logits [B, n, V], for the last of its n rows: logits [B, 1, V]. The graph is
    changed in place."""
    graph = step.gm.graph
    attending = _attentions(graph, sites)
    _Rows(graph, attending, uncached).narrow()
    remove_dead(graph)
    graph.lint()
    step.gm.recompile()
    return step


def _attentions(graph: fx.Graph, sites: Sequence[Site]) -> dict[fx.Node, bool]:
    """Calls of stores' operators, and whether they take queries of the last row alone."""
    stores = {operator_named(site.store.attend_op): site.store.last_alone for site in sites}
    return {node: stores[node.target] for node in graph.nodes if node.target in stores}


class _Rows:
    """Which values are needed of all rows and which of the last one."""

    def __init__(self, graph: fx.Graph, attending: Mapping[fx.Node, bool], uncached: Uncached) -> None:
        self.graph, self.attending, self.uncached = graph, attending, uncached
        self.aliases: Aliases = alias_map(graph)
        self.output = next(node for node in graph.nodes if node.op == "output")
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        self.sliced: dict[fx.Node, fx.Node] = {}

    def narrow(self) -> None:
        """Change the graph."""
        last = self._of_the_last_row()
        for node in self.nodes:
            if node in last:
                self._narrow(node, last)
        (logits,) = self.output.args[0]
        if logits not in last:
            self.output.args = ((self._row_of(logits, self.output),),)

    def _of_the_last_row(self) -> set[fx.Node]:
        """Nodes that nothing but the last row needs, and that can be made of last rows."""
        held: set[fx.Node] = set()
        while True:
            every = self._of_all_rows(held)
            last = {node for node in self.nodes if node not in every}
            # What cannot be made of last rows is computed for all, and with it what it is made of.
            stuck = {node for node in last if not self._can_be_narrowed(node, last)}
            if not stuck:
                return last
            held |= stuck

    def _of_all_rows(self, held: set[fx.Node]) -> set[fx.Node]:
        every: set[fx.Node] = set()

        def need(node: fx.Node) -> None:
            # Memory is needed as a whole: what writes into it is asked by what it wrote into.
            every.update((node, *self.aliases.roots.get(node, ())))

        for node in reversed(self.nodes):
            written = [root for one in written_inputs(node) for root in self.aliases.roots[one]]
            if node in self.attending:
                # That its store is read says nothing of what it gives.
                asked = not self.attending[node]
            else:
                asked = any(root in every or root.op == "placeholder" for root in written)
            if node in held or asked or isinstance(node.target, Recurrence):
                # A recurrence makes its last row of all the others.
                need(node)
            if node in self.attending:
                # Keys and values of all rows are kept, whoever asks for what.
                takes_last = self.attending[node] and node not in every
                query: Any = node.args[0]
                for source in node.all_input_nodes:
                    if not (takes_last and source is query) or query in node.args[1:3]:
                        need(source)
            elif node in every:
                for source in node.all_input_nodes:
                    need(source)
        return every

    def _can_be_narrowed(self, node: fx.Node, last: set[fx.Node]) -> bool:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes = [size for size in value.shape if self.uncached.has_length(size)]
            if len(sizes) > 1 or not all(map(self.uncached.follows_length, sizes)):
                # Other rows than the step's, as of what was padded, or rows by rows.
                return False
        sources: Sequence[fx.Node] = node.all_input_nodes
        if node in self.attending:
            sources = [node.args[0]] if isinstance(node.args[0], fx.Node) else []
        return all(source in last or self._is_known(source) for source in sources)

    def _is_known(self, source: fx.Node) -> bool:
        """Whether the last row of a value that all rows of are made can be told, or it has no rows."""
        value = source.meta.get("val")
        if isinstance(value, torch.Tensor):
            return self._dimension(value) is not None
        if isinstance(value, torch.SymInt):
            return self.uncached.is_length(value) or not self.uncached.has_length(value)
        return not isinstance(value, (list, tuple))

    def _dimension(self, value: torch.Tensor) -> int | None:
        """The dimension of rows, -1 where there are none, ``None`` where rows are mixed with other things."""
        found = [dim for dim, size in enumerate(value.shape) if self.uncached.has_length(size)]
        if not found:
            return -1
        return found[0] if len(found) == 1 and self.uncached.is_length(value.shape[found[0]]) else None

    def _narrow(self, node: fx.Node, last: set[fx.Node]) -> None:
        def row(source: fx.Node) -> Any:
            return source if source in last else self._row_of(source, node)

        if node in self.attending:
            node.update_arg(0, row(node.args[0]))  # type: ignore[arg-type]
        else:
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), row)
            if node.target is aten.view.default and not self._is_written(node):
                # Rows that were taken out of others may not lie as a view wants them.
                node.target = aten.reshape.default
        _set_value(node)

    def _is_written(self, node: fx.Node) -> bool:
        return bool(self.aliases.roots.get(node, frozenset((node,))) & self.aliases.written)

    def _row_of(self, source: fx.Node, user: fx.Node) -> Any:
        """The last row of a value, or the number of rows."""
        value = source.meta.get("val")
        if isinstance(value, torch.SymInt):
            return 1 if self.uncached.is_length(value) else source
        dim = self._dimension(value) if isinstance(value, torch.Tensor) else -1
        if dim is None or dim < 0:
            return source
        if source not in self.sliced:
            with self.graph.inserting_before(user):
                made = self.graph.call_function(aten.slice.Tensor, (source, dim, -1))
            if stack := source.meta.get("nn_module_stack"):
                made.meta["nn_module_stack"] = stack
            _set_value(made)
            self.sliced[source] = made
        return self.sliced[source]


def _set_value(node: fx.Node) -> None:
    given: Any = fx.node.map_arg((node.args, node.kwargs), lambda ref: ref.meta["val"])
    like = node.meta.get("val")
    if not isinstance(like, torch.Tensor):
        values = (ref.meta["val"] for ref in node.all_input_nodes)
        like = next((value for value in values if isinstance(value, torch.Tensor)), None)
    if like is None:
        # Sizes of sizes.
        target: Any = node.target
        node.meta["val"] = target(*given[0], **given[1])
        return
    node.meta["val"] = _torch.call_on_fakes(like, node.target, *given)  # type: ignore[arg-type]
