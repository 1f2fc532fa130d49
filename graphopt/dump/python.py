"""Programs as the Python that fx would run, with canonical names and without paths."""

from __future__ import annotations

import keyword
import re
from typing import IO

import torch.fx as fx

from graphopt.dump.canonical import Names
from graphopt.program import Program, layer_of

__all__ = ["program_python", "write_python"]


# fx clears a name after its last use: ``;  v0 = v4 = None``.
_RELEASED = re.compile(r";  (?:\w+ = )+None$")


def program_python(program: Program) -> str:
    """The code of the program; ``v3`` here is ``%3`` in the text format.

    Each run of calls that come from one layer is headed by a comment that names it.
    """
    names = Names(program.graph, program.signature, program.symbols)
    renamed = _renamed(program, names)
    code = renamed.print_readable(print_output=False, colored=False)
    return f"# program {program.name} @ {program.level}  fingerprint={program.fingerprint}\n" + _clean(
        code, names, _layers(program, names)
    )


def write_python(program: Program, stream: IO[str]) -> None:
    """Write ``program_python(program)`` to ``stream``."""
    stream.write(program_python(program))


def _renamed(program: Program, names: Names) -> fx.GraphModule:
    """A copy whose nodes carry canonical names, and of their metadata the values alone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        args = fx.node.map_arg(node.args, lambda n: copies[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: copies[n])
        name = None if node.op == "output" else _identifier(names.of(node))
        target = name if node.op == "placeholder" and name else node.target
        copy = graph.create_node(node.op, target, args, kwargs, name=name)
        if "val" in node.meta:
            copy.meta["val"] = node.meta["val"]
        copies[node] = copy
    return fx.GraphModule(program.gm, graph, class_name="Program")


def _identifier(name: str) -> str:
    if name.startswith("%"):
        return f"v{name[1:]}"
    word = re.sub(r"\W", "_", name.removeprefix("@"))
    # A layer of a Sequential has a number for a name, and any module may be called `class`.
    return word if word.isidentifier() and not keyword.iskeyword(word) else f"_{word}"


def _layers(program: Program, names: Names) -> dict[str, str]:
    return {_identifier(names.of(node)): layer_of(node) for node in program.nodes()}


def _clean(code: str, names: Names, layers: dict[str, str]) -> str:
    out: list[str] = []
    current = ""
    for line in code.splitlines():
        text = _annotations_renamed(line, names).rstrip()
        text = _RELEASED.sub("", text)
        # fx's own comments hold positions in source files, which tell machines apart, not programs.
        if not text or text.lstrip().startswith("#"):
            continue
        assigned = re.match(r"\s+(\w+)\b[^=]*=", text)
        layer = layers.get(assigned[1], current) if assigned else current
        if layer != current:
            current = layer
            out += ["", f"        # {layer}"] if layer else [""]
        out.append(text)
    return "\n".join(out) + "\n"


def _annotations_renamed(line: str, names: Names) -> str:
    """Symbols stand in the quoted types alone: ``v1: "f32[s77, 8]" = ...``."""
    return re.sub(r': "([^"]*)"', lambda match: f': "{names.size(match[1])}"', line)
