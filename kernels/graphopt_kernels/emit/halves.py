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
from graphopt_kernels.emit.groups import Grouping, grouped
from graphopt_kernels.emit.kernel_file import Kernel
from graphopt_kernels.emit.order import Step, is_free, ordered, root
from graphopt_kernels.emit.product_choice import Prices

__all__ = ["Half", "half_of", "owned_inputs"]


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


def half_of(
    program: Program,
    name: str,
    names: Mapping[str, str],
    limit: int | None = None,
    prices: Prices | None = None,
) -> Half:
    """The function of one half. ``names``: what inputs are to be called; ``limit``: bytes that may be alive
    at once, without those that the caller holds anyway; ``prices``: see ``grouped``.

    Raises ``NotFusible`` for a call that cannot be written down.
    """
    grouping = grouped(program.graph, owned_inputs(program), limit, prices)
    return _Writer(program, name, names, grouping).written()


def owned_inputs(program: Program) -> set[fx.Node]:
    """Inputs that a half is the last to hold: saved values and incoming gradients."""
    return set(program.find([spec.node for spec in program.signature.by_role("saved", "tangent")]))


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
        steps = self._steps([r for r in results if isinstance(r, fx.Node)])
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

    def _steps(self, results: Sequence[fx.Node]) -> list[_Step]:
        """Kernels and calls in order, each view right before it is first read."""
        kernels = {kernel.nodes: kernel for kernel in self._grouping.kernels}
        groups = [Step(k.nodes, tuple(map(root, k.inputs)), k.outputs) for k in self._grouping.kernels]
        calls = [n for n in self._program.graph.nodes if n.op in ("call_function", "get_attr")]
        steps: list[_Step] = []
        shown: set[fx.Node] = set()

        def show(node: fx.Node) -> None:
            if node.op == "call_function" and is_free(node) and node not in shown:
                shown.add(node)
                for source in node.all_input_nodes:
                    show(source)
                steps.append(self._call(node))

        for step in ordered(calls, groups, results):
            kernel = kernels.get(step.nodes)
            if kernel is not None:
                for node in kernel.inputs:
                    show(node)
                steps.append(self._launch(kernel))
                continue
            for node in step.nodes:
                for source in node.all_input_nodes:
                    show(source)
                steps.append(self._call(node))
        for node in results:
            show(node)
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
