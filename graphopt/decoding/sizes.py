"""Sizes that passes wrote into a graph as symbols, computed from its inputs.

Before, ``s0`` being what tracing called the batch::

    reshape(x, [s0, s1, 64])

After::

    reshape(x, [sym_size(tokens, 0), sym_size(tokens, 1), 64])

A graph that is compiled again would find out by itself; one that runs as it is would take the sizes of the
example that was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch

__all__ = ["compute_sizes"]

aten = torch.ops.aten


def compute_sizes(graph: fx.Graph, inputs: Sequence[fx.Node]) -> None:
    """Replace symbols among arguments by what computes them from ``inputs``, tokens [batch, length] and
    others whose sizes are symbols. Raises ``ValueError`` for a size that is neither of those nor a sum of
    products of them."""
    sizes: dict[str, fx.Node] = {}
    first = next(node for node in graph.nodes if node.op == "call_function")

    def leaf(symbol: Any) -> fx.Node:
        if not sizes:
            with graph.inserting_before(first):
                for given in inputs:
                    for dim, size in enumerate(given.meta["val"].shape):
                        if str(size) in sizes or not isinstance(size, torch.SymInt):
                            continue
                        node = graph.call_function(aten.sym_size.int, (given, dim))
                        node.meta["val"] = size
                        sizes[str(size)] = node
        if str(symbol) not in sizes:
            raise ValueError(f"the size {symbol} is not one of the inputs'")
        return sizes[str(symbol)]

    def combine(function: Callable[..., Any], one: Any, other: Any) -> fx.Node:
        return graph.call_function(function, (one, other))

    for node in list(graph.nodes):
        if node.op != "call_function" or not _symbols_in((node.args, node.kwargs)):
            continue
        with graph.inserting_before(node):
            node.args = _replaced(node.args, leaf, combine)
            node.kwargs = _replaced(dict(node.kwargs), leaf, combine)


def _symbols_in(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_symbols_in, value))
    if isinstance(value, dict):
        return any(map(_symbols_in, value.values()))
    return isinstance(value, torch.SymInt)


def _replaced(value: Any, leaf: Any, combine: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(item, leaf, combine) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, leaf, combine) for key, item in value.items()}
    return _torch.size_from(value, leaf, combine) if isinstance(value, torch.SymInt) else value
