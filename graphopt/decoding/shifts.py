"""Sequences that are moved by whole rows, as recurrences: each row takes over what the rows before it were.

Before, of x [B, S, D]::

    pad(x, [0, 0, 1, -1])        slice(pad(x, [0, 0, 1, 0]), 1, 0, S)        cat([z [B, 1, D], slice(x, 1,
    0, -1)], 1)

After::

    y, h = recurrence([full_like(select(x, 1, 0), 0.0)], [x], [])            body: h, x -> x, h
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.layouts import name_of
from graphopt.decoding.recurrence import Recurrence
from graphopt.rules import argument

__all__ = ["shifts_as_recurrences"]

aten = torch.ops.aten

_LARGEST = 2**63 - 1
_MOST = 8
"""Sequences that are moved by more rows are left: each is a state of its own."""


def shifts_as_recurrences(graph: fx.Graph, length: torch.SymInt) -> None:
    """Write shifts of sequences, whose number of rows is ``length``, as recurrences, in place."""
    for node in list(graph.nodes):
        found = _shift(node, length)
        if found is not None:
            _replace(node, *found)


def _shift(node: fx.Node, length: torch.SymInt) -> tuple[fx.Node, int, list[Any]] | None:
    """What ``node`` moves, along which dimension, and what comes first: a number, or a node's row."""
    name = name_of(node)
    if name in ("pad", "constant_pad_nd"):
        moved = _padded(node, length)
        return moved[:3] if moved is not None and moved[3] == -len(moved[2]) else None
    if name == "slice" and name_of(source := _under(node.args[0])) in ("pad", "constant_pad_nd"):
        moved = _padded(source, length)
        if moved is None or moved[3] != 0 or not _is_front(node, moved[1], length):
            return None
        return moved[:3]
    if name == "cat":
        return _put_behind(node, length)
    return None


def _takes_some(node: fx.Node) -> bool:
    """Whether a slice takes less than all there is."""
    return argument(node, "start") not in (0, None) or argument(node, "end") not in (_LARGEST, None)


def _under(node: Any) -> Any:
    """What slices of everything are slices of."""
    while name_of(node) == "slice" and not _takes_some(node) and argument(node, "step") == 1:
        node = node.args[0]
    return node


def _padded(node: fx.Node, length: torch.SymInt) -> tuple[fx.Node, int, list[Any], int] | None:
    """A sequence with rows of one number in front of it, and how many are behind it."""
    source, pads = node.args[0], node.args[1]
    if not isinstance(source, fx.Node) or not isinstance(pads, (list, tuple)):
        return None
    if name_of(node) == "pad" and argument(node, "mode") != "constant":
        return None
    pairs = list(zip(pads[::2], pads[1::2], strict=True))
    dims = [at for at, pair in enumerate(pairs) if pair != (0, 0)]
    if len(dims) != 1 or not all(isinstance(number, int) for number in pairs[dims[0]]):
        return None
    dim = source.meta["val"].dim() - 1 - dims[0]
    front, behind = pairs[dims[0]]
    if not 0 < front <= _MOST or not _torch.is_same_size(source.meta["val"].shape[dim], length):
        return None
    return source, dim, [argument(node, "value") or 0.0] * front, behind


def _is_front(node: fx.Node, dim: int, length: torch.SymInt) -> bool:
    """Whether a slice takes as many rows as the sequence has, from the first one on."""
    value = node.meta["val"]
    along = int(argument(node, "dim")) % value.dim() == dim
    starts = argument(node, "start") in (0, None) and argument(node, "step") == 1
    return along and starts and _torch.is_same_size(value.shape[dim], length)


def _put_behind(node: fx.Node, length: torch.SymInt) -> tuple[fx.Node, int, list[Any]] | None:
    parts: Any = argument(node, "tensors")
    dim = int(argument(node, "dim")) % node.meta["val"].dim()
    if len(parts) != 2 or not _torch.is_same_size(node.meta["val"].shape[dim], length):
        return None
    first, rest = parts
    rest = rest if name_of(rest) != "slice" or _takes_some(rest) else rest.args[0]
    source = _under(rest.args[0]) if name_of(rest) == "slice" else None
    count = first.meta["val"].shape[dim]
    if not isinstance(source, fx.Node) or not isinstance(count, int) or not 0 < count <= _MOST:
        return None
    along = int(argument(rest, "dim")) % node.meta["val"].dim() == dim
    starts = argument(rest, "start") in (0, None) and argument(rest, "step") == 1
    if not along or not starts or not _torch.is_same_size(source.meta["val"].shape[dim], length):
        return None
    return source, dim, [(first, number) for number in range(count)]


def _replace(node: fx.Node, source: fx.Node, dim: int, before: list[Any]) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        made = source
        # The last of what comes first is nearest to the sequence: it is put in front of it first.
        for row in reversed(before):
            if isinstance(row, tuple):
                initial = _call(graph, node, aten.select.int, row[0], dim, row[1])
            else:
                first = _call(graph, node, aten.select.int, source, dim, 0)
                initial = _call(graph, node, aten.full_like.default, first, row)
            shift = Recurrence(_taking_turns(), 1, (dim,), (dim,))
            moved = _call(graph, node, shift, [initial], [made], [])
            made = graph.call_function(getitem, (moved, 0))
            made.meta["val"] = moved.meta["val"][0]
            made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _taking_turns() -> fx.GraphModule:
    graph = fx.Graph()
    state, row = graph.placeholder("state"), graph.placeholder("row")
    graph.output((row, state))
    return fx.GraphModule(torch.nn.Module(), graph)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call of the layer of ``like``, with its value."""
    node = graph.call_function(target, args)
    given: Any = fx.node.map_arg(args, lambda ref: ref.meta["val"])
    tensor = next(s.meta["val"] for s in node.all_input_nodes if isinstance(s.meta["val"], torch.Tensor))
    kinds = target.kinds if isinstance(target, Recurrence) else target
    node.meta["val"] = _torch.call_on_fakes(tensor, kinds, given, {})
    node.meta["nn_module_stack"] = like.meta.get("nn_module_stack")
    return node
