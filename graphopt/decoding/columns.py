"""Which columns of a projection a value holds, found by pushing their numbers through layout operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from graphopt.decoding.layouts import name_of

__all__ = ["PRODUCTS", "TURNS", "columns_of", "through_layout"]

PRODUCTS = ("linear", "addmm", "mm", "matmul", "bmm")
"""Operators that multiply with a weight."""

TURNS = ("t", "transpose", "permute", "mT", "numpy_T", "alias", "detach")
"""Operators that a weight may pass before it is multiplied with."""

_LAYOUT = {
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "contiguous", "clone", "slice",
    "alias", "_unsafe_view", "select", "split", "split_with_sizes", "chunk", "unbind", "t", "unflatten",
    "flatten", "to", "expand", "narrow",
}  # fmt: skip


def _lays_out(node: fx.Node) -> bool:
    return name_of(node) in _LAYOUT or "getitem" in str(node.target)


def through_layout(node: fx.Node) -> fx.Node:
    """What a value is a view or a part of."""
    while _lays_out(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def columns_of(projection: fx.Node) -> dict[fx.Node, Any]:
    """For one token of one sequence, the numbers of the columns of ``projection`` [.., O] that each value
    holds that is a view or a part of it, in its own layout; a list for what is several values.
    ``projection`` itself comes first, others in order of layout operators."""
    shape = projection.meta["val"].shape
    start = torch.arange(int(shape[-1])).view([1] * (len(shape) - 1) + [-1])
    known: dict[fx.Node, Any] = {projection: start}
    pending = [projection]
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if user in known or not _lays_out(user):
                continue
            value = _moved(user, known)
            if value is not None:
                known[user] = value
                pending.append(user)
    return known


def _moved(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """What a layout operator makes of column numbers, for one token of one sequence."""

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return known.get(value, 1)  # a size: there is one token of one sequence
        return value

    arguments = fx.node.map_aggregate(node.args, plain)
    try:
        return node.target(*arguments)  # type: ignore[operator]
    except (RuntimeError, IndexError, TypeError):
        return None
