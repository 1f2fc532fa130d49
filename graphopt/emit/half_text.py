"""The graph of one half that runs op by op, as text that a later process runs again.

    %mm = aten.mm.default(%x, %w)     <->     {"name": "mm", "target": "aten::mm.default",
                                               "args": [{"ref": "x"}, {"ref": "w"}], "kwargs": {}}

What is read is looked up as graphs of artefacts are: registered operators and few functions, by name.
"""

from __future__ import annotations

import json
from typing import Any

import torch.fx as fx

from graphopt.artefact.graphs import is_name
from graphopt.artefact.operators import Operators, target_text
from graphopt.artefact.values import argument_json, argument_of
from graphopt.errors import ArtefactError

__all__ = ["half_of_text", "half_text"]


def half_text(half: fx.GraphModule) -> str:
    """The graph of ``half`` as ``half_of_text`` reads it. Raises ``ArtefactError``, naming the node, for what
    cannot be written: tensors that the graph holds, functions of the model's own."""
    nodes = []
    for node in half.graph.nodes:
        try:
            if node.op not in ("placeholder", "call_function", "output"):
                raise ArtefactError(f"a {node.op} of {node.target} is no operator")
            written: dict[str, Any] = {"name": node.name, "op": node.op}
            if node.op != "placeholder":
                written["args"] = [argument_json(argument) for argument in node.args]
                written["kwargs"] = {key: argument_json(value) for key, value in node.kwargs.items()}
            if node.op == "call_function":
                written["target"] = target_text(node.target)
        except ArtefactError as error:
            raise ArtefactError(f"{node.name}: {error.message}", hint=error.hint) from None
        nodes.append(written)
    return json.dumps(nodes, separators=(",", ":"))


def half_of_text(text: str, operators: Operators) -> fx.GraphModule:
    """What ``half_text`` wrote, without what its values look like. Raises ``ArtefactError`` for anything
    else, and for operators that nothing provides."""
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    try:
        for item in json.loads(text):
            name = item["name"]
            # Names become names in code that fx writes.
            if not is_name(name) or name in values or not all(map(is_name, item.get("kwargs", ()))):
                raise ArtefactError(f"{str(name)[:60]!r} is no node")
            args = tuple(argument_of(value, values, operators) for value in item.get("args", ()))
            kwargs = {
                key: argument_of(value, values, operators) for key, value in item.get("kwargs", {}).items()
            }
            if item["op"] == "placeholder":
                values[name] = graph.create_node("placeholder", name, name=name)
            elif item["op"] == "call_function":
                target = operators.target(item["target"])
                values[name] = graph.create_node("call_function", target, args, kwargs, name=name)
            elif item["op"] == "output":
                graph.output(args[0])
            else:
                raise ArtefactError(f"{str(item['op'])[:20]!r} is no kind of node")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ArtefactError(f"a graph is malformed: {type(error).__name__}: {error}") from error
    return fx.GraphModule({}, graph)
