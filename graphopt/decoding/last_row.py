"""Logits of the last row alone: nobody reads the others while a prompt is taken in.

Before, for a prompt of n tokens and 128,256 words::

    logits [B, n, V] = linear(hidden [B, n, D], head)

After::

    logits [B, 1, V] = linear(hidden[:, -1:], head)

The row is taken as far up as each row is made of the same row of one value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.layouts import name_of

__all__ = ["keep_last_row"]

aten = torch.ops.aten

_ROW_BY_ROW = {
    "linear", "matmul", "add", "sub", "mul", "div", "tanh", "to", "_to_copy", "neg", "clamp", "float",
    "layer_norm", "rms_norm", "dropout", "contiguous", "clone",
}  # fmt: skip


def keep_last_row(graph: fx.Graph, has_length: Callable[[object], bool]) -> None:
    """Change ``graph`` so that it gives its output [B, n, V] for the last of the n rows: [B, 1, V]."""
    output = next(node for node in graph.nodes if node.op == "output")
    (logits,) = output.args[0]
    chain: list[tuple[fx.Node, fx.Node]] = []
    at = logits
    while (source := _source(at, has_length)) is not None:
        chain.append((at, source))
        at = source
    with graph.inserting_before(output):
        row = graph.call_function(aten.slice.Tensor, (at, 1, -1))
        _set_value(row)
        for node, source in reversed(chain):
            row = graph.node_copy(node, lambda ref, s=source, r=row: r if ref is s else ref)  # type: ignore[misc]
            _set_value(row)
    output.args = ((row,),)


def _source(node: fx.Node, has_length: Callable[[object], bool]) -> fx.Node | None:
    """The value whose rows the rows of ``node`` are made of, if one alone depends on the length."""
    if name_of(node) not in _ROW_BY_ROW:
        return None
    if any(user.op != "output" and user.op != "call_function" for user in node.users):
        return None
    longs = [
        ref for ref in node.all_input_nodes
        if isinstance(ref.meta.get("val"), torch.Tensor) and any(map(has_length, ref.meta["val"].shape))
    ]  # fmt: skip
    if len(longs) != 1 or longs[0].op != "call_function" or longs[0] is not node.args[0]:
        return None
    shape = longs[0].meta["val"].shape
    if len(shape) != 3 or not has_length(shape[1]) or has_length(shape[2]):
        return None
    return longs[0]


def _set_value(node: fx.Node) -> None:
    values = fx.node.map_arg((node.args, node.kwargs), lambda ref: ref.meta["val"])
    like = next(value for value in values[0] if isinstance(value, torch.Tensor))
    node.meta["val"] = _torch.call_on_fakes(like, node.target, *values)  # type: ignore[arg-type]
