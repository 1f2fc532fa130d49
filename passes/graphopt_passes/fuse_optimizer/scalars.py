"""Numbers of a program: known ones, tensors of one element, and what is computed from both.

A number is a coefficient times powers of what is known at run time alone, so that equal ones compare as
equal and factors cancel: ``(0.001 * clip * clip) / (clip * clip)`` is 0.001.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

__all__ = [
    "ONE",
    "ZERO",
    "Root",
    "Scalar",
    "Total",
    "built",
    "close",
    "known",
    "leaves_of",
    "of_node",
    "over",
    "plus",
]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Scalar:
    """``coefficient`` times each factor to its power."""

    coefficient: float
    factors: frozenset[tuple[Factor, int]] = frozenset()

    @property
    def value(self) -> float | None:
        """The number, where it is known."""
        return None if self.factors else self.coefficient

    def __mul__(self, other: Scalar) -> Scalar:
        return _product(self.coefficient * other.coefficient, self, other, 1)

    def __neg__(self) -> Scalar:
        return Scalar(-self.coefficient, self.factors)

    def root(self) -> Scalar:
        """Its square root."""
        if not self.factors and self.coefficient >= 0:
            return Scalar(math.sqrt(self.coefficient))
        if all(power < 0 for _, power in self.factors):
            inverse = frozenset((factor, -power) for factor, power in self.factors)
            return Scalar(1.0, frozenset({(Root(Scalar(1 / self.coefficient, inverse)), -1)}))
        return Scalar(1.0, frozenset({(Root(self), 1)}))


@dataclass(frozen=True)
class Total:
    """A sum of two numbers of which one at least is not known."""

    terms: tuple[Scalar, Scalar]


@dataclass(frozen=True)
class Root:
    """The square root of a number that is not known."""

    of: Scalar


Factor = fx.Node | Total | Root

ZERO, ONE = Scalar(0.0), Scalar(1.0)


def known(value: float) -> Scalar:
    return Scalar(float(value))


def of_node(node: fx.Node) -> Scalar:
    """What a tensor of one element holds."""
    return Scalar(1.0, frozenset({(node, 1)}))


def over(a: Scalar, b: Scalar) -> Scalar | None:
    """``a / b``; ``None`` where ``b`` is 0."""
    if b.coefficient == 0:
        return None
    return _product(a.coefficient / b.coefficient, a, b, -1)


def plus(a: Scalar, b: Scalar) -> Scalar:
    if a.coefficient == 0:
        return b
    if b.coefficient == 0:
        return a
    if a.factors == b.factors:
        return Scalar(a.coefficient + b.coefficient, a.factors)
    return Scalar(1.0, frozenset({(Total((a, b)), 1)}))


def close(a: Scalar, b: Scalar) -> bool:
    """Whether two numbers are the same but for the rounding of known ones."""
    return a.factors == b.factors and math.isclose(a.coefficient, b.coefficient, rel_tol=1e-9, abs_tol=1e-12)


def _product(coefficient: float, a: Scalar, b: Scalar, sign: int) -> Scalar:
    if coefficient == 0:
        return ZERO
    powers: dict[Factor, int] = dict(a.factors)
    for factor, power in b.factors:
        powers[factor] = powers.get(factor, 0) + sign * power
    return Scalar(coefficient, frozenset((f, power) for f, power in powers.items() if power))


def built(
    scalar: Scalar, call: Callable[..., fx.Node], order: Mapping[fx.Node, int], made: dict[Scalar, fx.Node]
) -> fx.Node:
    """A node that holds a number which is not known, made by ``call(operator, *args)``. ``order``: positions
    of nodes, so that the same comes out each time; ``made``: what was built before."""
    if scalar in made:
        return made[scalar]
    result: fx.Node | None = None
    factors = sorted(scalar.factors, key=lambda item: (item[1] < 0, _rank(item[0], order)))
    for factor, power in factors:
        if isinstance(factor, fx.Node):
            value = factor
        elif isinstance(factor, Root):
            value = call(_aten.sqrt.default, built(factor.of, call, order, made))
        else:
            value = _total(factor, call, order, made)
        for _ in range(abs(power)):
            if result is None:
                result = value if power > 0 else call(_aten.reciprocal.default, value)
            else:
                result = call(_aten.mul.Tensor if power > 0 else _aten.div.Tensor, result, value)
    assert result is not None, "a known number needs no node"
    if scalar.coefficient != 1.0:
        result = call(_aten.mul.Tensor, result, scalar.coefficient)
    made[scalar] = result
    return result


def _total(
    total: Total, call: Callable[..., fx.Node], order: Mapping[fx.Node, int], made: dict[Scalar, fx.Node]
) -> fx.Node:
    first, second = sorted(total.terms, key=lambda term: term.value is not None)
    other = second.value if second.value is not None else built(second, call, order, made)
    return call(_aten.add.Tensor, built(first, call, order, made), other)


def _rank(factor: Factor, order: Mapping[fx.Node, int]) -> int:
    if isinstance(factor, fx.Node):
        return order[factor]
    terms = (factor.of,) if isinstance(factor, Root) else factor.terms
    return max((_rank(inner, order) for term in terms for inner, _ in term.factors), default=-1)


def leaves_of(numbers: Iterable[Scalar]) -> list[fx.Node]:
    """The tensors that numbers are computed from."""
    found: dict[fx.Node, None] = {}
    stack: list[Scalar] = list(numbers)
    while stack:
        for factor, _ in stack.pop().factors:
            if isinstance(factor, fx.Node):
                found[factor] = None
            else:
                stack.extend((factor.of,) if isinstance(factor, Root) else factor.terms)
    return list(found)
