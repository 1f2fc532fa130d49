"""Which values of a graph gradients flow to.

Example values above autograd are detached, so ``meta["val"].requires_grad`` tells of placeholders only.
A part that is compiled alone must be told of activations too, or it would drop their gradients.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from graphopt.capture.aliasing import written_inputs
from graphopt.capture.structure import Line, attribute, is_trained_input
from graphopt.program import tensor_leaves

__all__ = ["trained_values"]


def trained_values(line: Line) -> frozenset[fx.Node]:
    """Values that may require a gradient when the program runs; never too few.

    A value does if it can be differentiated and is made, outside no-grad regions, from one that does.
    A write passes the property on to every view of the memory written; statistics are written without.
    """
    trained: set[fx.Node] = set()
    written: set[fx.Node] = set()
    roots = line.aliases.roots
    for node in line.graph.nodes:
        constant = attribute(line.graph, node) if node.op == "get_attr" else None
        if is_trained_input(node) or (isinstance(constant, torch.Tensor) and constant.requires_grad):
            trained.add(node)
    for i, node in enumerate(line.nodes):
        grad = line.ambient.states[i].grad
        enabled = line.ambient.entry_grad is not False if grad is None else grad
        flows = enabled and any(ref in trained or roots[ref] & written for ref in line.refs[i])
        if not flows or node.target is torch.ops.aten.detach.default:
            continue
        if _differentiable(node):
            trained.add(node)
        written.update(root for ref in written_inputs(node, statistics=False) for root in roots[ref])
    return frozenset(v for v in roots if v in trained or (roots[v] & written and _differentiable(v)))


def _differentiable(node: fx.Node) -> bool:
    return any(t.is_floating_point() or t.is_complex() for t in tensor_leaves(node.meta.get("val")))
