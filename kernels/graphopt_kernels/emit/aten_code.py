"""Python that calls what a graph calls, one line a node, with nothing but torch imported."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt_kernels.emit.build import NotFusible

__all__ = ["argument_text", "call_text", "identifier", "statements"]


def identifier(name: str) -> str:
    """``name`` as a Python identifier."""
    word = re.sub(r"\W", "_", name)
    return word if word.isidentifier() else f"_{word}"


def argument_text(value: Any, names: Mapping[fx.Node, str]) -> str:
    """An argument of a node as Python. Raises ``NotFusible`` for what no literal stands for."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        items = [argument_text(item, names) for item in value]
        if isinstance(value, list):
            return f"[{', '.join(items)}]"
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, slice):
        return f"slice({', '.join(argument_text(v, names) for v in (value.start, value.stop, value.step))})"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return "device"
    raise NotFusible.because(f"{value!r} ({type(value).__name__}) has no literal")


def call_text(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """A call as a Python expression."""
    args = [argument_text(a, names) for a in node.args]
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    if not isinstance(node.target, torch._ops.OpOverload):
        raise NotFusible.because(f"{node.target} is no operator of ATen")
    args += [f"{name}={argument_text(value, names)}" for name, value in node.kwargs.items()]
    target = node.target
    return f"torch.ops.{target.namespace}.{target._opname}.{target._overloadname}({', '.join(args)})"


def statements(nodes: Sequence[fx.Node], names: dict[fx.Node, str], outputs: Sequence[fx.Node]) -> list[str]:
    """A line for each node, values let go after their last use, then the return of ``outputs`` as a tuple.
    ``names`` takes in the new ones."""
    seen = set(outputs)
    gone: list[list[fx.Node]] = []
    for node in reversed(nodes):
        last = [n for n in dict.fromkeys((*node.all_input_nodes, node)) if n not in seen]
        seen.update(last)
        gone.append(last)
    lines = []
    for node, last in zip(nodes, reversed(gone), strict=True):
        names[node] = identifier(node.name)
        lines.append(f"{names[node]} = {call_text(node, names)}")
        if last:
            lines.append(f"del {', '.join(names[n] for n in last)}")
    inside = ", ".join(names[node] for node in outputs)
    lines.append(f"return ({inside}{',' if len(outputs) == 1 else ''})")
    return lines
