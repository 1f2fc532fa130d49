"""What tells two programs apart as the page of ``page``: A left, B right, coloured by what became of values.

Both sides are graphs to zoom into, their layers open and close together, and what is chosen on one side is
shown on the other. It is made of rows, so that a side may be a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from graphopt.dump.difference import Change, Difference, ProgramDifference
from graphopt.dump.difference_text import layer_costs, step_rows
from graphopt.dump.page import PageRow, columns, common_layer, document
from graphopt.dump.rows import ProgramRows

__all__ = ["difference_page"]

KINDS = ("", "added", "removed", "changed", "rewired")
"""What may become of a value, by the number that the page holds."""


def difference_page(found: Difference) -> str:
    """The whole page. It opens on the first program that differs, each layer with a change opened."""
    programs: list[dict[str, Any]] = []
    for program in found.programs:
        programs += _sides(program)
    differing = [k for k, program in enumerate(found.programs) if program.layers or program.outputs]
    first = 2 * (differing or [0])[0]
    data = {
        "programs": programs,
        "first": first,
        "beside": first + 1,
        "compare": True,
        "kinds": KINDS,
        "layers": [
            [[layer.layer, layer_costs(layer)] for layer in program.layers] for program in found.programs
        ],
    }
    return document(data, "diff", head=_head(found), change=True)


def _head(found: Difference) -> str:
    head, *rows = step_rows(found)
    table = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"
    table += "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    labels = f"<p><b>A</b> {escape(found.a.label)}<br><b>B</b> {escape(found.b.label)}</p>"
    counts = "".join(f"<p>{escape(_counts(program))}</p>" for program in found.programs[:4])
    return f'<div id="step">{labels}<table>{table}</table><div>{counts}</div></div>'


def _counts(program: ProgramDifference) -> str:
    parts = [f"{program.same:,} calls the same"]
    parts += [f"{n:,} {kind}" for kind in KINDS[1:] if (n := program.count(kind))]
    return f"program {program.name}: {', '.join((*parts, *program.outputs))}"


def _sides(program: ProgramDifference) -> list[dict[str, Any]]:
    """A and B in columns. ``twin``: rows of the other side that stand for the same, ``change``: the kind by
    its number, ``note``: what is to be said of it."""
    changes = [change for layer in program.layers for change in layer.changes]
    rows = [list(_rows(side)) for side in (program.before, program.after)]
    places = [{row.key: k for k, row in enumerate(side) if row.key is not None} for side in rows]
    twins: list[list[list[int]]] = [[[] for _ in side] for side in rows]
    for a, b in _same(program, places):
        twins[0][a].append(b)
        twins[1][b].append(a)
    found = []
    for side, title in enumerate(("A", "B")):
        kinds, notes = [0] * len(rows[side]), [""] * len(rows[side])
        for change in changes:
            row = (change.before, change.after)[side]
            if row is not None:
                kinds[places[side][row.name]] = KINDS.index(change.kind)
                notes[places[side][row.name]] = _note(change, side)
        rows_of = (program.before, program.after)[side]
        level = f" @ {rows_of.level}" if rows_of.level else ", which is not there"
        made = columns(f"{title}: {program.name}{level}", rows[side])
        found.append({**made, "twin": twins[side], "change": kinds, "note": notes})
    return found


def _note(change: Change, side: int) -> str:
    if side == 1 and change.replaces:
        return f"in place of {', '.join(change.replaces)}"
    return change.detail if side == 1 else ""


def _same(program: ProgramDifference, places: list[dict[Any, int]]) -> Iterator[tuple[int, int]]:
    """Rows of A and of B that stand for the same: matched calls, inputs of one meaning, outputs in order, and
    what a pass made beside what it replaced."""
    a, b = program.before, program.after
    for i, j in program.pairs:
        yield places[0][a.rows[i].name], places[1][b.rows[j].name]
    inputs: Mapping[str, str] = {what: name for name, what in a.inputs.items()}
    for name, what in b.inputs.items():
        if what in inputs:
            yield places[0][inputs[what]], places[1][name]
    for number in range(min(len(a.outputs), len(b.outputs))):
        yield places[0][("output", number)], places[1][("output", number)]
    for layer in program.layers:
        for change in layer.changes:
            if change.after is not None:
                for name in change.replaces:
                    yield places[0][name], places[1][change.after.name]


def _rows(program: ProgramRows) -> Iterator[PageRow]:
    readers: dict[str, list[str]] = {}
    for row in program.rows:
        for name in row.operands:
            readers.setdefault(name, []).append(row.layer)
    for name, what in program.inputs.items():
        role, _, known = what.partition(" ")
        shown = known if known and not known.isdigit() else name
        layer = common_layer(readers.get(name, []))
        yield PageRow(shown, role, program.types.get(name, ""), layer, 0, 0.0, "", "", name, ())
    layers = {row.name: row.layer for row in program.rows}
    types = {**program.types, **{row.name: row.type for row in program.rows}}
    for row in program.rows:
        yield PageRow(
            row.name, row.op, row.type, row.layer, row.bytes or 0, row.seconds or 0.0, row.mark, row.call,
            row.name, row.operands, row.own,
        )  # fmt: skip
    for number, (role, note, name) in enumerate(program.outputs):
        text, layer = f"{role} {note}".rstrip(), layers.get(name, "") if role != "output" else ""
        yield PageRow(
            f"output {number}", text, types.get(name, ""), layer, 0, 0.0, "", "", ("output", number), (name,)
        )
