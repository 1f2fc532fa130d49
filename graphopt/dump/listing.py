"""A program as lines to be written: the one reading of a program behind text and JSON."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt.dump.canonical import Names
from graphopt.program import InputSpec, OutputSpec, Program, Signature, layer_of, tensor_leaves

__all__ = ["InputLine", "Listing", "OutputLine", "Statement", "listing_of", "statement"]


@dataclass(frozen=True)
class InputLine:
    """An input or constant. ``note`` is its dotted name where it does not go by it already."""

    role: str
    name: str
    type: str
    note: str
    node: fx.Node


@dataclass(frozen=True)
class Statement:
    """One call. ``mark`` says who put it there or what a schedule does with it."""

    name: str
    call: str
    type: str
    layer: str
    mark: str
    node: fx.Node


@dataclass(frozen=True)
class OutputLine:
    """One output, with what it is: a gradient of which input, a new value of which buffer."""

    role: str
    name: str
    type: str
    note: str


@dataclass(frozen=True)
class Listing:
    """A graph ready to be written. ``device`` is where most of its values live; values elsewhere
    carry their own. ``subgraphs`` are the bodies of higher-order operators, by attribute name."""

    names: Names
    device: str
    symbols: Mapping[str, str]
    inputs: tuple[InputLine, ...]
    statements: tuple[Statement, ...]
    outputs: tuple[OutputLine, ...]
    subgraphs: Mapping[str, Listing]


def listing_of(program: Program, *, marks: Mapping[str, str] | None = None) -> Listing:
    """The listing of ``program``; ``marks`` maps fx node names to what to write beside them."""
    names = Names(program.graph, program.signature, program.symbols)
    device = _main_device(program.graph)
    return _listing(program.gm, program.signature, names, device, marks or {})


def _listing(
    gm: fx.GraphModule, signature: Signature, names: Names, device: str, marks: Mapping[str, str]
) -> Listing:
    specs = {spec.node: spec for spec in signature.inputs}
    inputs, statements = [], []
    subgraphs: dict[str, Listing] = {}
    constants: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            spec = specs.get(node.name, InputSpec(node.name, "input"))
            note = "" if spec.fqn == names.of(node) else spec.fqn
            inputs.append(InputLine(spec.role, names.of(node), _type(names, node, device), note, node))
        elif node.op == "get_attr":
            target = str(node.target)
            held = _attribute(gm, target)
            if isinstance(held, fx.GraphModule):
                inner = Names(held.graph, Signature((), ()), names.symbols, inherited=True)
                subgraphs[target] = _listing(held, Signature((), ()), inner, device, {})
            elif target not in constants:
                constants.add(target)
                kind = _type(names, node, device, held)
                inputs.append(InputLine("constant", names.of(node), kind, "", node))
        elif node.op != "output":
            statements.append(statement(names, node, device, marks.get(node.name, "")))
    return Listing(
        names,
        device,
        names.definitions,
        tuple(inputs),
        tuple(statements),
        tuple(_outputs(gm.graph, signature, names, device)),
        subgraphs,
    )


def statement(names: Names, node: fx.Node, device: str, mark: str = "") -> Statement:
    """The statement of one call node; without ``mark`` it carries the pass that made the node."""
    mark = mark or _made_by(node)
    return Statement(names.of(node), names.call(node), _type(names, node, device), layer_of(node), mark, node)


def _outputs(graph: fx.Graph, signature: Signature, names: Names, device: str) -> Iterator[OutputLine]:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    specs = deque(signature.outputs)
    for value in _leaves(output.args[0]):
        spec: OutputSpec | None = None
        if isinstance(value, fx.Node) and specs and specs[0].node == value.name:
            spec = specs.popleft()
        elif value is None:
            # No gradient belongs to an input that needs none; signatures leave it out too.
            continue
        # An output's target is its position, which its place in the list tells already.
        note = names.of_name(spec.target) if spec and spec.role != "output" else ""
        kind = _type(names, value, device) if isinstance(value, fx.Node) else ""
        yield OutputLine(spec.role if spec else "output", names.operand(value), kind, note)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _type(names: Names, node: fx.Node, device: str, held: Any = None) -> str:
    value = node.meta.get("val", held)
    text = names.type(value)
    elsewhere = sorted({str(t.device) for t in tensor_leaves(value)} - {device})
    return f"{text} @ {', '.join(elsewhere)}" if elsewhere else text


def _main_device(graph: fx.Graph) -> str:
    """The device that most tensors are on; the first by name among equals."""
    count = Counter(str(t.device) for node in graph.nodes for t in tensor_leaves(node.meta.get("val")))
    return min(count, key=lambda device: (-count[device], device)) if count else ""


def _made_by(node: fx.Node) -> str:
    note = node.meta.get("graphopt")
    return str(getattr(note, "pass_id", "")) if note is not None else ""


def _attribute(gm: torch.nn.Module, path: str) -> Any:
    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    return value
