"""Products written as ``einsum``, written out so that attention made of them is found.

Before::

    s = einsum("bqhd,bkhd->bhqk", q, k)

After::

    s = matmul(permute(q, [0, 2, 1, 3]), transpose(permute(k, [0, 2, 1, 3]), -2, -1))

Only those of two values with one contracted label, and one label that each has alone.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.layouts import name_of

__all__ = ["write_einsum_out"]

aten = torch.ops.aten


def write_einsum_out(graph: fx.Graph) -> None:
    """Change every such ``einsum`` of ``graph``."""
    for node in list(graph.nodes):
        if name_of(node) != "einsum" or len(node.args) < 2:
            continue
        labels = _labels(node.args[0])
        operands = node.args[1]
        if labels is None or not isinstance(operands, (list, tuple)) or len(operands) != 2:
            continue
        with graph.inserting_before(node):
            made = _product(graph, labels, operands[0], operands[1])
        if made is not None:
            made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _labels(equation: object) -> tuple[str, str, str] | None:
    """Labels of both operands and of the result, where each is there once and the result is stated."""
    text = str(equation).replace(" ", "")
    given, arrow, result = text.partition("->")
    one, comma, other = given.partition(",")
    parts = one, other, result
    plain = all(part.isalpha() and len(set(part)) == len(part) for part in parts)
    return parts if arrow and comma and plain else None


def _product(graph: fx.Graph, labels: tuple[str, str, str], one: object, other: object) -> fx.Node | None:
    left, right, result = labels
    batch = [label for label in result if label in left and label in right]
    rows = [label for label in result if label in left and label not in right]
    columns = [label for label in result if label in right and label not in left]
    summed = [label for label in left if label in right and label not in result]
    complete = set(left) | set(right) == {*batch, *rows, *columns, *summed}
    if not complete or len(rows) != 1 or len(columns) != 1 or len(summed) != 1:
        return None
    first = _turned(graph, one, left, [*batch, *rows, *summed])
    second = _turned(graph, other, right, [*batch, *columns, *summed])
    product = _call(graph, aten.matmul.default, first, _call(graph, aten.transpose.int, second, -2, -1))
    return _turned(graph, product, "".join([*batch, *rows, *columns]), list(result))


def _turned(graph: fx.Graph, node: object, labels: str, wanted: list[str]) -> fx.Node:
    order = [labels.index(label) for label in wanted]
    assert isinstance(node, fx.Node)
    if order == list(range(len(order))):
        return node
    if order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
        return _call(graph, aten.transpose.int, node, -2, -1)
    return _call(graph, aten.permute.default, node, order)


def _call(graph: fx.Graph, target: object, *args: object) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    like = next(value for value in values if isinstance(value, torch.Tensor))
    node.meta["val"] = _torch.call_on_fakes(like, target, values, {})  # type: ignore[arg-type]
    return node
