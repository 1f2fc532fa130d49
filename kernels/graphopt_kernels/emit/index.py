"""Where in a tensor an element lies: affine expressions over the loops of a kernel.

A kernel runs over *axes*, each with an extent. The element of a value that is wanted is given by one
``Affine`` for each dimension of the value. View operators turn the indices of their result into those of
their input; none of them costs anything. An expression that a reshape cannot divide exactly asks for an
axis to be split in two (``Split``): the whole kernel is then built again over the finer axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

__all__ = ["Affine", "Axis", "Bounds", "Indices", "Split", "Unindexable", "flat", "strides_of", "unflat"]


@dataclass(frozen=True)
class Axis:
    """A loop of the kernel. ``reduced`` axes are those that row reductions run along."""

    name: str
    extent: int
    reduced: bool = False


@dataclass(frozen=True)
class Affine:
    """``constant`` plus each atom times its factor. An atom is an ``Axis`` or a value of the kernel that
    was loaded from a tensor of indices."""

    terms: tuple[tuple[Any, int], ...] = ()
    constant: int = 0

    @staticmethod
    def of(terms: Mapping[Any, int], constant: int = 0) -> Affine:
        return Affine(tuple(sorted(((a, f) for a, f in terms.items() if f), key=_order)), constant)

    @staticmethod
    def atom(atom: Any) -> Affine:
        return Affine(((atom, 1),))

    def __add__(self, other: Affine | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.terms, self.constant + other)
        sums = dict(self.terms)
        for atom, factor in other.terms:
            sums[atom] = sums.get(atom, 0) + factor
        constant: int = self.constant + other.constant
        return Affine.of(sums, constant)

    def __mul__(self, factor: int) -> Affine:
        return Affine.of({a: f * factor for a, f in self.terms}, self.constant * factor)

    @property
    def axes(self) -> frozenset[Axis]:
        return frozenset(a for a, _ in self.terms if isinstance(a, Axis))


Indices: TypeAlias = tuple[Affine, ...]


def _order(term: tuple[Any, int]) -> tuple[int, str]:
    # Outer loops first. Values have no order of their own but their number.
    return -abs(term[1]), str(getattr(term[0], "name", term[0]))


class Unindexable(Exception):
    """A view whose elements no affine expression finds."""


class Split(Exception):
    """``axis`` has to become two, the inner one of extent ``inner``."""

    def __init__(self, axis: Axis, inner: int) -> None:
        super().__init__(f"split {axis.name} of {axis.extent} into {axis.extent // inner} x {inner}")
        self.axis, self.inner = axis, inner


@dataclass(frozen=True)
class Bounds:
    """What values atoms take: [low, high). Within a part of a concatenation an axis takes fewer."""

    narrowed: Mapping[Any, tuple[int, int]] = field(default_factory=dict)
    sizes: Mapping[Any, int] = field(default_factory=dict)
    """For atoms that are loaded indices: the size of the dimension that they index."""

    def range(self, atom: Any) -> tuple[int, int]:
        if atom in self.narrowed:
            return self.narrowed[atom]
        return (0, atom.extent) if isinstance(atom, Axis) else (0, self.sizes[atom])

    def of(self, index: Affine) -> tuple[int, int]:
        """The least and the largest value of an expression."""
        low = high = index.constant
        for atom, factor in index.terms:
            first, end = self.range(atom)
            ends = factor * first, factor * (end - 1)
            low, high = low + min(ends), high + max(ends)
        return low, high

    def narrow(self, atom: Any, low: int, high: int) -> Bounds:
        first, end = self.range(atom)
        return Bounds({**self.narrowed, atom: (max(first, low), min(end, high))}, self.sizes)


def strides_of(shape: Sequence[int]) -> list[int]:
    """Elements between neighbours along each dimension of a contiguous tensor."""
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def flat(indices: Iterable[Affine], strides: Iterable[int]) -> Affine:
    """The position that ``indices`` lead to."""
    total = Affine()
    for index, stride in zip(indices, strides, strict=True):
        total = total + index * stride
    return total


def unflat(position: Affine, shape: Sequence[int], bounds: Bounds) -> Indices:
    """The indices into a contiguous tensor of ``shape`` that lead to ``position``.

    Each term goes to the dimension that its factor steps along. Exact: raises ``Split`` where a finer
    axis would be, ``Unindexable`` where a carry from one dimension into the next cannot be ruled out.
    """
    strides = strides_of(shape)
    found: list[dict[Any, int]] = [{} for _ in shape]
    constants = [0] * len(shape)
    for atom, factor in position.terms:
        at = next((i for i, s in enumerate(strides) if shape[i] > 1 and abs(factor) >= s), None)
        if at is None or abs(factor) % strides[at]:
            raise Unindexable(f"steps of {factor} in {tuple(shape)}")
        step = abs(factor) // strides[at]
        if isinstance(atom, Axis) and step * (atom.extent - 1) >= shape[at]:
            inner = shape[at] // step
            outermost = all(size == 1 for size in shape[:at])
            if not outermost and shape[at] % step == 0 and inner > 1 and atom.extent % inner == 0:
                raise Split(atom, inner)
        found[at][atom] = factor // strides[at]
    rest = position.constant
    for i, stride in enumerate(strides):
        if shape[i] > 1:
            constants[i], rest = divmod(rest, stride)
    indices = tuple(Affine.of(terms, constant) for terms, constant in zip(found, constants, strict=True))
    # A remainder of the wrong dimension shows as an index out of range.
    for i, index in enumerate(indices):
        low, high = bounds.of(index)
        if low < 0 or high >= shape[i]:
            return _carried(indices, shape, bounds)
    if rest:
        raise Unindexable(f"a step of {rest} in {tuple(shape)}")
    return indices


def _carried(indices: Indices, shape: Sequence[int], bounds: Bounds) -> Indices:
    """Bring constants that were put into one dimension back where they belong."""
    strides = strides_of(shape)
    result = list(indices)
    for i in range(len(shape) - 1, 0, -1):
        low, high = bounds.of(result[i])
        if low < 0 or high >= shape[i]:
            carry = low // shape[i]
            if (high // shape[i]) != carry:
                raise Unindexable(f"{tuple(shape)} is crossed within an axis")
            above = next((j for j in range(i - 1, -1, -1) if shape[j] > 1), None)
            if above is None:
                raise Unindexable(f"{tuple(shape)} is left")
            result[i] = result[i] + -carry * shape[i]
            result[above] = result[above] + carry * (shape[i] * strides[i] // strides[above])
    low, high = bounds.of(result[0]) if result else (0, 0)
    if result and (low < 0 or high >= shape[0]):
        raise Unindexable(f"{tuple(shape)} is left")
    return tuple(result)
