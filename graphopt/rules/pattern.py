"""Patterns: what a plain function of operators says of a graph.

::

    mul = operator(aten.mul.Tensor, aten.mul.Scalar, commutes=True)
    softmax = operator(aten.softmax.int)

    def scaled_softmax(scores, scale, dim):
        return softmax(either(mul(scores, scale), scores), dim)

The function is called once, with a ``Capture`` for each of its parameters. A capture stands for any
argument, a node or a literal, the same one wherever the capture is used. Everything else stands for itself;
``...`` matches anything. Arguments that a pattern leaves out have to have their defaults.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from graphopt import _torch
from graphopt.errors import RuleError

__all__ = [
    "Call",
    "Capture",
    "Either",
    "Expression",
    "Given",
    "Operator",
    "Pattern",
    "either",
    "given_to",
    "operator",
    "parameters_of",
]


class Expression:
    """A part of a pattern."""


@dataclass(frozen=True, eq=False)
class Capture(Expression):
    """Any argument, bound to a parameter of the pattern."""

    name: str


@dataclass(frozen=True)
class Operator:
    """One of ``targets``; the first two arguments in any order where it ``commutes``."""

    targets: frozenset[Any]
    commutes: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Call:
        return Call(self, args, kwargs)

    def __str__(self) -> str:
        return " or ".join(sorted(str(target) for target in self.targets))


@dataclass(frozen=True, eq=False)
class Call(Expression):
    """A call of ``operator``. One object that is used twice is one call with two readers."""

    operator: Operator
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Either(Expression):
    """The first of ``options`` that matches; captures of the others are ``None``."""

    options: tuple[Any, ...]


def operator(*targets: Any, commutes: bool = False) -> Operator:
    """What makes calls of any of ``targets`` (operator overloads).

    Raises ``RuleError`` for what is not an operator overload, a packet of overloads for one.
    """
    if not targets:
        raise RuleError("operator() needs one operator overload or more")
    for target in targets:
        if _torch.schema_of(target) is None:
            overloads = getattr(target, "overloads", None)
            known = f": {target}.{overloads()[0]}, for one" if callable(overloads) else ""
            raise RuleError(f"{target} is not an operator overload{known}")
    return Operator(frozenset(targets), commutes)


def either(*options: Any) -> Either:
    """The first of ``options`` that matches. ``either(mul(x, scale), x)`` is a step that may be missing."""
    if len(options) < 2:
        raise RuleError("either() needs two options or more")
    return Either(options)


class Parameter(NamedTuple):
    """Of an operator overload: where it is in the schema, and what it is where it is not given."""

    name: str
    place: int
    default: Any


@functools.cache
def parameters_of(target: Any) -> Mapping[str, Parameter]:
    """Parameters of an operator overload by name, in order."""
    arguments = _torch.schema_of(target).arguments
    return {p.name: Parameter(p.name, k, p.default_value) for k, p in enumerate(arguments)}


class Given(NamedTuple):
    """What a call states of the arguments of an operator, ``(part, *parameter)`` each, and parameters that it
    leaves to their defaults."""

    stated: tuple[tuple[Any, str, int, Any], ...]
    unstated: tuple[Parameter, ...]


def given_to(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given | str:
    """What a pattern's call states of ``target``, or what of it ``target`` does not take."""
    parameters = parameters_of(target)
    foreign = next((name for name in kwargs if name not in parameters), None)
    if len(args) > len(parameters) or foreign is not None:
        return f"argument {foreign!r}" if foreign is not None else f"{len(args)} arguments"
    parts = {**dict(zip(parameters, args, strict=False)), **kwargs}
    stated = tuple((part, *parameters[name]) for name, part in parts.items())
    return Given(stated, tuple(p for p in parameters.values() if p.name not in parts))


@dataclass(frozen=True, eq=False)
class Pattern:
    """``roots`` are what the function returns; the first is where the search begins."""

    captures: tuple[str, ...]
    roots: tuple[Call, ...]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Pattern:
        """The pattern that ``function`` describes.

        Raises ``RuleError`` where it has parameters that cannot be bound by name, leaves one unused, or
        returns anything but calls.
        """
        name = getattr(function, "__qualname__", repr(function))
        parameters = inspect.signature(function).parameters
        for parameter in parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise RuleError(f"pattern {name}: parameter {parameter.name!r} cannot be bound by its name")
        made = function(**{given: Capture(given) for given in parameters})
        roots = made if isinstance(made, tuple) else (made,)
        if not roots or not all(isinstance(root, Call) for root in roots):
            raise RuleError(f"pattern {name} returns {made!r}: expected a call, or a tuple of calls")
        pattern = cls(tuple(parameters), roots)
        unused = sorted(set(parameters) - {part.name for part in pattern.parts if isinstance(part, Capture)})
        if unused:
            raise RuleError(f"pattern {name} never uses its parameter {unused[0]!r}")
        return pattern

    def given(self, call: Call, target: Any) -> Given | str:
        """``given_to`` of one of the pattern's calls."""
        if (call, target) not in self._given:
            self._given[call, target] = given_to(target, call.args, call.kwargs)
        return self._given[call, target]

    @cached_property
    def _given(self) -> dict[tuple[Call, Any], Given | str]:
        return {}

    @cached_property
    def parts(self) -> tuple[Expression, ...]:
        """Every expression once, readers before what they read."""
        found: dict[Expression, None] = {}
        stack: list[Any] = list(reversed(self.roots))
        while stack:
            part = stack.pop()
            if isinstance(part, (list, tuple)):
                stack.extend(part)
            elif isinstance(part, Expression) and part not in found:
                found[part] = None
                stack.extend(reversed(_children(part)))
        return tuple(found)

    @cached_property
    def size(self) -> int:
        """Calls of the largest form that it matches."""
        return len(set().union(*(_largest(root) for root in self.roots)))


def _children(part: Expression) -> list[Any]:
    if isinstance(part, Call):
        return [*part.args, *part.kwargs.values()]
    return list(part.options) if isinstance(part, Either) else []


def _largest(part: Any) -> set[Call]:
    """Calls of the largest form of an expression."""
    if isinstance(part, (list, tuple)):
        return set().union(*map(_largest, part))
    if isinstance(part, Either):
        return max(map(_largest, part.options), key=len)
    if isinstance(part, Call):
        return {part}.union(*map(_largest, _children(part)))
    return set()
