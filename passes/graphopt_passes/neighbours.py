"""What stands around a call, through views: which of it a code generator would make one kernel with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx

from graphopt.emit.fusion import Kind, kind_of

__all__ = ["is_generated", "readers"]

_aten = torch.ops.aten

_COMPOSED = frozenset(
    {_aten.to.dtype, _aten.type_as.default, _aten.dropout.default, _aten.layer_norm.default,
     _aten.rms_norm.default, _aten.softmax.int, _aten.log_softmax.int}
)  # fmt: skip
"""Operators of the semantic level that are elementwise or reductions below it."""


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """Calls that read ``node`` or a view of it."""
    for user in node.users:
        if user.op == "call_function" and _is_view(user):
            yield from readers(user)
        else:
            yield user


def is_generated(node: fx.Node) -> bool:
    """Whether a code generator makes the kernel of a call, or of what it is a view of, so that it may be one
    with its neighbours."""
    while node.op == "call_function" and _is_view(node):
        node = node.all_input_nodes[0]
    if node.op != "call_function":
        return False
    return node.target in _COMPOSED or kind_of(node, "cuda") is not Kind.LIBRARY


def _is_view(node: fx.Node) -> bool:
    return bool(node.all_input_nodes) and kind_of(node, "cuda") is Kind.VIEW
