"""Values of a kernel: what is loaded, computed and reduced for one element of its loops.

A value is made once for each way of looking at it: reading a tensor row-wise in one place and column-wise in
another gives two loads. Equal values are one object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt_kernels.emit.index import Affine, Axis

__all__ = ["Condition", "Store", "Tile", "Value", "computed_in"]


@dataclass(frozen=True)
class Condition:
    """``low <= axis < high``."""

    axis: Axis
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Value:
    """One value. ``kind`` and what ``payload`` is for it:

    ``constant``: the number; ``load``: (input, position ``Affine``, conditions); ``index``: an ``Affine``;
    ``within``: a ``Condition``; ``op``: name in ``pointwise.TEXTS``; ``row``, ``column``: a reduction along
    the reduced axes or along all others, by name; ``dot``: the sum of products of its two arguments along the
    reduced axes, by the dtype that they are multiplied in.

    ``dtype`` is what ATen gives; values of 16-bit floats are held in float32, rounded to their dtype.
    ``axes``: those that the value depends on.
    """

    number: int
    kind: str
    payload: Any
    args: tuple[Value, ...]
    dtype: torch.dtype
    axes: frozenset[Axis]

    def __str__(self) -> str:
        return f"v{self.number}"


@dataclass(frozen=True)
class Store:
    """``value`` goes to ``position`` of output number ``output``."""

    output: int
    value: Value
    position: Affine


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What a value of ``dtype`` is held and computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Tile:
    """The values of one kernel, each once."""

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.axes = tuple(axes)
        self.reduced = frozenset(axis for axis in axes if axis.reduced)
        self.outer = frozenset(axis for axis in axes if not axis.reduced)
        self._known: dict[Any, Value] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def values(self) -> list[Value]:
        return list(self._known.values())

    def _make(
        self, kind: str, payload: Any, args: tuple[Value, ...], dtype: torch.dtype, axes: frozenset[Axis]
    ) -> Value:
        # 1, 1.0 and True are equal as keys and different as numbers.
        key = (kind, type(payload), repr(payload) if kind == "constant" else payload, args, dtype)
        if key not in self._known:
            self._known[key] = Value(len(self._known), kind, payload, args, dtype, axes)
        return self._known[key]

    def constant(self, number: bool | int | float, dtype: torch.dtype) -> Value:
        if dtype == torch.bool:
            number = bool(number)
        else:
            number = float(number) if dtype.is_floating_point else int(number)
        return self._make("constant", number, (), dtype, frozenset())

    def load(
        self, source: int, position: Affine, conditions: tuple[Condition, ...], dtype: torch.dtype
    ) -> Value:
        indices = tuple(atom for atom, _ in position.terms if isinstance(atom, Value))
        axes = position.axes | {c.axis for c in conditions}
        axes = axes.union(*(i.axes for i in indices))
        return self._make("load", (source, position, conditions), indices, dtype, axes)

    def index(self, position: Affine, dtype: torch.dtype) -> Value:
        indices = tuple(atom for atom, _ in position.terms if isinstance(atom, Value))
        return self._make("index", position, indices, dtype, position.axes.union(*(i.axes for i in indices)))

    def within(self, condition: Condition) -> Value:
        return self._make("within", condition, (), torch.bool, frozenset({condition.axis}))

    def op(self, name: str, args: Sequence[Value], dtype: torch.dtype) -> Value:
        return self._make("op", name, tuple(args), dtype, frozenset().union(*(a.axes for a in args)))

    def reduce(self, name: str, value: Value, *, column: bool, dtype: torch.dtype) -> Value:
        """``value`` reduced along the reduced axes, or (``column``) along all the others."""
        gone = self.outer if column else self.reduced
        return self._make("column" if column else "row", name, (value,), dtype, value.axes - gone)

    def dot(self, left: Value, right: Value, multiplied: torch.dtype, dtype: torch.dtype) -> Value:
        """The sum along the reduced axes of ``left`` times ``right``, numbers of dtype ``multiplied``, held
        in ``dtype``."""
        return self._make("dot", multiplied, (left, right), dtype, self.outer)
