"""Storage-level alias analysis: which outputs of a node are new memory and which are views."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from operator import is_
from types import MappingProxyType
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.program import tensor_leaves

__all__ = ["Leaf", "value_table"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor that a node yields. ``bytes`` is its whole storage's.

    ``alias`` is ``None`` for new memory, else (node, leaf index) whose storage it shares. Only
    direct inputs and earlier leaves of the same node count: a node that is run again yields new
    memory even though both runs share one fake tensor.
    """

    bytes: int
    alias: tuple[str, int] | None


_KNOWN = "_graphopt_values"
"""The attribute of a graph that holds its last table and all that it was made from: both hold the graph's
nodes, so that they may live no longer than it does."""


def value_table(graph: fx.Graph) -> Mapping[str, tuple[Leaf, ...]]:
    """Leaves of every node of a graph whose nodes carry ``meta["val"]``.

    Placeholders that share a storage (tied weights, views passed in) alias the first of them.
    """
    # Many ask for it while a graph stays as it is, and to make it takes a hundred times as long as to look.
    made_from: list[Any] = []
    for node in graph.nodes:
        made_from += (node, node.name, node.target, node.args, node.meta.get("val"))
    known: tuple[list[Any], Mapping[str, tuple[Leaf, ...]]] | None = getattr(graph, _KNOWN, None)
    if known is None or len(known[0]) != len(made_from) or not all(map(is_, known[0], made_from)):
        known = made_from, MappingProxyType(_value_table(graph))
        setattr(graph, _KNOWN, known)
    return known[1]


def _value_table(graph: fx.Graph) -> dict[str, tuple[Leaf, ...]]:
    table: dict[str, tuple[Leaf, ...]] = {}
    graph_inputs: dict[int, tuple[str, int]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        seen: dict[int, tuple[str, int]] = {}
        if node.op in ("placeholder", "get_attr"):
            seen = graph_inputs
        else:
            for source in node.all_input_nodes:
                for index, tensor in enumerate(tensor_leaves(source.meta.get("val"))):
                    seen.setdefault(_storage_key(tensor), (source.name, index))
        leaves = []
        base = _base_of_view(node)
        for index, tensor in enumerate(tensor_leaves(node.meta.get("val"))):
            key = _storage_key(tensor)
            alias = seen.get(key)
            if alias is None and base is not None and table[base.name]:
                # Common subexpressions were merged: the fake tensor is a view of the one dropped.
                alias = (base.name, 0)
            size = _storage_bytes(tensor)
            if _keeps_layout(node):
                size = max(size, table[node.args[0].name][0].bytes)
            size = max(size, _summed_bytes(node))
            leaves.append(Leaf(size, alias))
            seen.setdefault(key, (node.name, index))
        table[node.name] = tuple(leaves)
    return table


def _base_of_view(node: fx.Node) -> fx.Node | None:
    """The input that an operator always returns a view of, by its schema; ``None`` for others.

    Composite operators (``reshape``, ``contiguous``) promise a view and may copy, so they are others.
    """
    schema = _torch.schema_of(node.target)
    if schema is None or len(schema.returns) != 1 or _torch.is_composite(node.target):
        return None
    promised = schema.returns[0].alias_info
    if promised is None or promised.is_write:
        return None
    for argument, value in zip(schema.arguments, node.args, strict=False):
        info = argument.alias_info
        if info is not None and info.before_set == promised.before_set and isinstance(value, fx.Node):
            return value
    return None


def _keeps_layout(node: fx.Node) -> bool:
    """Whether a call copies the whole storage of its first argument, view or not.

    Fake tensors do not always say so: a shape that was seen before comes with the least storage.
    """
    return getattr(node.target, "overloadpacket", None) in _KEEPING_LAYOUT and isinstance(
        node.args[0], fx.Node
    )


_KEEPING_LAYOUT = {
    torch.ops.aten.copy,
    torch.ops.aten.slice_scatter,
    torch.ops.aten.select_scatter,
    torch.ops.aten.diagonal_scatter,
    torch.ops.aten.as_strided_scatter,
}


def _summed_bytes(node: fx.Node) -> int:
    """Bytes of a loss before it was summed up, where its kernel puts the sum in the first of them: the
    storage stays as it was (``aten/src/ATen/native/Loss.cpp``). 0 for others."""
    if getattr(node.target, "overloadpacket", None) not in _SUMMED_IN_PLACE:
        return 0
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("reduction", 1) == 0:
        return 0
    one, other = (given[name].meta["val"] for name in names[:2])
    sizes = [[_torch.hint(size) for size in reversed(side.shape)] for side in (one, other)]
    count = math.prod(map(max, zip_longest(*sizes, fillvalue=1)))
    return count * max(int(side.dtype.itemsize) for side in (one, other))


_SUMMED_IN_PLACE = {
    torch.ops.aten.mse_loss,
    torch.ops.aten.smooth_l1_loss,
    torch.ops.aten.soft_margin_loss,
    torch.ops.aten.binary_cross_entropy,
}


def _storage_key(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def _storage_bytes(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided:
        return _torch.hint(tensor.element_size() * tensor.numel())
    return _torch.hint(tensor.untyped_storage().nbytes())
