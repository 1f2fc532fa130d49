"""How a kernel runs over its axes: loops merged where nothing tells them apart, the shape of its tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from graphopt_kernels.emit.build import Built, NotFusible
from graphopt_kernels.emit.index import Affine, Axis
from graphopt_kernels.emit.tile import Value

__all__ = ["Loop", "Loops", "Shape", "loops_of", "merged", "power_of_two", "stepped_through"]

Shape = Literal["pointwise", "rows", "looped rows", "columns", "product", "attention"]

PERSISTENT = 16384
"""Longest row that one program holds: 16 warps of 32 elements a thread. Longer rows are read again for each
step; twice as long ones of several operands spill registers."""


PERSISTENT_SUMS = 8192
"""The same where sums over rows are held beside the row: the registers are shared."""

FEW = 16
"""Programs that would leave most of a GPU idle over long rows; the library splits such reductions."""


@dataclass(frozen=True)
class Loop:
    """Adjacent axes that every expression steps through as one."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def extent(self) -> int:
        return prod(axis.extent for axis in self.axes)

    @property
    def innermost(self) -> Axis:
        return self.axes[-1]


@dataclass(frozen=True)
class Loops:
    """``outer`` and ``inner`` loops, outermost first; ``inner`` are those that rows run along.
    ``whole_rows``:
    whether something is reduced along rows, so that a program needs all of one."""

    shape: Shape
    outer: tuple[Loop, ...]
    inner: tuple[Loop, ...]
    whole_rows: bool = False

    @property
    def rows(self) -> int:
        """Elements outside of rows; of a pointwise kernel all of them."""
        return prod(loop.extent for loop in self.outer)

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return prod(loop.extent for loop in self.inner)

    def terms(self, position: Affine) -> list[tuple[Loop | Value, int]]:
        """``position`` as factors of loops and of loaded indices."""
        factors = dict(position.terms)
        found: list[tuple[Loop | Value, int]] = []
        for loop in (*self.outer, *self.inner):
            factor = factors.get(loop.innermost, 0)
            if factor:
                found.append((loop, factor))
        found += [(atom, factor) for atom, factor in position.terms if isinstance(atom, Value)]
        return found


def power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def loops_of(built: Built) -> Loops:
    """The loops of a kernel."""
    values = built.values
    positions, single = stepped_through(built)
    kinds = {value.kind for value in values}
    largest = max(built.stores, key=lambda s: built.outputs[s.output].numel())
    steps = dict(largest.position.terms)
    # Neighbours in the largest output go to neighbouring threads. Sums over rows are written in the order
    # of axes.
    ordered = sorted(built.tile.axes, key=lambda a: -steps.get(a, 0))
    outer = merged([a for a in ordered if not a.reduced], positions, single, "x")
    rows = built.tile.axes if "column" in kinds else ordered
    inner = merged([a for a in rows if a.reduced], positions, single, "r")
    shape: Shape = "pointwise"
    columns = prod(loop.extent for loop in inner)
    if "column" in kinds:
        if "row" in kinds and columns > PERSISTENT_SUMS:
            raise NotFusible.because(
                f"rows of {columns} elements are too long for sums over rows beside them"
            )
        shape = "columns"
    elif inner:
        shape = "rows" if columns <= PERSISTENT else "looped rows"
    loops = Loops(shape, tuple(outer), tuple(inner), "row" in kinds)
    if "row" in kinds and loops.rows < FEW and columns > PERSISTENT:
        raise NotFusible.because(f"{columns} elements are reduced by {loops.rows} programs alone")
    return loops


def stepped_through(built: Built) -> tuple[list[Affine], set[Axis]]:
    """All positions of a kernel, and the axes that conditions tell apart from their neighbours."""
    positions = [store.position for store in built.stores]
    single: set[Axis] = set()
    for value in built.values:
        if value.kind == "load":
            positions.append(value.payload[1])
            single.update(condition.axis for condition in value.payload[2])
        elif value.kind == "index":
            positions.append(value.payload)
        elif value.kind == "within":
            single.add(value.payload.axis)
    return positions, single


def merged(axes: Sequence[Axis], positions: Iterable[Affine], single: set[Axis], letter: str) -> list[Loop]:
    """Axes that every position steps through as through one axis become one loop."""
    factors = [dict(position.terms) for position in positions]
    groups: list[list[Axis]] = []
    for axis in axes:
        if groups and axis not in single and groups[-1][-1] not in single:
            before = groups[-1][-1]
            if all(f.get(before, 0) == f.get(axis, 0) * axis.extent for f in factors):
                groups[-1].append(axis)
                continue
        groups.append([axis])
    return [Loop(f"{letter}{i}", tuple(group)) for i, group in enumerate(groups)]
