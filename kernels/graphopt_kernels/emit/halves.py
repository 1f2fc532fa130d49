"""A lowered half as a Python function: calls of kernels and of ATen, each value let go after its last use."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt.program import Program, layer_of
from graphopt.replay import is_random_state, random_state_of
from graphopt_kernels.emit.aten_code import argument_text, call_text, identifier
from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.groups import Grouping, grouped, is_free
from graphopt_kernels.emit.kernel_file import Kernel

__all__ = ["Half", "half_of"]


@dataclass(frozen=True)
class Half:
    """``text``: the function ``name(k, device, values)``; it empties the list ``values``. ``operators``:
    those that
    are not torch's. ``calls``: calls of ATen that are no views. ``random``: whether it draws random numbers,
    ``replays``: whether under an earlier state of the generator."""

    name: str
    text: str
    grouping: Grouping
    operators: frozenset[str]
    calls: int
    random: bool
    replays: bool


def half_of(program: Program, name: str, names: Mapping[str, str]) -> Half:
    """The function of one half. ``names``: what inputs are to be called. Raises ``NotFusible`` for a call
    that cannot be written down."""
    grouping = grouped(program.graph)
    return _Writer(program, name, names, grouping).written()


class _Writer:
    def __init__(self, program: Program, name: str, names: Mapping[str, str], grouping: Grouping) -> None:
        self._program, self._name, self._grouping = program, name, grouping
        self._names: dict[fx.Node, str] = {}
        self._taken: set[str] = {"k", "device", "values", "torch"}
        for node in program.graph.nodes:
            wanted = names.get(node.name, node.name)
            self._names[node] = self._unique(identifier(wanted))
        self._operators: set[str] = set()
        self._calls = 0
        self._random = self._replays = False

    def _unique(self, name: str) -> str:
        found, number = name, 1
        while found in self._taken:
            found, number = f"{name}_{number}", number + 1
        self._taken.add(found)
        return found

    def written(self) -> Half:
        graph = self._program.graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        (output,) = [node for node in graph.nodes if node.op == "output"]
        results: list[Any] = list(
            torch.utils._pytree.tree_leaves(output.args[0], is_leaf=lambda v: v is None)
        )
        steps = self._steps(results)
        frees = _last_uses(steps, inputs, [r for r in results if isinstance(r, fx.Node)])
        lines = [f"def {self._name}(k, device, values):"]
        if inputs:
            left = ", ".join(self._names[node] for node in inputs)
            lines += [f"    {left}{',' if len(inputs) == 1 else ''} = values"]
        lines += ["    values.clear()"]
        layer = ""
        for step, gone in zip(steps, frees, strict=True):
            here = step.layer
            if here and here != layer:
                lines += [f"    # {here}"]
                layer = here
            lines.append(f"    {step.text}")
            if gone:
                lines.append(f"    del {', '.join(self._names[node] for node in gone)}")
        inside = ", ".join(self._names[r] if isinstance(r, fx.Node) else repr(r) for r in results)
        lines.append(f"    return [{inside}]")
        return Half(
            self._name,
            "\n".join(lines) + "\n",
            self._grouping,
            frozenset(self._operators),
            self._calls,
            self._random,
            self._replays,
        )

    def _steps(self, results: Sequence[Any]) -> list[_Step]:
        """Kernels and calls in an order that every value is there for."""
        kernel_of = {
            node: kernel for kernel in self._grouping.kernels for node in kernel.nodes if not is_free(node)
        }
        calls = [n for n in self._program.graph.nodes if n.op in ("call_function", "get_attr")]
        place = {node: number for number, node in enumerate(calls)}
        done: set[fx.Node] = {n for n in self._program.graph.nodes if n.op == "placeholder"}
        steps: list[_Step] = []
        emitted: set[int] = set()

        def need(node: fx.Node) -> None:
            # Deep graphs would exhaust the stack of a recursion.
            stack = [node]
            while stack:
                top = stack[-1]
                if top in done:
                    stack.pop()
                    continue
                kernel = kernel_of.get(top)
                sources = kernel.inputs if kernel is not None else tuple(top.all_input_nodes)
                waiting = [source for source in sources if source not in done]
                if waiting:
                    stack += waiting
                    continue
                stack.pop()
                if kernel is None:
                    done.add(top)
                    steps.append(self._call(top))
                elif id(kernel) not in emitted:
                    emitted.add(id(kernel))
                    done.update(node for node in kernel.nodes if not is_free(node))
                    steps.append(self._launch(kernel))

        last = {
            max((n for n in k.nodes if not is_free(n)), key=place.__getitem__) for k in self._grouping.kernels
        }
        for node in calls:
            # Views are made when they are read; a kernel runs where the last of its operators did, or earlier
            # where its results are read.
            if not is_free(node) and (node not in kernel_of or node in last):
                need(node)
        for node in results:
            if isinstance(node, fx.Node):
                need(node)
        return steps

    def _launch(self, kernel: Kernel) -> _Step:
        names = [self._names[node] for node in kernel.outputs]
        left = ", ".join(names) + ("," if len(names) == 1 else "")
        arguments = ", ".join(self._names[node] for node in kernel.inputs) or "device"
        layer = ", ".join(kernel.layers[:3]) + (", ..." if len(kernel.layers) > 3 else "")
        return _Step(
            f"{left} = k.{kernel.file.name}({arguments})", tuple(kernel.inputs), tuple(kernel.outputs), layer
        )

    def _call(self, node: fx.Node) -> _Step:
        made = self._names[node]
        self._calls += not is_free(node) and node.target is not operator.getitem
        reads = tuple(node.all_input_nodes)
        layer = layer_of(node)
        if node.op == "get_attr":
            raise NotFusible.because(f"{node.target} is a constant of the graph")
        if is_random_state(node):
            self._replays = True
            return _Step(f"{made} = _random_state(device)", reads, (node,), layer)
        if random_state_of(node) is not None:
            self._replays = self._random = True
            state, target, *rest = node.args
            inner = fx.Graph().create_node("call_function", target, tuple(rest), dict(node.kwargs))  # type: ignore[arg-type]
            call = call_text(inner, self._names)
            function, arguments = call.split("(", 1)
            return _Step(
                f"{made} = _with_random_state({self._names[state]}, {function}, {arguments}",  # type: ignore[index]
                reads,
                (node,),
                layer,
            )
        tags = getattr(node.target, "tags", ())
        self._random |= torch.Tag.nondeterministic_seeded in tags
        namespace = getattr(node.target, "namespace", "")
        if namespace and namespace not in ("aten", "prims"):
            self._operators.add(f"{namespace}::{node.target._opname}")  # type: ignore[union-attr]
            arguments = ", ".join(
                [argument_text(a, self._names) for a in node.args]
                + [f"{key}={argument_text(value, self._names)}" for key, value in node.kwargs.items()]
            )
            return _Step(f"{made} = o.{node.target._opname}({arguments})", reads, (node,), layer)  # type: ignore[union-attr]
        return _Step(f"{made} = {call_text(node, self._names)}", reads, (node,), layer)


@dataclass(frozen=True)
class _Step:
    text: str
    reads: tuple[fx.Node, ...]
    makes: tuple[fx.Node, ...]
    layer: str


def _last_uses(
    steps: Sequence[_Step], inputs: Sequence[fx.Node], results: Sequence[fx.Node]
) -> list[list[fx.Node]]:
    """For each step the values that nothing reads after it."""
    seen = set(results)
    frees: list[list[fx.Node]] = []
    for step in reversed(steps):
        gone = [node for node in dict.fromkeys((*step.reads, *step.makes)) if node not in seen]
        seen.update(gone)
        frees.append(gone)
    return frees[::-1]
