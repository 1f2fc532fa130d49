"""Ways to read and write rows of a sequence one by one, brought to one form.

Before::

    a, b, .. = unbind(x, 1)           c = slice(x, 1, 2, 3)
    y = zeros_like(x)                 copy_(select(y, 1, 0), p)    copy_(select(y, 1, 1), q)    ..
    z = cat([u [B, 1, D], v [B, 1, D], ..], 1)

After::

    a = select(x, 1, 0)               c = unsqueeze(select(x, 1, 2), 1)
    y = stack([p, q, ..], 1)          z = stack([squeeze(u, 1), squeeze(v, 1), ..], 1)

What gives back what it is given (``to`` its own dtype, a slice of all) goes, and so do values that are
computed twice: an iteration of a loop may compute again what does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import alias_map, written_inputs
from graphopt.decoding.layouts import name_of
from graphopt.order import has_effect
from graphopt.replay import is_random
from graphopt.rules import argument

__all__ = ["as_rows", "shared"]

aten = torch.ops.aten

_FRESH = (
    "zeros_like",
    "empty_like",
    "ones_like",
    "full_like",
    "zeros",
    "empty",
    "ones",
    "full",
    "new_zeros",
    "new_empty",
)
_LARGEST = 2**63 - 1


def as_rows(graph: fx.Graph, length: int) -> None:
    """Bring all reads and writes of one of ``length`` rows of sequences to the form above, in place."""
    for node in list(graph.nodes):
        if _gives_its_input(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        _numbered(node, length)
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if name_of(node) in _FRESH:
            _laid(node, length, place)
    for node in list(graph.nodes):
        if name_of(node) == "cat":
            _stacked(node, length)


def _gives_its_input(node: fx.Node) -> bool:
    name = name_of(node)
    if name not in ("to", "type_as", "slice", "detach", "alias") or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    if name == "to" and (argument(node, "copy") or argument(node, "memory_format") is not None):
        return False
    if name == "slice":
        start, stop, step = (argument(node, name) for name in ("start", "end", "step"))
        return start in (0, None) and stop in (_LARGEST, None) and step == 1
    return before.dtype is after.dtype and before.device == after.device and before.layout is after.layout


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call before ``like``, of its layer, with its value."""
    with graph.inserting_before(like):
        node = graph.call_function(target, args)
    given: Any = fx.node.map_arg(args, lambda ref: ref.meta["val"])
    tensor = next(s.meta["val"] for s in node.all_input_nodes if isinstance(s.meta["val"], torch.Tensor))
    node.meta["val"] = _torch.call_on_fakes(tensor, target, given, {})
    node.meta["nn_module_stack"] = like.meta.get("nn_module_stack")
    return node


def _swap(node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _along(node: fx.Node, source: fx.Node) -> int:
    return int(argument(node, "dim")) % int(source.meta["val"].dim())


def _numbered(node: fx.Node, length: int) -> None:
    """Reads of single rows as ``select`` with a number from 0 on."""
    graph, name = node.graph, name_of(node)
    if name == "select":
        source: Any = node.args[0]
        dim, index = _along(node, source), argument(node, "index")
        if isinstance(index, int) and source.meta["val"].shape[dim] == length:
            node.args, node.kwargs = (source, dim, index % length), {}
    elif name in ("unbind", "split", "chunk", "split_with_sizes") and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        dim = _along(node, source)
        if source.meta["val"].shape[dim] != length or len(node.meta["val"]) != length:
            return
        for user in list(node.users):
            if user.target is not getitem:
                continue
            row = _call(graph, user, aten.select.int, source, dim, user.args[1])
            if name != "unbind":
                row = _call(graph, user, aten.unsqueeze.default, row, dim)
            _swap(user, row)
    elif name == "slice" and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        dim, start = _along(node, source), argument(node, "start")
        if source.meta["val"].shape[dim] != length or node.meta["val"].shape[dim] != 1 or length == 1:
            return
        if isinstance(start, int) and not any(written_inputs(user) for user in node.users):
            row = _call(graph, node, aten.select.int, source, dim, start % length)
            _swap(node, _call(graph, node, aten.unsqueeze.default, row, dim))


def _laid(root: fx.Node, length: int, place: dict[fx.Node, int]) -> None:
    """New memory whose rows are all written, each once and before anything is read, as rows side by side."""
    graph = root.graph
    writes: dict[int, fx.Node] = {}
    others, dims = [], set()
    for user in root.users:
        (write,) = user.users if len(user.users) == 1 else (None,)
        taken = name_of(user) in ("select", "slice") and user.args[0] is root
        if not taken or write is None or name_of(write) != "copy_" or write.args[0] is not user:
            others.append(user)
            continue
        dim = _along(user, root)
        start = argument(user, "index" if name_of(user) == "select" else "start")
        size = 1 if name_of(user) == "select" else user.meta["val"].shape[dim]
        if root.meta["val"].shape[dim] != length or size != 1 or not isinstance(start, int) or write.users:
            return
        if start % length in writes:
            return
        writes[start % length] = write
        dims.add(dim)
    if len(writes) != length or len(dims) != 1:
        return
    (dim,) = dims
    last = max(writes.values(), key=place.__getitem__)
    if any(place.get(user, 0) < place[last] for user in others):
        return
    rows = []
    for number in range(length):
        write = writes[number]
        view, value = write.args[0], write.args[1]
        assert isinstance(view, fx.Node) and isinstance(value, fx.Node)
        kind = view.meta["val"]
        if value.meta["val"].dtype is not kind.dtype:
            value = _call(graph, write, aten.to.dtype, value, kind.dtype)
        if list(value.meta["val"].shape) != list(kind.shape):
            value = _call(graph, write, aten.expand_as.default, value, view)
        if name_of(view) == "slice":
            value = _call(graph, write, aten.squeeze.dim, value, dim)
        rows.append(value)
    with graph.inserting_after(last):
        made = graph.call_function(aten.stack.default, (rows, dim))
    made.meta["val"], made.meta["nn_module_stack"] = root.meta["val"], last.meta.get("nn_module_stack")
    root.replace_all_uses_with(made, delete_user_cb=lambda user: user in others)
    for write in writes.values():
        view = write.args[0]
        graph.erase_node(write)
        assert isinstance(view, fx.Node)
        if not view.users:
            graph.erase_node(view)


def _stacked(node: fx.Node, length: int) -> None:
    """Rows [.., 1, ..] put one behind another as rows side by side."""
    parts: Any = argument(node, "tensors")
    if not isinstance(parts, Sequence) or len(parts) != length:
        return
    dim = int(argument(node, "dim")) % node.meta["val"].dim()
    if any(
        not isinstance(p, fx.Node) or p.meta["val"].dim() <= dim or p.meta["val"].shape[dim] != 1
        for p in parts
    ):
        return
    rows = [_call(node.graph, node, aten.squeeze.dim, part, dim) for part in parts]
    _swap(node, _call(node.graph, node, aten.stack.default, rows, dim))


def shared(graph: fx.Graph) -> None:
    """Let what is computed twice be computed once, in place; not what is written into, or drawn."""
    aliases = alias_map(graph)
    known: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if (
            node.op != "call_function"
            or has_effect(node)
            or not isinstance(node.meta.get("val"), torch.Tensor)
        ):
            continue
        if aliases.roots[node] & aliases.written or is_random(node):
            continue
        form = f"{node.target} {node.args} {node.kwargs}"
        first = known.setdefault(form, node)
        if first is not node:
            _swap(node, first)
