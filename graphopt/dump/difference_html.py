"""What tells two programs apart as a table for notebooks: A left, B right, layers folded. What
``graphopt diff -f html`` writes is the page of ``difference_page``, with the graphs."""

from __future__ import annotations

from html import escape

from graphopt.dump.difference import Change, Difference, LayerDelta, ProgramDifference
from graphopt.dump.difference_text import layer_costs, step_rows
from graphopt.dump.rows import Row

__all__ = ["difference_html"]

_STYLE = """\
.graphopt-diff{font:13px/1.45 system-ui,sans-serif;color:#1f2933;background:#fff}
.graphopt-diff table{border-collapse:collapse}
.graphopt-diff .step td,.graphopt-diff .step th{padding:.15em .8em;text-align:right}
.graphopt-diff .step td:first-child{text-align:left}
.graphopt-diff .calls{width:100%;table-layout:fixed;font:12px/1.5 ui-monospace,monospace}
.graphopt-diff .calls td{padding:.1em .5em;vertical-align:top;overflow-wrap:anywhere}
.graphopt-diff .calls td{border-top:1px solid #e4e8ec}
.graphopt-diff .removed{background:#fde8e8}.graphopt-diff .added{background:#e3f5e6}
.graphopt-diff .changed{background:#fff3d6}.graphopt-diff .rewired{background:#eef2f7}
.graphopt-diff summary{cursor:pointer;padding:.2em 0}.graphopt-diff .cost{color:#5b6770}
.graphopt-diff .note{color:#5b6770;font-style:italic}"""

_FIND = """\
<label>Find <input type="search" oninput="
const wanted=this.value.toLowerCase();
for(const row of document.querySelectorAll('.graphopt-diff .calls tr'))
 row.hidden=!row.textContent.toLowerCase().includes(wanted);
for(const layer of document.querySelectorAll('.graphopt-diff details')){
 layer.hidden=wanted!==''&&!layer.querySelector('tr:not([hidden])');
 if(wanted!=='')layer.open=true;}"></label>"""


def difference_html(found: Difference) -> str:
    """The whole page."""
    head, *rows = step_rows(found)
    table = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"
    table += "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>graphopt diff</title><style>{_STYLE}</style>',
        f'<div class="graphopt-diff"><p><b>A</b> {escape(found.a.label)}<br>'
        f'<b>B</b> {escape(found.b.label)}</p><table class="step">{table}</table><p>{_FIND}</p>',
        *map(_program, found.programs),
        "</div>\n",
    ]
    return "\n".join(parts)


def _program(program: ProgramDifference) -> str:
    counts = [f"{program.same:,} the same"]
    counts += [
        f"{n:,} {kind}" for kind in ("added", "removed", "changed", "rewired") if (n := program.count(kind))
    ]
    outputs = "".join(f'<p class="changed">{escape(text)}</p>' for text in program.outputs)
    title = f"<h3>program {escape(program.name)}: {escape(', '.join(counts))}</h3>"
    return title + "\n".join(map(_layer, program.layers)) + outputs


def _layer(layer: LayerDelta) -> str:
    title = escape(layer.layer or "(no layer)")
    rows = "\n".join(map(_row, layer.changes))
    return (
        f'<details open><summary><b>{title}</b> <span class="cost">{escape(layer_costs(layer))}</span>'
        f'</summary><table class="calls">{rows}</table></details>'
    )


def _row(change: Change) -> str:
    notes = [f"in place of {', '.join(change.replaces)}"] if change.replaces else []
    # What a changed call was stands beside it.
    notes += [change.detail] if change.kind == "rewired" else []
    note = f'<div class="note">{escape("; ".join(notes))}</div>' if notes else ""
    left = "removed" if change.kind == "removed" else change.kind if change.before else ""
    right = change.kind if change.after else ""
    cells = (
        f'<td class="{left}">{_call(change.before)}</td><td class="{right}">{_call(change.after)}{note}</td>'
    )
    return f"<tr>{cells}</tr>"


def _call(row: Row | None) -> str:
    if row is None:
        return ""
    mark = f" &lt;{escape(row.mark)}&gt;" if row.mark else ""
    return f"{escape(row.name)} = {escape(row.call)} : {escape(row.type)}{mark}"
