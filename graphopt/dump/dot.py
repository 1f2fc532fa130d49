"""Programs as Graphviz DOT, calls grouped by the layer that they came from."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from graphopt.dump.canonical import op_text
from graphopt.dump.listing import InputLine, Listing, Statement, listing_of
from graphopt.errors import DumpError
from graphopt.program import Program

__all__ = ["program_dot", "write_dot", "write_svg"]

_INPUT_FILL = {"parameter": "#dbe7f6", "buffer": "#e3e9ee", "constant": "#e3e9ee", "tangent": "#fbe3d0"}


def program_dot(program: Program) -> str:
    """The program as DOT text: one cluster a layer, nested as the modules are, edges are values."""
    listing = listing_of(program)
    root = _Cluster("")
    for statement in listing.statements:
        root.inner(statement.layer).statements.append(statement)
    lines = [
        f"digraph {_quoted(program.name)} {{",
        f"  label={_quoted(f'program {program.name} @ {program.level}')}; labelloc=t; rankdir=TB;",
        '  fontname="Helvetica"; node [fontname="Helvetica", fontsize=10, shape=box, style="rounded"];',
        "  edge [color=gray40, arrowsize=0.6];",
        *(_input(item) for item in listing.inputs),
        *_cluster(root, "  "),
    ]
    for index, output in enumerate(listing.outputs):
        label = f"{output.role} {output.note}".rstrip()
        lines.append(f'  "output {index}" [label={_quoted(label)}, style="filled", fillcolor="#e4f1e1"];')
        lines.append(f'  {_quoted(output.name)} -> "output {index}";')
    lines += list(_edges(listing))
    return "\n".join([*lines, "}"]) + "\n"


def write_svg(program: Program, stream: IO[str]) -> None:
    """The picture that Graphviz draws of the DOT text. Raises ``DumpError`` without its ``dot``, or where
    that fails."""
    command = shutil.which("dot")
    if command is None:
        raise DumpError(
            "SVG is drawn by Graphviz, whose command 'dot' is not installed",
            hint="install Graphviz; dot needs nothing, and html is a page to zoom in",
        )
    done = subprocess.run([command, "-Tsvg"], input=program_dot(program), capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise DumpError(f"Graphviz could not draw {program.name}: {said}")
    stream.write(done.stdout)


def write_dot(program: Program, stream: IO[str]) -> None:
    """Write ``program_dot(program)`` to ``stream``."""
    stream.write(program_dot(program))


@dataclass
class _Cluster:
    path: str
    statements: list[Statement] = field(default_factory=list)
    children: dict[str, _Cluster] = field(default_factory=dict)

    def inner(self, layer: str) -> _Cluster:
        """The cluster of a dotted path below this one, made on the way where it is not there."""
        here = self
        for part in layer.split(".") if layer else ():
            path = f"{here.path}.{part}" if here.path else part
            here = here.children.setdefault(part, _Cluster(path))
        return here


def _cluster(cluster: _Cluster, indent: str) -> Iterator[str]:
    for statement in cluster.statements:
        label = f"{statement.name} {op_text(statement.node)}\n{statement.type}"
        yield f"{indent}{_quoted(statement.name)} [label={_quoted(label)}];"
    for child in cluster.children.values():
        yield f"{indent}subgraph {_quoted(f'cluster_{child.path}')} {{"
        yield f"{indent}  label={_quoted(child.path)}; color=gray70; fontcolor=gray30; labeljust=l;"
        yield from _cluster(child, indent + "  ")
        yield f"{indent}}}"


def _input(item: InputLine) -> str:
    label = _quoted(f"{item.name}\n{item.type}")
    fill = _INPUT_FILL.get(item.role, "#fdf3d0")
    return f'  {_quoted(item.name)} [label={label}, shape=ellipse, style="filled", fillcolor="{fill}"];'


def _edges(listing: Listing) -> Iterator[str]:
    for statement in listing.statements:
        for source in statement.node.all_input_nodes:
            yield f"  {_quoted(listing.names.of(source))} -> {_quoted(statement.name)};"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
