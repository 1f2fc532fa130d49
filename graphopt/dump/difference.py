"""What tells two programs apart: calls are matched by what they compute and where they come from.

1. By structure: calls that compute the same of the same inputs.
2. By provenance, where both programs come from one capture: the same captured node with the same operator,
   or made by passes of the same captured nodes.
3. In order: what is left of a layer, by operator and type, then by operator alone.

What a pass made is told to stand in place of the calls that it was made of.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TypeVar

from graphopt.dump.rows import ProgramRows, Row, Side
from graphopt.errors import InputsError

__all__ = ["Change", "Difference", "LayerDelta", "ProgramDifference", "difference"]

N = TypeVar("N", int, float)

_WINDOW = 400
"""Rows that are aligned as sequences at once: that takes the product of their numbers."""


@dataclass(frozen=True)
class Change:
    """One call that is ``"added"``, ``"removed"``, ``"changed"`` (operator's arguments or type) or
    ``"rewired"`` (reads other values). ``replaces``: names in A of the removed calls that it was made of."""

    kind: str
    before: Row | None
    after: Row | None
    detail: str = ""
    replaces: tuple[str, ...] = ()

    @property
    def layer(self) -> str:
        row = self.after if self.after is not None else self.before
        assert row is not None
        return row.layer


@dataclass(frozen=True)
class LayerDelta:
    """One layer: its changes in order, and what its calls take, op by op, in A and in B.

    ``seconds`` and ``bytes`` (of all results) are pairs of sums, ``None`` where a side does not know.
    """

    layer: str
    changes: tuple[Change, ...]
    calls: tuple[int, int]
    seconds: tuple[float, float] | None
    flops: tuple[int, int] | None
    bytes: tuple[int, int] | None


@dataclass(frozen=True)
class ProgramDifference:
    """One program of both sides, or of one, which has no rows then: ``layers`` that changed, in the order of
    B, then of A. ``pairs``: rows of A and of B that are one call, changed or not, by index."""

    name: str
    before: ProgramRows
    after: ProgramRows
    pairs: tuple[tuple[int, int], ...]
    calls: tuple[int, int]
    same: int
    layers: tuple[LayerDelta, ...]
    outputs: tuple[str, ...] = ()

    def count(self, kind: str) -> int:
        return sum(change.kind == kind for layer in self.layers for change in layer.changes)


@dataclass(frozen=True)
class Difference:
    a: Side
    b: Side
    programs: tuple[ProgramDifference, ...]

    @property
    def differs(self) -> bool:
        return any(program.layers or program.outputs for program in self.programs)

    def __str__(self) -> str:
        from graphopt.dump.difference_text import difference_text

        return difference_text(self)

    def _repr_html_(self) -> str:
        from graphopt.dump.difference_html import difference_html

        return difference_html(self)


def difference(a: Side, b: Side) -> Difference:
    """Compare the programs of two sides, by name where they agree in names, else in order.

    Raises ``InputsError`` for programs of different levels: every call would be another.
    """
    levels = [sorted({program.level for program in side.programs}) for side in (a, b)]
    if levels[0] != levels[1]:
        raise InputsError(
            f"A is at the {'/'.join(levels[0])} level, B at the {'/'.join(levels[1])} level: "
            "programs of one level can be compared"
        )
    ours = {program.name: program for program in a.programs}
    theirs = {program.name: program for program in b.programs}
    if not ours.keys() & theirs.keys():
        theirs = dict(zip([*ours, *theirs], b.programs, strict=False))
    one_capture = bool(a.capture) and a.capture == b.capture
    names = [*theirs, *(name for name in ours if name not in theirs)]
    found = tuple(_compared(name, ours.get(name), theirs.get(name), one_capture) for name in names)
    return Difference(a, b, found)


def _compared(
    name: str, a: ProgramRows | None, b: ProgramRows | None, one_capture: bool
) -> ProgramDifference:
    nothing = ProgramRows(name, "", "", {}, ())
    a, b = a or nothing, b or nothing
    pairs = _Matching(a, b, one_capture).pairs()
    changes = _changes(a, b, pairs)
    return ProgramDifference(
        name,
        a,
        b,
        tuple((i, j) for j, i in pairs.items()),
        (len(a.rows), len(b.rows)),
        len(pairs) - sum(change.kind in ("changed", "rewired") for change in changes),
        _by_layer(a, b, changes),
        _outputs(a, b, pairs),
    )


class _Matching:
    """Finds which row of B is which of A; rows go by their index."""

    def __init__(self, a: ProgramRows, b: ProgramRows, one_capture: bool) -> None:
        self.a, self.b, self.one_capture = a, b, one_capture
        self.found: dict[int, int] = {}
        self.taken: set[int] = set()

    def pairs(self) -> dict[int, int]:
        """From indices of B to indices of A."""
        keys_a, keys_b = _structure(self.a), _structure(self.b)
        # In its own layer first: equal calls of two layers are told apart by where they are.
        self._in_order(
            lambda i: (keys_a[i], self.a.rows[i].layer), lambda j: (keys_b[j], self.b.rows[j].layer)
        )
        self._in_order(lambda i: keys_a[i], lambda j: keys_b[j])
        if self.one_capture:
            self._in_order(lambda i: _provenance(self.a.rows[i]), lambda j: _provenance(self.b.rows[j]))
        self._by_layer(lambda row: (row.form, row.type))
        self._by_layer(lambda row: (row.op, row.type))
        self._by_layer(lambda row: row.op)
        return self.found

    def _left(self) -> tuple[list[int], list[int]]:
        return (
            [i for i in range(len(self.a.rows)) if i not in self.taken],
            [j for j in range(len(self.b.rows)) if j not in self.found],
        )

    def _in_order(self, of_a: Callable[[int], Hashable], of_b: Callable[[int], Hashable]) -> None:
        left_a, left_b = self._left()
        waiting: dict[Hashable, deque[int]] = defaultdict(deque)
        for i in left_a:
            waiting[of_a(i)].append(i)
        for j in left_b:
            queue = waiting.get(of_b(j))
            if queue:
                self._pair(queue.popleft(), j)

    def _by_layer(self, key: Callable[[Row], Hashable]) -> None:
        left_a, left_b = self._left()
        layers: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for i in left_a:
            layers[self.a.rows[i].layer][0].append(i)
        for j in left_b:
            layers[self.b.rows[j].layer][1].append(j)
        for mine, others in layers.values():
            self._align(mine, others, key)

    def _align(self, mine: list[int], others: list[int], key: Callable[[Row], Hashable]) -> None:
        """Pair equal rows of two sequences in order, a window at a time."""
        start, there = 0, 0
        while start < len(mine) and there < len(others):
            ours, theirs = mine[start : start + _WINDOW], others[there : there + _WINDOW]
            keys = [key(self.a.rows[i]) for i in ours], [key(self.b.rows[j]) for j in theirs]
            blocks = SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks()[:-1]
            for block in blocks:
                for k in range(block.size):
                    self._pair(ours[block.a + k], theirs[block.b + k])
            # What follows the last pair may have its like in the next window.
            start += blocks[-1].a + blocks[-1].size if blocks else len(ours)
            there += blocks[-1].b + blocks[-1].size if blocks else len(theirs)

    def _pair(self, i: int, j: int) -> None:
        self.found[j] = i
        self.taken.add(i)


def _structure(program: ProgramRows) -> list[int]:
    """For each row a hash of all that its value is computed from."""
    keys: dict[str, int] = {name: hash(what) for name, what in program.inputs.items()}
    found = []
    for row in program.rows:
        operands = tuple(keys.get(name, hash(name)) for name in row.operands)
        keys[row.name] = hash((row.form, operands, row.type))
        found.append(keys[row.name])
    return found


def _provenance(row: Row) -> Hashable:
    """Equal for rows that stand for the same captured nodes with the same operator; a name alone says
    nothing."""
    return row.op, row.layer, tuple(sorted(row.origin)) or row.own, row.mark


def _changes(a: ProgramRows, b: ProgramRows, pairs: dict[int, int]) -> list[Change]:
    """What is not the same, in the order of B; what was removed stands before the call that follows it."""
    counterpart = _counterparts(a, b, pairs)
    paired = set(pairs.values())
    gone = [i for i in range(len(a.rows)) if i not in paired]
    behind: dict[str, int] = {}
    for i in gone:
        for origin in a.rows[i].origin or {a.rows[i].own} - {""}:
            behind[origin] = i
    waiting = deque(gone)
    found: list[Change] = []
    for j, row in enumerate(b.rows):
        if j in pairs:
            while waiting and waiting[0] < pairs[j]:
                found.append(Change("removed", a.rows[waiting.popleft()], None))
            change = _pair_change(a.rows[pairs[j]], row, counterpart)
            found += [change] if change is not None else []
        else:
            replaced = sorted({behind[name] for name in row.origin if name in behind})
            found.append(Change("added", None, row, replaces=tuple(a.rows[i].name for i in replaced)))
    found += [Change("removed", a.rows[i], None) for i in waiting]
    return found


def _counterparts(a: ProgramRows, b: ProgramRows, pairs: dict[int, int]) -> dict[str, str]:
    """For the values of A, inputs among them, their names in B."""
    names = {what: name for name, what in b.inputs.items()}
    found = {name: names.get(what, "") for name, what in a.inputs.items()}
    return found | {a.rows[i].name: b.rows[j].name for j, i in pairs.items()}


def _pair_change(before: Row, after: Row, counterpart: dict[str, str]) -> Change | None:
    if before.form != after.form:
        return Change("changed", before, after, f"was {before.call}")
    if before.type != after.type:
        return Change("changed", before, after, f"was {before.type}")
    others = [
        f"{new} instead of {old}"
        for old, new in zip(before.operands, after.operands, strict=True)
        if counterpart.get(old, old) != new
    ]
    return Change("rewired", before, after, f"reads {', '.join(dict.fromkeys(others))}") if others else None


def _by_layer(a: ProgramRows, b: ProgramRows, changes: Iterable[Change]) -> tuple[LayerDelta, ...]:
    grouped: dict[str, list[Change]] = {}
    for change in changes:
        grouped.setdefault(change.layer, []).append(change)
    rows_a, rows_b = _rows_by_layer(a), _rows_by_layer(b)
    found = []
    for layer, group in grouped.items():
        mine, others = rows_a.get(layer, []), rows_b.get(layer, [])
        found.append(
            LayerDelta(
                layer,
                tuple(group),
                (len(mine), len(others)),
                _sums(mine, others, lambda row: row.seconds),
                _sums(mine, others, lambda row: row.flops),
                _sums(mine, others, lambda row: row.bytes),
            )
        )
    return tuple(found)


def _rows_by_layer(program: ProgramRows) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in program.rows:
        grouped.setdefault(row.layer, []).append(row)
    return grouped


def _sums(a: Sequence[Row], b: Sequence[Row], read: Callable[[Row], N | None]) -> tuple[N, N] | None:
    values = [[read(row) for row in rows] for rows in (a, b)]
    known = [[value for value in side if value is not None] for side in values]
    if [len(side) for side in known] != [len(side) for side in values]:
        return None
    return sum(known[0]), sum(known[1])


def _outputs(a: ProgramRows, b: ProgramRows, pairs: dict[int, int]) -> tuple[str, ...]:
    """Outputs that are another value, or are there on one side alone."""
    counterpart = _counterparts(a, b, pairs)
    texts = []
    for index in range(max(len(a.outputs), len(b.outputs))):
        old = a.outputs[index] if index < len(a.outputs) else None
        new = b.outputs[index] if index < len(b.outputs) else None
        if old is None or new is None:
            role, note, name = old or new or ("", "", "")
            word = "removed" if new is None else "added"
            texts.append(f"output {index} {word}: {role} {note} {name}".replace("  ", " "))
        elif counterpart.get(old[2], old[2]) != new[2]:
            texts.append(f"output {index} ({new[0]} {new[1]}".rstrip() + f") is {new[2]}, was {old[2]}")
    return tuple(texts)
