"""Programs as text: one deterministic format for people, golden tests, documents and errors.

::

    program g0 @ semantic  fingerprint=2f1c9ab04d5e6f70  device=cpu
      symbol     B = %0[0]
      parameter  norm.weight : f32[8]
      input      %0 : f32[B,8]

    %1 = aten.pow.Tensor_Scalar(%0, 2) : f32[B,8]        # norm

      output     %1 : f32[B,8]

``docs/dumps.md`` describes the whole of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO

import torch.fx as fx

from graphopt.budget import format_bytes
from graphopt.dump.listing import Listing, Statement, listing_of, statement
from graphopt.errors import UnknownNameError
from graphopt.program import Program, layer_of
from graphopt.schedule import Schedule
from graphopt.values import Leaf, value_table

__all__ = ["COLUMNS", "dump_joint_with_schedule", "program_text", "write_text"]

COLUMNS = 100
_COMMENT_COLUMN = 56
_INDENT = " " * 6


def program_text(program: Program, *, marks: Mapping[str, str] | None = None) -> str:
    """The program as text, at most ``COLUMNS`` wide where no single name is wider.

    ``marks`` maps fx node names to what to write beside them, such as the ``"recompute
    insert-checkpoints"`` of a lowered backward.
    """
    listing = listing_of(program, marks=marks)
    return _join([_title(program, listing, str(program.level)), *_body(listing)])


def write_text(program: Program, stream: IO[str]) -> None:
    """Write ``program_text(program)`` to ``stream``."""
    stream.write(program_text(program))


def dump_joint_with_schedule(program: Program, schedule: Schedule, *, pass_id: str = "") -> str:
    """A joint program in the order in which ``schedule`` runs it.

    The forward section marks what is handed over (``<saved>``), the ``saved`` section lists it
    with the bytes of each storage (one that another saved value or a graph input holds is said to
    be shared), the backward section marks what runs again (``<recompute PASS>``, with the
    ``pass_id`` that chose so). A value keeps its number when it runs again. Raises
    ``UnknownNameError`` if the schedule names a node that the program lacks.
    """
    by_name = {node.name: node for node in program.graph.nodes}
    for name in (*schedule.forward, *schedule.saved, *schedule.backward):
        if name not in by_name:
            raise UnknownNameError(f"node of program {program.name}", name, by_name)
    listing = listing_of(program)
    saved, forward = set(schedule.saved), set(schedule.forward)
    again = f"recompute {pass_id}".rstrip()

    def lines(name: str, mark: str) -> list[str]:
        node = by_name[name]
        # Constants stand in the header: a schedule may list them, but nothing runs.
        return [] if node.op == "get_attr" else _wrapped(statement(listing.names, node, listing.device, mark))

    out = [_title(program, listing, f"{program.level}, scheduled"), *_inputs(listing), "", "forward:"]
    for name in schedule.forward:
        out += lines(name, "saved" if name in saved else "")
    out += ["", *_saved(program, listing, schedule), "", "backward:"]
    for name in schedule.backward:
        out += lines(name, again if name in forward else "")
    return _join([*out, "", *_outputs(listing), *_subgraphs(listing)])


def _title(program: Program, listing: Listing, level: str) -> str:
    device = f"  device={listing.device}" if listing.device else ""
    return f"program {program.name} @ {level}  fingerprint={program.fingerprint}{device}"


def _body(listing: Listing) -> Iterator[str]:
    yield from _inputs(listing)
    yield ""
    for item in listing.statements:
        yield from _wrapped(item)
    yield ""
    yield from _outputs(listing)
    yield from _subgraphs(listing)


def _inputs(listing: Listing) -> Iterator[str]:
    passed = {item.name for item in listing.inputs if item.role == "symbol"}
    for name in listing.symbols:
        if name not in passed:
            yield from _commented(_symbol(listing, name), "")
    for item in listing.inputs:
        if item.name in listing.symbols or item.type == f"int = {item.name}":
            yield from _commented(_symbol(listing, item.name), item.note)
        else:
            yield from _commented(f"  {item.role:<9}  {item.name} : {item.type}", item.note)


def _symbol(listing: Listing, name: str) -> str:
    """A size that no input dimension defines is an input of its own."""
    definition = listing.symbols.get(name, "")
    return f"  {'symbol':<9}  {name}" + (f" = {definition}" if definition else " : int")


def _outputs(listing: Listing) -> Iterator[str]:
    for item in listing.outputs:
        typed = f"{item.name} : {item.type}" if item.type else item.name
        yield from _commented(f"  {item.role:<9}  {typed}", item.note)


def _subgraphs(listing: Listing) -> Iterator[str]:
    for name, inner in listing.subgraphs.items():
        yield ""
        yield f"subgraph @{name}"
        yield from _body(inner)


def _saved(program: Program, listing: Listing, schedule: Schedule) -> Iterator[str]:
    table = value_table(program.graph)
    by_name = {node.name: node for node in program.graph.nodes}
    held = {_root(table, spec.node, 0) for spec in program.signature.inputs if table.get(spec.node)}
    rows, total = [], 0
    for name in schedule.saved:
        new = 0
        for index, _ in enumerate(table[name]):
            root = _root(table, name, index)
            if root not in held:
                held.add(root)
                new += table[root[0]][root[1]].bytes
        total += new
        size = format_bytes(new) if new or not table[name] else "shared"
        node = by_name[name]
        rows.append((f"  {size:>10}  {listing.names.of(node)} : {_type_of(listing, node)}", layer_of(node)))
    values = f"{len(schedule.saved)} value" + ("" if len(schedule.saved) == 1 else "s")
    yield f"saved: {values}, {format_bytes(total)}"
    for row, layer in rows:
        yield from _commented(row, layer)


def _type_of(listing: Listing, node: fx.Node) -> str:
    return listing.names.type(node.meta.get("val"))


def _root(table: Mapping[str, tuple[Leaf, ...]], node: str, index: int) -> tuple[str, int]:
    """The value whose storage leaf ``index`` of ``node`` shares, followed to its origin."""
    while (alias := table[node][index].alias) is not None:
        node, index = alias
    return node, index


def _wrapped(item: Statement) -> list[str]:
    comment = "  ".join(part for part in (item.layer, f"<{item.mark}>" if item.mark else "") if part)
    return _commented(f"{item.name} = {item.call} : {item.type}", comment)


def _commented(text: str, comment: str) -> list[str]:
    """``text`` broken after commas to fit, then the comment, on the last line if it fits there."""
    lines = _broken(text)
    if not comment:
        return lines
    last = lines[-1]
    column = max(_COMMENT_COLUMN, len(last) + 2)
    if column + 2 + len(comment) > COLUMNS:
        # Closer to the text than the common column, as long as two spaces are between them.
        column = COLUMNS - 2 - len(comment)
        if column < len(last) + 2:
            lines.append("")
            column = max(len(_INDENT), min(column, _COMMENT_COLUMN))
    lines[-1] = f"{lines[-1].ljust(column)}# {comment}"
    return lines


def _broken(text: str) -> list[str]:
    if len(text) <= COLUMNS:
        return [text]
    lines, current = [], ""
    for piece in _pieces(text):
        if current.strip() and len(current) + len(piece.rstrip()) > COLUMNS:
            lines.append(current.rstrip())
            current, piece = _INDENT, piece.lstrip()
        current += piece
    return [*lines, current.rstrip()]


def _pieces(text: str) -> list[str]:
    """Where a line may break: after ``", "`` and before the type."""
    parts = text.replace(" : ", "\0 : ", 1).replace(", ", ", \0").split("\0")
    return [part for part in parts if part]


def _join(lines: list[str]) -> str:
    return "\n".join(line.rstrip() for line in lines) + "\n"
