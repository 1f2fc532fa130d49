"""A group of operators in terms of those that kernels are made of.

Composite operators (a layer norm, an activation and its gradient, a softmax) are taken apart by torch's own
decompositions, until nothing is left but what ``build`` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt_kernels.emit.build import NotFusible, is_supported

__all__ = ["expanded", "group_graph"]

_QUADRATIC = (torch.ops.aten.cumsum, torch.ops.aten.cumprod)
"""Scans, whose decomposition is a masked sum of everything before each element."""


def expanded(graph: fx.Graph) -> fx.Graph:
    """The graph of a group (placeholders, ATen operators, a tuple of outputs; fake tensors in
    ``meta["val"]``) in supported operators alone, with fake tensors of its own. Raises ``NotFusible``."""
    for node in graph.nodes:
        if getattr(node.target, "overloadpacket", None) in _QUADRATIC:
            raise NotFusible.because(f"{node.target} has no Triton expression")
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    module = fx.GraphModule(torch.nn.Module(), graph)
    try:
        made = _torch.decomposed(module, values, is_supported)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFusible.because(f"no decomposition: {line}") from error
    for node in made.nodes:
        if node.op == "call_function" and not is_supported(node.target) and not _only_taken_apart(node):
            raise NotFusible.because(f"{node.target} has no Triton expression")
    _lay_out(made, graph)
    return made


def _lay_out(made: fx.Graph, graph: fx.Graph) -> None:
    """Give the results of ``made`` the strides that those of ``graph`` have: whoever reads them goes by
    these, and a decomposition may well give others (``select_backward``: those of its gradient)."""
    ends = [next(node for node in reversed(g.nodes) if node.op == "output") for g in (made, graph)]
    (results, wanted) = (list(end.args[0]) for end in ends)
    for k, (result, other) in enumerate(zip(results, wanted, strict=True)):
        value, layout = result.meta["val"], other.meta["val"]
        if isinstance(value, torch.Tensor) and _steps(value) != _steps(layout):
            with made.inserting_before(ends[0]):
                results[k] = made.call_function(torch.ops.aten.clone.default, (result,))
            results[k].meta["val"] = layout
    ends[0].args = (tuple(results),)


def _steps(tensor: torch.Tensor) -> list[int]:
    """Strides of the dimensions that have more than one element: others say nothing."""
    return [int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]


def _only_taken_apart(node: fx.Node) -> bool:
    """An operator of several results, each of which has an expression of its own (``aten.var_mean``)."""
    return node.target is torch.ops.aten.var_mean.correction


def group_graph(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph of ``nodes`` alone that gives ``outputs``, and what it takes from outside, in order.

    Names are those of the operators, numbered: groups alike give graphs alike, and so one kernel.
    """
    graph = fx.Graph()
    inside = set(nodes)
    copies: dict[fx.Node, fx.Node] = {}
    inputs = [n for n in dict.fromkeys(i for node in nodes for i in node.all_input_nodes) if n not in inside]
    for number, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"in{number}")
        copies[node].meta = {"val": node.meta["val"]}
    for node in nodes:
        args = fx.node.map_arg(node.args, lambda n: copies[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: copies[n])
        name = str(getattr(node.target, "_opname", "item")).strip("_")
        copy = graph.create_node(node.op, node.target, args, kwargs, name=f"{name}_0")
        copy.meta = {"val": node.meta["val"]}
        copies[node] = copy
    result: Any = tuple(copies[node] for node in outputs)
    graph.output(result)
    return graph, inputs
