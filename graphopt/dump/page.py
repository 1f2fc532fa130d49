"""Programs as one HTML page that needs nothing else: layers to open and close, on a canvas to zoom.

The page holds facts, in columns, and a script that lays out what is open and draws what is in sight
(``page.js``). Costs are predictions of a cost model, bytes those of the values that calls make.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from typing import IO, Any

import torch.fx as fx

from graphopt import _torch
from graphopt.cost import CostModel
from graphopt.dump.canonical import op_text
from graphopt.dump.listing import listing_of
from graphopt.program import Program, tensor_leaves
from graphopt.provenance import note_of

__all__ = [
    "PageRow",
    "Sheet",
    "columns",
    "common_layer",
    "document",
    "page_text",
    "write_page",
    "write_pages",
]


@dataclass(frozen=True)
class Sheet:
    """A program to show. ``marks``: what a schedule does with values, by node; ``before``: it is the model's
    as it was captured, to be shown beside what was made of it."""

    program: Program
    marks: Mapping[str, str] = field(default_factory=dict)
    before: bool = False


def page_text(sheets: Sequence[Sheet], *, first: int = 0, cost: CostModel | None = None) -> str:
    """The whole page. It opens on sheet number ``first``; without ``cost`` no seconds are shown.

    The first sheet from before of the same level is shown beside it, where there is one.
    """
    level = sheets[first].program.level
    beside = [k for k, sheet in enumerate(sheets) if sheet.before and sheet.program.level is level]
    others = [k for k in range(len(sheets)) if k != first]
    data = {
        "programs": [columns(_title(sheet), _rows(sheet, cost)) for sheet in sheets],
        "first": first,
        "beside": (beside or others or [first])[0],
        "compare": bool(beside),
    }
    return document(data, sheets[first].program.name)


def document(data: Mapping[str, Any], title: str, *, head: str = "", change: bool = False) -> str:
    """The page that shows ``data``; ``head`` is HTML above the graphs. ``change``: values can be coloured by
    what became of them."""
    modes = ["<option value=\"change\">change</option>"] if change else []
    modes += [f'<option value="{mode}">{name}</option>' for mode, name in _MODES]
    # "</script>" in a text must not end the script that holds it.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)} - graphopt</title>
<style>{_file("page.css")}</style></head><body><div id="page">
<div id="bar"><b>graphopt</b>
<input type="search" id="find" placeholder="Find operator, layer, type" aria-label="Find">
<span id="found"></span>
<label>colour <select id="colour">{"".join(modes)}</select></label>
<span id="legend"><i></i><canvas width="90" height="12"></canvas><b></b></span>{_KEY if change else ""}
<button id="open">open all</button><button id="close">close all</button><button id="fit">whole</button>
{_CHANGED if change else ""}<button id="compare">side by side</button></div>{head}
<div id="panes">{_PANE.format(hidden="")}{_PANE.format(hidden=" hidden")}<div id="about"></div></div></div>
<script type="application/json" id="data">{text}</script>
<script>{_file("page.js")}</script></body></html>
"""


_MODES = (("kind", "kind"), ("seconds", "cost"), ("bytes", "memory"))
_CHANGED = '<button id="changed">open changes</button>'
_KEY = (
    '<span id="key"><i class="removed">only in A</i> <i class="added">only in B</i> '
    '<i class="changed">changed</i> <i class="rewired">reads other values</i></span>'
)
_PANE = (
    '<section class="pane"{hidden}><header><select aria-label="Program"></select><span></span></header>'
    '<canvas tabindex="0" aria-label="Graph: drag to move, wheel to zoom, click to open"></canvas></section>'
)


def write_page(program: Program, stream: IO[str]) -> None:
    """Write the page of one program to ``stream``, without predictions."""
    stream.write(page_text([Sheet(program)]))


def write_pages(sheets: Sequence[Sheet], first: int, cost: CostModel, stream: IO[str]) -> None:
    """Write the page of all programs of a step to ``stream``."""
    stream.write(page_text(sheets, first=first, cost=cost))


@cache
def _file(name: str) -> str:
    return files("graphopt.dump").joinpath(name).read_text(encoding="utf-8")


