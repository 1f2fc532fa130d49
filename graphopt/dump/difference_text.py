"""What tells two programs apart as text: ``-`` only in A, ``+`` only in B, ``~`` in both, not the same."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.budget import format_bytes
from graphopt.dump.difference import Change, Difference, LayerDelta, ProgramDifference
from graphopt.duration import format_seconds

__all__ = ["difference_text", "layer_costs", "row_text", "step_rows"]

_MARKS = {"added": "+", "removed": "-", "changed": "~", "rewired": "~"}


def difference_text(found: Difference) -> str:
    """A table of the whole step, then each program by layer; ends without a newline."""
    lines = [f"A  {found.a.label}", f"B  {found.b.label}", ""]
    table = step_rows(found)
    widths = [max(len(row[k]) for row in table) for k in range(4)]
    for row in table:
        cells = [row[0].ljust(widths[0])] + [row[k].rjust(widths[k]) for k in range(1, 4)]
        lines.append("  ".join(cells).rstrip())
    for program in found.programs:
        lines += ["", *_program(program)]
    return "\n".join(lines)


def step_rows(found: Difference) -> list[tuple[str, str, str, str]]:
    """Head and rows of what both sides take: name, A, B, change."""
    calls = [sum(program.calls[k] for program in found.programs) for k in (0, 1)]
    rows = [
        ("", "A", "B", "change"),
        ("calls", f"{calls[0]:,}", f"{calls[1]:,}", f"{calls[1] - calls[0]:+,}"),
    ]
    a, b = found.a, found.b
    if a.peak_bytes is not None and b.peak_bytes is not None:
        change = _signed(b.peak_bytes - a.peak_bytes, format_bytes)
        rows.append(("peak of a step", format_bytes(a.peak_bytes), format_bytes(b.peak_bytes), change))
    if a.seconds is not None and b.seconds is not None:
        change = _signed(b.seconds - a.seconds, format_seconds)
        rows.append(("time of a step", format_seconds(a.seconds), format_seconds(b.seconds), change))
    return rows


def layer_costs(layer: LayerDelta) -> str:
    """``"24 -> 20 calls, op by op -1.20 us, results -4.00 KiB"``."""
    parts = [f"{layer.calls[0]} -> {layer.calls[1]} calls"]
    if layer.seconds is not None:
        parts.append(f"op by op {_signed(layer.seconds[1] - layer.seconds[0], format_seconds)}")
    if layer.flops is not None and layer.flops[0] != layer.flops[1]:
        parts.append(f"FLOPs {layer.flops[1] - layer.flops[0]:+,}")
    if layer.bytes is not None:
        parts.append(f"results {_signed(layer.bytes[1] - layer.bytes[0], format_bytes)}")
    return ", ".join(parts)


def row_text(change: Change) -> str:
    """One change without its mark: the call, its type, who made it and what is to be said of it."""
    row = change.after if change.after is not None else change.before
    assert row is not None
    text = f"{row.name} = {row.call} : {row.type}"
    notes = [f"<{row.mark}>"] if row.mark else []
    if change.replaces:
        notes.append(f"in place of {', '.join(change.replaces)}")
    if change.detail:
        notes.append(change.detail)
    return text + (f"  # {' '.join(notes)}" if notes else "")


def _program(program: ProgramDifference) -> Iterator[str]:
    counts = ", ".join(
        f"{program.count(kind):,} {kind}"
        for kind in ("added", "removed", "changed", "rewired")
        if program.count(kind)
    )
    yield f"program {program.name}: {program.same:,} calls the same" + (f", {counts}" if counts else "")
    for layer in program.layers:
        yield ""
        yield f"{layer.layer or '(no layer)'}: {layer_costs(layer)}"
        yield from (f"  {_MARKS[change.kind]} {row_text(change)}" for change in layer.changes)
    if program.outputs:
        yield ""
        yield from (f"  ~ {text}" for text in program.outputs)


def _signed(change: float, spelled: object) -> str:
    assert callable(spelled)
    if not change:
        return "0"
    return ("+" if change > 0 else "-") + str(spelled(abs(change)))
