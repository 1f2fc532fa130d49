"""Cut a program into segments: what stands before, between and after its repeated blocks, and the blocks.

    before:  x -> embed -> [layer 1] -> [layer 2] -> head          one graph
    after:   prologue, block, block, epilogue                      a chain of calls; one graph per kind

Every segment is a module of its own with explicit inputs and outputs. Blocks of a run share one module,
so does anything else with an equal signature. The order of nodes is kept, so random numbers and writes
happen in the order of the whole program, and the chain computes bit for bit what the program does.
Inside autocast and no-grad regions each segment establishes the region again for itself.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.capture.ambient import is_state_call
from graphopt.capture.blocks import Blocks, Run
from graphopt.capture.chain import Call, Segment, Segmented, results_of
from graphopt.capture.cuts import CutMap, cut_map
from graphopt.capture.structure import Line, attribute, fingerprint_graph, line_of, signature_of
from graphopt.capture.trained import trained_values
from graphopt.errors import CaptureError, nearest

__all__ = ["split"]


def split(gm: fx.GraphModule, blocks: Blocks) -> Segmented:
    """Cut ``gm``, whose nodes carry ``meta["val"]``, at the ends of the given blocks.

    Runs whose ends may not be cut, or whose blocks are not one program, stay part of the segment around
    them, and ``declined`` of the result says why. Raises ``CaptureError`` for blocks of another graph
    and for graphs that are not ATen.
    """
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise CaptureError(
                f"node {node.name!r} calls a {node.op[5:]}, and only functions can be cut apart",
                hint="trace the module to ATen first",
            )
    line = line_of(gm.graph)
    cuts = cut_map(line)
    last = line.last_reads()
    builder = _Builder(gm, line, last, trained_values(line))
    start = 0
    for run in blocks.runs:
        bounds = _bounds(line, run)
        reason = _refusal(line, cuts, bounds, last)
        if reason is not None:
            builder.declined.append(reason)
            continue
        builder.add(start, bounds[0], "prologue" if start == 0 else "glue")
        for first, stop in pairwise(bounds):
            builder.add(first, stop, "block")
        start = bounds[-1]
    builder.add(start, len(line.nodes), "epilogue" if start else "whole")
    return builder.finish()


def _bounds(line: Line, run: Run) -> list[int]:
    positions = {node.name: i for i, node in enumerate(line.nodes)}
    bounds: list[int] = []
    for block in run.blocks:
        for name in block:
            if name not in positions:
                close = nearest(name, positions)
                hint = f"did you mean {close!r}?" if close else "find the blocks of this graph anew"
                raise CaptureError(f"the graph has no call {name!r} that its blocks name", hint=hint)
        here = [positions[name] for name in block]
        if here != list(range(here[0], here[0] + len(here))) or (bounds and bounds[-1] != here[0]):
            raise CaptureError(
                f"the block that starts at {block[0]!r} is not one stretch of the graph",
                hint="find the blocks of this graph anew",
            )
        bounds += [here[-1] + 1] if bounds else [here[0], here[-1] + 1]
    return bounds


def _refusal(line: Line, cuts: CutMap, bounds: list[int], last: dict[fx.Node, int]) -> Reason | None:
    for bound in bounds:
        if not cuts.free[bound]:
            return cuts.why_not(bound)
    keys = {signature_of(line, a, b, last).key for a, b in pairwise(bounds)}
    if len(keys) > 1:
        names = (line.nodes[bounds[0]].name, line.nodes[bounds[-1] - 1].name)
        return Reason("the blocks are not one program", names)
    return None


@dataclass
class _Builder:
    gm: fx.GraphModule
    line: Line
    last: dict[fx.Node, int]
    trained: frozenset[fx.Node]
    modules: list[tuple[str, fx.GraphModule, tuple[str, ...]]] = field(default_factory=list)
    flows: list[list[bool]] = field(default_factory=list)
    known: dict[Hashable, int] = field(default_factory=dict)
    calls: list[tuple[int, tuple[fx.Node, ...], tuple[fx.Node, ...]]] = field(default_factory=list)
    declined: list[Reason] = field(default_factory=list)

    def add(self, start: int, stop: int, kind: str) -> None:
        """Append a call that stands for nodes ``start:stop``; nothing where they only switch state."""
        if all(is_state_call(node) for node in self.line.nodes[start:stop]):
            return
        signature = signature_of(self.line, start, stop, self.last)
        flows = [node in self.trained for node in signature.inputs]
        if signature.key not in self.known:
            self.known[signature.key] = len(self.modules)
            name = f"{kind}{sum(n.startswith(kind) for n, _, _ in self.modules)}"
            module = self._module(start, stop, signature.inputs, signature.outputs)
            names = tuple(node.name for node in self.line.nodes[start:stop])
            self.modules.append((name, module, names))
            self.flows.append(flows)
        index = self.known[signature.key]
        self.flows[index] = [a or b for a, b in zip(self.flows[index], flows, strict=True)]
        self.calls.append((index, signature.inputs, signature.outputs))

    def finish(self) -> Segmented:
        output = next(node for node in reversed(self.gm.graph.nodes) if node.op == "output")
        returned = {node.name for node in output.all_input_nodes}
        final = {node.name: i for i, (_, args, _) in enumerate(self.calls) for node in args}
        drops: list[list[str]] = [[] for _ in self.calls]
        constants = self._constants(output)
        for name, i in final.items():
            if name not in returned and name not in constants:
                drops[i].append(name)
        segments = tuple(
            Segment(name, module, fingerprint_graph(module.graph), tuple(flows), names)
            for (name, module, names), flows in zip(self.modules, self.flows, strict=True)
        )
        calls = tuple(
            Call(index, _names(args), _names(outs), tuple(dropped))
            for (index, args, outs), dropped in zip(self.calls, drops, strict=True)
        )
        inputs = tuple(node.name for node in self.gm.graph.nodes if node.op == "placeholder")
        return Segmented(segments, calls, inputs, constants, results_of(output.args[0]), tuple(self.declined))

    def _constants(self, output: fx.Node) -> dict[str, Any]:
        read = {node for _, args, _ in self.calls for node in args} | set(output.all_input_nodes)
        graph = self.gm.graph
        attributes = (node for node in graph.nodes if node.op == "get_attr" and node in read)
        return {node.name: attribute(graph, node) for node in attributes}

    def _module(
        self, start: int, stop: int, inputs: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...]
    ) -> fx.GraphModule:
        graph = fx.Graph()
        attributes: dict[str, Any] = {}
        copies: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        ambient = self.line.ambient
        before, after = ambient.states[start], ambient.states[stop]
        for enter in before.autocast:
            copies[enter] = graph.call_function(_torch.enter_autocast(), enter.args)
        if before.grad is not None:
            graph.call_function(_torch.set_grad_enabled(), (before.grad,))

        def copy_of(node: fx.Node) -> fx.Node:
            if node not in copies:
                target = f"constant{len(attributes)}"
                attributes[target] = attribute(self.gm.graph, node)
                copies[node] = graph.get_attr(target)
                copies[node].meta = dict(node.meta)
            return copies[node]

        for node in self.line.nodes[start:stop]:
            copies[node] = graph.node_copy(node, copy_of)
            copies[node].meta = dict(node.meta)
        for enter in reversed(after.autocast):
            graph.call_function(_torch.exit_autocast(), (copies[enter],))
        if after.grad is not None:
            graph.call_function(_torch.set_grad_enabled(), (ambient.entry_grad,))
        graph.output(tuple(copies[node] for node in outputs))
        return fx.GraphModule(attributes, graph)


def _names(nodes: tuple[fx.Node, ...]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)