class _Table:
    """Texts, each once, by number."""

    def __init__(self, *texts: str) -> None:
        self.numbers = {text: k for k, text in enumerate(texts)}

    def __getitem__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


@dataclass(frozen=True)
class PageRow:
    """An input, call or output. ``call`` is empty but for calls; ``key`` is what ``reads`` of others name it
    by, ``id`` and ``origin`` what the other side knows it by."""

    name: str
    op: str
    type: str
    layer: str
    bytes: int
    seconds: float
    mark: str
    call: str
    key: Hashable
    reads: Sequence[Hashable]
    id: str = ""
    origin: Sequence[str] = ()


def columns(title: str, rows: Iterable[PageRow]) -> dict[str, Any]:
    """A program in columns, its rows in order: whatever one reads is before it."""
    ops, types, marks = _Table(), _Table(), _Table("")
    layers, parents = _Table(""), [0]
    names = ("name", "op", "type", "layer", "bytes", "seconds", "mark", "call", "id", "origin")
    found: dict[str, list[Any]] = {name: [] for name in (*names, "reads")}
    places: dict[Hashable, int] = {}
    for row in rows:
        values = (
            row.name, ops[row.op], types[row.type], _layer(layers, parents, row.layer), row.bytes,
            row.seconds, marks[row.mark], row.call, row.id, row.origin,
        )  # fmt: skip
        if row.key is not None:
            places[row.key] = len(found["name"])
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
        found["reads"].append(list(dict.fromkeys(places[key] for key in row.reads if key in places)))
    return {
        "title": title,
        "layers": list(layers.numbers),
        "parent": parents,
        "ops": list(ops.numbers),
        "types": list(types.numbers),
        "marks": list(marks.numbers),
        **found,
    }


def _title(sheet: Sheet) -> str:
    before = " as captured" if sheet.before else ""
    return f"{sheet.program.name} @ {sheet.program.level}{before}"


def _rows(sheet: Sheet, cost: CostModel | None) -> Iterator[PageRow]:
    listing = listing_of(sheet.program, marks=sheet.marks)
    layers = {statement.node: statement.layer for statement in listing.statements}
    for item in listing.inputs:
        layer = common_layer([layers[user] for user in item.node.users if user in layers])
        node = item.node
        yield PageRow(
            item.name, item.role, item.type, layer, _bytes(node), 0.0, "", "", node, (), node.name
        )
    by_name: dict[str, fx.Node] = {listing.names.of(item.node): item.node for item in listing.inputs}
    for statement in listing.statements:
        node, note = statement.node, note_of(statement.node)
        by_name[statement.name] = node
        yield PageRow(
            statement.name,
            op_text(node),
            statement.type,
            statement.layer,
            _bytes(node),
            cost.node(node).seconds if cost is not None and statement.call else 0.0,
            statement.mark,
            statement.call,
            node,
            node.all_input_nodes,
            node.name,
            note.origin if note is not None else (),
        )
    for number, output in enumerate(listing.outputs):
        reads = [by_name[output.name]] if output.name in by_name else []
        role = f"{output.role} {output.note}".rstrip()
        layer = layers.get(reads[0], "") if reads and output.role != "output" else ""
        yield PageRow(f"output {number}", role, output.type, layer, 0, 0.0, "", "", None, reads)


def common_layer(layers: Sequence[str]) -> str:
    """The innermost layer that all of ``layers`` are in."""
    if not layers:
        return ""
    common = layers[0].split(".")
    for layer in layers[1:]:
        parts = layer.split(".")
        same = [a == b for a, b in zip(common, parts, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return ".".join(common)


def _bytes(node: fx.Node) -> int:
    tensors = tensor_leaves(node.meta.get("val"))
    return sum(_torch.hint(tensor.numel()) * tensor.element_size() for tensor in tensors)


def _layer(layers: _Table, parents: list[int], path: str) -> int:
    """The number of a layer, those around it made on the way."""
    if path not in layers.numbers:
        up = _layer(layers, parents, path.rpartition(".")[0])
        layers[path]
        parents.append(up)
    return layers.numbers[path]
