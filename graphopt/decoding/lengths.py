"""One graph for sequences of any length, made of graphs that were captured for a few lengths each.

Before, for 5 and 6 tokens::

    view(x, [-1, 5, 4, 16])          view(x, [-1, 6, 4, 16])

After::

    n = sym_size(tokens, 1)          view(x, [-1, n, 4, 16])

Loops over positions are rolled up before (``graphopt.decoding.roll``), so the graphs are alike but for
numbers, and each that differs is ``a * n + b``, which two of them say; that it is so for longer ones is
found out by running them (``graphopt.decoding.check_decoder``). Values are worked out again with the batch
and the length as symbols: where an operator needs to know the length, there is none.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.recurrence import Recurrence, body_form
from graphopt.decoding.roll import where
from graphopt.errors import CaptureError, brief

__all__ = ["lengths_for", "merged"]

aten = torch.ops.aten


def lengths_for(model: torch.nn.Module, batch: int) -> tuple[int, int]:
    """Two lengths, one after another, that are sizes of nothing else that is known of the model."""
    tensors = [*model.parameters(), *model.buffers()]
    taken = {batch, *(size for tensor in tensors for size in tensor.shape)}
    # Five rows: two that begin, two that are alike, and one that only reads what they leave.
    first = next(n for n in range(5, max(taken) + 6) if not taken & {n, n + 1})
    return first, first + 1


def merged(
    graphs: Sequence[fx.Graph],
    lengths: Sequence[int],
    tokens: str,
    weights: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
) -> fx.Graph:
    """The graph of which each of ``graphs``, captured for one of two ``lengths``, is what it is for that
    length. ``tokens``: the placeholder [batch, length]; ``weights`` and ``inputs``: what all placeholders
    stand for. Nodes have fake values whose batch and length are symbols.

    Raises ``CaptureError`` for graphs that differ in another way, and for operators that need the length.
    """
    nodes = [list(graph.nodes) for graph in graphs]
    if len({len(one) for one in nodes}) > 1:
        counts = ", ".join(f"{len(one)} for {length}" for one, length in zip(nodes, lengths, strict=True))
        raise CaptureError(
            f"the program is another one for each length ({counts} tokens, in operators): "
            "positions are taken one "
            "by one in a way that was not recognised as a loop over rows"
        )
    numbers = [{node: index for index, node in enumerate(one)} for one in nodes]
    made: dict[tuple[int, int], Any] = {}
    graph = graphs[-1]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    length: list[fx.Node] = []

    def size(per: int, more: int) -> Any:
        if not length:
            with graph.inserting_before(first):
                found = next(node for node in graph.nodes if node.name == tokens)
                length.append(graph.call_function(aten.sym_size.int, (found, 1)))
        if (per, more) not in made:
            with graph.inserting_before(first):
                node = length[0]
                if per != 1:
                    node = graph.call_function(operator.mul, (node, per))
                made[per, more] = graph.call_function(operator.add, (node, more)) if more else node
        return made[per, more]

    def general(at: tuple[fx.Node, ...], values: tuple[Any, ...]) -> Any:
        kinds = {type(value) for value in values}
        last = values[-1]
        if isinstance(last, fx.Node):
            alike = kinds == {fx.Node} and len({n[v] for n, v in zip(numbers, values, strict=True)}) == 1
            if alike:
                return last
        elif len(kinds) == 1 and isinstance(last, (list, tuple)):
            if len({len(value) for value in values}) == 1:
                return type(last)(general(at, parts) for parts in zip(*values, strict=True))
        elif len(kinds) == 1 and isinstance(last, dict):
            return {key: general(at, tuple(value.get(key) for value in values)) for key in last}
        elif all(value == last for value in values):
            return last
        elif kinds == {int}:
            per = values[1] - values[0]
            return size(per, values[0] - per * lengths[0])
        raise CaptureError(
            f"{where(at[-1])} ({at[-1].target}) is told {', '.join(map(_shown, values))} for "
            f"{', '.join(map(str, lengths))} tokens: how that follows from the length cannot be told"
        )

    for at in zip(*nodes, strict=True):
        if len({node.op for node in at}) > 1 or not _same_target([node.target for node in at]):
            raise CaptureError(
                f"{where(at[-1])} ({at[-1].target}) stands where {at[0].name} ({at[0].target}) "
                "does in the program for "
                f"{lengths[0]} tokens: the model takes other ways for other lengths"
            )
        if at[-1].op in ("call_function", "output"):
            args = general(at, tuple(node.args for node in at))
            kwargs = general(at, tuple(dict(node.kwargs) for node in at))
            at[-1].args, at[-1].kwargs = args, kwargs
    _work_out(graph, weights, inputs)
    graph.lint()
    return graph


def _shown(value: Any) -> str:
    return value.name if isinstance(value, fx.Node) else repr(value)


def _same_target(targets: Sequence[Any]) -> bool:
    if isinstance(targets[0], Recurrence):
        kinds = [
            (body_form(t.body.graph), t.states, t.rows, t.made) if isinstance(t, Recurrence) else None
            for t in targets
        ]
        return all(kind == kinds[0] for kind in kinds)
    placeholders = all(isinstance(target, str) for target in targets)
    return placeholders or all(target is targets[0] for target in targets)


def _work_out(graph: fx.Graph, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
    """Give every node a fake value whose batch and length are symbols."""
    fakes = iter(_torch.symbolic_fakes(weights, inputs))
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = next(fakes)
            tokens = node.meta["val"]
        elif node.op == "call_function":
            given: Any = fx.node.map_arg((node.args, node.kwargs), lambda ref: ref.meta["val"])
            target = node.target.kinds if isinstance(node.target, Recurrence) else node.target
            try:
                node.meta["val"] = _torch.call_on_fakes(tokens, target, *given)
            except Exception as error:
                raise CaptureError(
                    f"{where(node)} does not take sequences of any length: {brief(error)}"
                ) from error
    if not all(_torch.is_symbol(size) for size in tokens.shape):
        raise CaptureError(f"an operator of the model is for {list(map(str, tokens.shape))} tokens alone")
