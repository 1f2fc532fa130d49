"""A report for notebooks: one self-contained piece of HTML, every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from graphopt.budget import format_bytes
from graphopt.duration import format_seconds
from graphopt.price import price_groups
from graphopt.report import Report
from graphopt.report_table import comparison, headline, peak_rows, plan_lines, program_lines, undone_lines

__all__ = ["report_html"]

_STYLE = """\
.graphopt-report{font:13px/1.45 system-ui,sans-serif;max-width:60em}
.graphopt-report table{border-collapse:collapse;margin:.5em 0}
.graphopt-report td,.graphopt-report th{padding:.15em .8em;text-align:right;font-weight:400}
.graphopt-report th{border-bottom:1px solid #9998;font-weight:600}
.graphopt-report td.t,.graphopt-report th.t{text-align:left}
.graphopt-report .bar{height:.7em;background:#3b6fb6;border-radius:2px}
.graphopt-report summary{cursor:pointer;font-weight:600}"""
_BAR_EM = 16.0


def report_html(report: Report) -> str:
    """The report as HTML: costs with bars of bytes, and folded tables of recomputation and passes."""
    parts = [f'<div class="graphopt-report"><style>{_STYLE}</style>', f"<b>{escape(headline(report))}</b>"]
    parts.append(_costs(report))
    if comparison(report):
        parts.append(f"<div>{escape(comparison(report))}</div>")
    if report.plan is not None:
        parts += [f"<div>{escape(line)}</div>" for line in plan_lines(report.plan)]
        rows = [
            (
                group.layer or "-",
                group.op,
                f"{group.runs:,}",
                format_bytes(group.bytes),
                format_seconds(group.seconds),
            )
            for group in price_groups(report.plan)
        ]
        if rows:
            parts.append(
                _folded("recomputed", _table(("layer", "op", "runs", "bytes", "time"), rows, left=2))
            )
    if report.steps:
        steps = [
            (step.id, step.plugin, step.options, step.status, step.reason, format_seconds(step.seconds))
            for step in report.steps
        ]
        heads = ("pass", "plugin", "options", "status", "reason", "time")
        parts.append(_folded("passes", _table(heads, steps, left=5)))
    if report.quantization is not None:
        kept = [
            (
                choice.weight,
                choice.scheme or "as it is",
                format_bytes(choice.bytes_before),
                format_bytes(choice.bytes_after),
                f"{choice.error:.3g}",
            )
            for choice in report.quantization.choices
        ]
        summary = f"<div>{escape(report.quantization.summary)}</div>"
        columns = ("weight", "kept as", "before", "after", "error")
        parts.append(_folded("weights", summary + _table(columns, kept, left=2)))
    programs = program_lines(report)
    if programs:
        items = "".join(f"<li>{escape(line)}</li>" for line in programs)
        parts.append(_folded("programs", f"<ul>{items}</ul>"))
    undone = undone_lines(report, None)
    if undone:
        items = "".join(f"<li>{escape(line)}</li>" for line in undone)
        parts.append(_folded("not done", f"<ul>{items}</ul>"))
    plugins = [f"plugin {plugin}" for plugin in report.plugins if plugin.status != "active" or plugin.slow]
    notes = [f"<li>{escape(note)}</li>" for note in (*plugins, *report.diagnostics)]
    if notes:
        parts.append(f"<b>notes</b><ul>{''.join(notes)}</ul>")
    return "".join([*parts, "</div>"])


def _costs(report: Report) -> str:
    known = peak_rows(report)
    largest = max(1, *(peak for _, peak in known)) if known else 1
    rows = []
    for row, peak in known:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        bar = f'<div class="bar" style="width:{_BAR_EM * peak / largest:.2f}em"></div>'
        rows.append(f'<tr><td class="t">{escape(row[0])}</td>{cells}<td class="t">{bar}</td></tr>')
    heads = ("", "peak", "of baseline", "weights", "time", "of baseline", "")
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        aligned = (f'<{tag} class="t">' if index < left else f"<{tag}>" for index in range(len(row)))
        return "".join(f"{start}{escape(text)}</{tag}>" for start, text in zip(aligned, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', heads)}</tr>{body}</table>"


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
