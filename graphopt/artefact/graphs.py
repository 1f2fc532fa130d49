"""Programs as JSON that can be read back: the facts of ``graphopt.dump.json`` with the nodes' own names.

Schedules name nodes, so names are kept as they are. A program that was read has the fingerprint that it was
written with, or it is refused.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from graphopt.artefact.operators import Operators, target_text
from graphopt.artefact.values import MakeSize, argument_json, argument_of, no_symbols, type_json, type_of
from graphopt.errors import ArtefactError
from graphopt.program import InputSpec, Level, OutputSpec, Program, Signature, layer_of
from graphopt.provenance import NodeNote, note_of, stamp
from graphopt.record_json import RecordFormatError, decode, encode

__all__ = ["Tensors", "program_json", "program_of"]

Tensors = Callable[[torch.Tensor], str]
"""Puts a tensor that a graph holds aside, and gives the name by which it is found again."""

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*\Z", re.ASCII)
_KINDS = ("placeholder", "get_attr", "call_function", "output")


def program_json(program: Program, hold: Tensors) -> dict[str, Any]:
    """All of a program as plain JSON values; tensors that its graph holds go to ``hold``.

    Raises ``ArtefactError``, naming the node, for what cannot be written.
    """
    nodes = []
    for node in program.graph.nodes:
        try:
            nodes.append(_node_json(program, node, hold))
        except ArtefactError as error:
            raise ArtefactError(f"{program.name}: {node.name}: {error.message}", hint=error.hint) from None
    return {
        "name": program.name,
        "level": str(program.level),
        "fingerprint": program.fingerprint,
        "symbols": dict(program.symbols),
        "inputs": [encode(spec) for spec in program.signature.inputs],
        "outputs": [encode(spec) for spec in program.signature.outputs],
        "nodes": nodes,
    }


def _node_json(program: Program, node: fx.Node, hold: Tensors) -> dict[str, Any]:
    if node.op not in _KINDS:
        raise ArtefactError(f"a {node.op} of {node.target} runs code of the model's own")
    target = target_text(node.target) if node.op == "call_function" else str(node.target)
    written = {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [argument_json(argument) for argument in node.args],
        "kwargs": {key: argument_json(argument) for key, argument in node.kwargs.items()},
        "type": type_json(node.meta.get("val")),
        "layer": layer_of(node),
    }
    note = note_of(node)
    if note is not None:
        written["note"] = encode(note)
    if node.op == "get_attr":
        held: Any = program.gm
        for part in target.split("."):
            held = getattr(held, part)
        if not isinstance(held, torch.Tensor):
            raise ArtefactError(f"the graph holds a {type(held).__name__} as {target}")
        written["tensor"] = hold(held)
    return written


def program_of(
    data: Any,
    operators: Operators,
    tensors: Mapping[str, torch.Tensor],
    make_size: MakeSize = no_symbols,
) -> Program:
    """The program that ``program_json`` wrote, its values fake: call it under a fake mode, which
    ``make_size`` makes sizes for. ``tensors`` are those that its graph holds. Raises ``ArtefactError``,
    naming the node, for anything else."""
    name = str(data.get("name", ""))[:60] if isinstance(data, dict) else ""
    try:
        return _program_of(data, operators, tensors, make_size)
    except ArtefactError as error:
        raise ArtefactError(f"program {name!r}: {error.message}", hint=error.hint) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"program {name!r} is malformed: {type(error).__name__}: {error}") from error


def _program_of(
    data: Any, operators: Operators, tensors: Mapping[str, torch.Tensor], make_size: MakeSize
) -> Program:
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    held: dict[str, torch.Tensor] = {}
    for item in data["nodes"]:
        name, op, target = item["name"], item["op"], item["target"]
        # Names become names in code that fx writes.
        if op not in _KINDS or not is_name(name) or name in values:
            raise ArtefactError(f"{str(name)[:60]!r} of kind {str(op)[:20]!r} is no node")
        try:
            kwargs = {key: argument_of(value, values, operators) for key, value in item["kwargs"].items()}
            args = tuple(argument_of(value, values, operators) for value in item["args"])
            if not all(map(is_name, kwargs)):
                raise ArtefactError("a keyword argument has no name")
            if op == "call_function":
                target = operators.target(str(target))
            elif not isinstance(target, str) or not all(map(is_name, target.split("."))):
                raise ArtefactError(f"{str(target)[:60]!r} is no name")
            if op == "get_attr":
                if item["tensor"] not in tensors:
                    raise ArtefactError(f"there is no tensor {str(item['tensor'])[:60]!r}")
                held[target] = tensors[item["tensor"]]
            node = graph.create_node(op, target, args, kwargs, name=name)
            if node.name != name:
                raise ArtefactError("fx gives it another name")
            _annotate(node, item, make_size)
        except ArtefactError as error:
            raise ArtefactError(f"node {name}: {error.message}", hint=error.hint) from None
        values[name] = node
    if not values or node.op != "output" or sum(n.op == "output" for n in graph.nodes) != 1:
        raise ArtefactError("it has no output at its end")
    signature = Signature(
        tuple(decode(InputSpec, spec) for spec in data["inputs"]),
        tuple(decode(OutputSpec, spec) for spec in data["outputs"]),
    )
    symbols = {str(key): str(value) for key, value in data["symbols"].items()}
    made = Program(str(data["name"]), Level(data["level"]), fx.GraphModule(held, graph), signature, symbols)
    if made.fingerprint != data["fingerprint"]:
        raise ArtefactError(f"it has fingerprint {made.fingerprint}, not {str(data['fingerprint'])[:60]}")
    return made


def is_name(text: Any) -> bool:
    """Whether ``text`` can be the name of a value in code that is written."""
    return isinstance(text, str) and _IDENTIFIER.match(text) is not None and not keyword.iskeyword(text)


def _annotate(node: fx.Node, item: Mapping[str, Any], make_size: MakeSize) -> None:
    looks = type_of(item["type"], make_size)
    if looks is not None:
        node.meta["val"] = looks
    if layer := str(item["layer"]):
        node.meta["nn_module_stack"] = {layer: (layer, "")}
    if "note" in item:
        try:
            stamp(node, decode(NodeNote, item["note"]))
        except RecordFormatError as error:
            raise ArtefactError(f"its note is malformed: {error}") from error
