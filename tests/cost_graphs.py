"""Graphs with metadata, for the tests of the cost model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["call_node", "call_nodes", "only", "traced"]


def traced(function: Callable[..., Any], *inputs: Any, symbolic: bool = False) -> fx.Graph:
    """ATen graph of ``function`` on the given inputs, nodes carrying fake tensors."""
    mode = "symbolic" if symbolic else "fake"
    return make_fx(function, tracing_mode=mode)(*inputs).graph


def call_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def only(graph: fx.Graph, target: Any) -> fx.Node:
    """The one node of ``graph`` that calls an overload of the operator ``target``."""
    found = [node for node in call_nodes(graph) if getattr(node.target, "overloadpacket", None) is target]
    assert len(found) == 1, [str(node.target) for node in call_nodes(graph)]
    return found[0]


def call_node(target: Any, args: tuple[Any, ...], out: torch.Tensor, **kwargs: Any) -> fx.Node:
    """A node that calls ``target``; tensors, also within lists, become placeholders with metadata."""
    graph = fx.Graph()

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"input_{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    node = graph.call_function(target, tuple(placed(arg) for arg in args), kwargs)
    node.meta["val"] = out
    return node
