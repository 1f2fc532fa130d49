"""Copies of gradients that autograd would make when it hands them over, made explicit.

The first gradient of a parameter becomes its ``.grad`` as it is where it is laid out like the parameter and
nobody else has it. Otherwise autograd copies it, and both are there until it has::

    %g = aten.t(%product)                           %g = aten.t(%product)
    return (%g, %sum, %sum)                         %own = aten.clone(%g)
                                                    %own_1 = aten.clone(%sum)
                                                    return (%own, %sum, %own_1)

As operators of the graph they are counted like any other, and what is copied is gone then, rather than when
the whole backward has run. A copy moves no number: gradients stay what they were to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.emit.emitter import Gradients

__all__ = ["own_gradients"]

_aten = torch.ops.aten


def own_gradients(gm: fx.GraphModule, num_outputs: int, gradients: Gradients) -> None:
    """Have every gradient of a parameter in a joint graph be what can become ``.grad``, in place.

    ``num_outputs``: how many results are the forward's; they come first. Nothing is done where all ``.grad``
    are there when a step begins: what is added to them may lie as it likes, and be anybody's.
    """
    if gradients.held:
        return
    inputs, outputs = _torch.describe_joint(gm)
    nodes = {node.name: node for node in gm.graph.nodes}
    # Of a tensor that wraps others, which lie as they like, there are several.
    parts = Counter(index for _, role, index in inputs if role == "input")
    parameters = {
        index: nodes[name].meta.get("val")
        for name, role, index in inputs
        if role == "input" and index in gradients.parameters and parts[index] == 1
    }
    output = gm.graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    taken: set[fx.Node] = set()
    for position, (name, role, index) in enumerate(outputs):
        if position < num_outputs or role != "gradient" or not name:
            continue
        gradient, parameter = nodes[name], parameters.get(index)
        if parameter is None or not all(map(_is_plain, (gradient.meta.get("val"), parameter))):
            continue
        order = _order(parameter)
        if gradient in taken or gradient.op == "placeholder" or not _is_dense(gradient.meta["val"], order):
            results[position] = _copy(gm.graph, gradient, order)
        taken.add(gradient)
    if results != list(output.args[0]):  # type: ignore[arg-type]
        output.args = (tuple(results), *output.args[1:])
        gm.recompile()


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def _order(parameter: torch.Tensor) -> list[int]:
    """Dimensions in the order in which the gradient is to lie, the closest together last: the parameter's,
    and their own where its elements overlap or leave gaps.

    So says ``torch/csrc/autograd/utils/grad_layout_contract.h``.
    """
    strides = [_torch.hint(stride) for stride in parameter.stride()]
    sizes = [_torch.hint(size) for size in parameter.shape]
    order = sorted(range(len(sizes)), key=lambda k: (-strides[k], -sizes[k]))
    return order if _is_dense(parameter, order) else list(range(len(sizes)))


def _is_dense(tensor: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether the elements lie one after the other with dimensions in that order."""
    expected = 1
    for k in reversed(order):
        size = _torch.hint(tensor.shape[k])
        if size != 1 and _torch.hint(tensor.stride()[k]) != expected:
            return False
        expected *= size
    return True


def _copy(graph: fx.Graph, gradient: fx.Node, order: Sequence[int]) -> fx.Node:
    """A copy of a node's value, for no one else, with dimensions in that order in memory."""
    # Behind what it copies: what comes later need not hold it.
    place = gradient.next
    while place.op == "placeholder":
        place = place.next
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (_aten.clone.default, (), {"memory_format": torch.contiguous_format})
    ]
    if list(order) != sorted(order):
        back = sorted(range(len(order)), key=lambda k: order[k])
        steps = [(_aten.permute.default, (list(order),), {}), *steps, (_aten.permute.default, (back,), {})]
    node = gradient
    with graph.inserting_before(place), _torch.fake_mode_of([gradient.meta["val"]]), torch.no_grad():
        for target, args, kwargs in steps:
            source, node = node, graph.call_function(target, (node, *args), kwargs)
            node.meta = {k: v for k, v in gradient.meta.items() if k in ("nn_module_stack", "stack_trace")}
            node.meta["val"] = target(source.meta["val"], *args, **kwargs)
    return node
