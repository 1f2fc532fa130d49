"""Programs as rows to be compared: of a program at hand, or of a JSON dump of one.

A row of a program at hand also knows what the cost model says of it and which captured nodes are behind it;
one that was read from a file does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt.cost import CostModel
from graphopt.dump.json import PROGRAM_VERSION, program_json
from graphopt.dump.listing import listing_of
from graphopt.errors import TargetError
from graphopt.program import Program, tensor_leaves
from graphopt.provenance import note_of

__all__ = ["ProgramRows", "Row", "Side", "read_programs", "rows_of"]


@dataclass(frozen=True)
class Row:
    """One call of a program.

    ``form`` is the call with NUL where it reads a value, ``operands`` are those values in order. ``own`` is
    the node's name in the capture and ``origin`` the captured nodes that a pass made it of; ``seconds``,
    ``flops`` and ``bytes`` (of its results) are of the node run by itself. Unknown is ``""`` or ``None``.
    """

    name: str
    op: str
    form: str
    operands: tuple[str, ...]
    type: str
    layer: str
    mark: str
    own: str = ""
    origin: frozenset[str] = frozenset()
    seconds: float | None = None
    flops: int | None = None
    bytes: int | None = None

    @property
    def call(self) -> str:
        """``aten.add.Tensor(%1, %2)``."""
        parts = self.form.split("\0")
        return "".join(a + b for a, b in zip(parts, (*self.operands, ""), strict=True))


@dataclass(frozen=True)
class ProgramRows:
    """One program: its calls in order, and for each input what tells it from the others, and its type.
    ``outputs``: role, what it is of, and the value."""

    name: str
    level: str
    fingerprint: str
    inputs: Mapping[str, str]
    rows: tuple[Row, ...]
    outputs: tuple[tuple[str, str, str], ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """What is compared. ``peak_bytes`` and ``seconds`` are predicted of the whole step, ``None`` if unknown.

    ``capture`` tells sides whose captured nodes are the same ones: provenance means nothing across others.
    """

    label: str
    programs: tuple[ProgramRows, ...]
    peak_bytes: int | None = None
    seconds: float | None = None
    capture: str = ""


def rows_of(program: Program, cost: CostModel) -> Iterator[ProgramRows]:
    """The rows of a program and of the bodies of its higher-order operators."""
    document = program_json(program)
    for found, listing in zip(_documents(document), _listings(listing_of(program)), strict=True):
        rows = []
        for row, line in zip(found.rows, listing.statements, strict=True):
            note, price = note_of(line.node), cost.node(line.node)
            held = sum(
                int(t.numel()) * t.element_size()
                for t in tensor_leaves(line.node.meta.get("val"))
                if isinstance(t.numel(), int)
            )
            rows.append(
                Row(
                    row.name, row.op, row.form, row.operands, row.type, row.layer, row.mark, line.node.name,
                    frozenset(note.origin) if note is not None else frozenset(), price.seconds, price.flops,
                    held,
                )
            )  # fmt: skip
        yield ProgramRows(
            found.name, found.level, found.fingerprint, found.inputs, tuple(rows), found.outputs, found.types
        )


def read_programs(text: str, source: str) -> tuple[ProgramRows, ...]:
    """The programs in what ``graphopt dump -f json`` wrote. Raises ``TargetError`` naming ``source``."""
    decoder, found, at = json.JSONDecoder(), [], 0
    try:
        while text[at:].strip():
            at += len(text[at:]) - len(text[at:].lstrip())
            document, at = decoder.raw_decode(text, at)
            schema = document.get("schema") if isinstance(document, dict) else None
            if schema != PROGRAM_VERSION:
                raise TargetError(
                    f"{source} has schema {schema!r}, expected {PROGRAM_VERSION!r}",
                    hint="write it with graphopt dump -f json",
                )
            found += _documents(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TargetError(
            f"{source} is no dump of programs: {type(error).__name__}: {error}",
            hint="write it with graphopt dump -f json",
        ) from error
    if not found:
        raise TargetError(f"{source} holds no program", hint="write it with graphopt dump -f json")
    return tuple(found)


def _listings(listing: Any) -> Iterator[Any]:
    yield listing
    for inner in listing.subgraphs.values():
        yield from _listings(inner)


def _documents(document: Mapping[str, Any], within: str = "") -> list[ProgramRows]:
    name = within or document["name"]
    inputs: dict[str, str] = {}
    counts: dict[str, int] = {}
    for item in document["inputs"]:
        role, known = item["role"], item["note"]
        if not known and not item["name"].startswith("%"):
            known = item["name"]
        counts[role] = counts.get(role, 0) + 1
        inputs[item["name"]] = f"{role} {known or counts[role]}"
    rows = tuple(_row(item) for item in document["nodes"])
    outputs = tuple((item["role"], item["note"], item["name"]) for item in document["outputs"])
    level, fingerprint = document.get("level", "body"), document.get("fingerprint", "")
    types = {item["name"]: _type(item["type"]) for item in document["inputs"]}
    found = [ProgramRows(name, level, fingerprint, inputs, rows, outputs, types)]
    for inner, body in document["subgraphs"].items():
        found += _documents({**body, "level": document.get("level", "body")}, f"{name}@{inner}")
    return found


def _row(item: Mapping[str, Any]) -> Row:
    operands: list[str] = []

    def spelled(value: Any) -> str:
        if isinstance(value, Mapping):
            if "ref" in value:
                operands.append(value["ref"])
                return "\0"
            return str(value["text"])
        if isinstance(value, list):
            return f"[{', '.join(map(spelled, value))}]"
        return repr(value)

    args: Sequence[Any] = item["args"]
    if item["op"] == "operator.getitem" and len(args) == 2:
        form = f"{spelled(args[0])}[{spelled(args[1])}]"
    else:
        parts = [spelled(arg) for arg in args]
        parts += [f"{key}={spelled(value)}" for key, value in item["kwargs"].items()]
        form = f"{item['op']}({', '.join(parts)})"
    kind = _type(item["type"])
    return Row(item["name"], item["op"], form, tuple(operands), kind, item["layer"], item["mark"])


def _type(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_type, value))})"
    if "text" in value:
        return str(value["text"])
    return f"{value['dtype']}[{','.join(map(str, value['shape']))}]"
