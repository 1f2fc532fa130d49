"""Sizes that are known at run time alone: their symbols, what is assumed of them, and whether a call keeps
that.

    forward(x: f32[s77,16])            s77: size 0 of input 2 of the program, 11 or more, divisible by 4

    symbols   [{"name": "s77", "hint": 64, "low": 11, "high": null, "input": 2, "dim": 0, ...}]
    guards    [["==", ["%", "s77", 4], 0]]

Expressions are lists of an operator and what it is of. They are looked up and computed here, never evaluated
as code. A program is traced again with symbols of the same names and bounds, which were the same numbers.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt import _torch
from graphopt.artefact.calling import constants_of
from graphopt.errors import ArtefactError

__all__ = ["NO_SIZES", "SavedSymbol", "Sizes", "check_results", "checked_expression", "sizes_of", "value_of"]

_NAME = re.compile(r"s[0-9]+\Z")
_ARGUMENT = re.compile(r"L\['(\w+)'\](.*)\Z")
_LIMIT = 1 << 62
_OF = ("size", "stride", "number")
_PARTS, _DEPTH = 500, 50
"""Operators in one expression, and in one another. Sizes are sums and products of a few."""
_POWER = 16


def _product(*values: int) -> int:
    return math.prod(values)


def _sum(*values: int) -> int:
    return sum(values)


_OPERATORS: Mapping[str, tuple[Callable[..., Any], int]] = {
    "+": (_sum, 0),
    "*": (_product, 0),
    "**": (operator.pow, 2),
    "power": (operator.pow, 2),
    "//": (operator.floordiv, 2),
    "/": (operator.floordiv, 2),
    "%": (operator.mod, 2),
    "modulo": (operator.mod, 2),
    "max": (max, 0),
    "min": (min, 0),
    "==": (operator.eq, 2),
    "!=": (operator.ne, 2),
    "<": (operator.lt, 2),
    "<=": (operator.le, 2),
    ">": (operator.gt, 2),
    ">=": (operator.ge, 2),
    "and": (lambda *values: all(values), 0),
    "or": (lambda *values: any(values), 0),
    "not": (operator.not_, 1),
}
"""What an operator of sizes computes, and of how many (0: two or more)."""


def checked_expression(form: Any, names: Mapping[str, Any]) -> Any:
    """``form``, if it is an expression of the symbols ``names``. Raises ``ArtefactError``."""
    parts = 0

    def look(part: Any, within_power: bool, depth: int) -> None:
        nonlocal parts
        parts += 1
        if type(part) is int and abs(part) < _LIMIT and parts <= _PARTS:
            return
        if isinstance(part, str) and part in names and parts <= _PARTS:
            return
        known = _OPERATORS.get(part[0]) if isinstance(part, list) and part and type(part[0]) is str else None
        arguments = part[1:] if known is not None else ()
        fits = known is not None and (len(arguments) == known[1] or (not known[1] and len(arguments) > 1))
        if not fits or parts > _PARTS or depth > _DEPTH:
            raise ArtefactError(f"{str(form)[:60]!r} is no size")
        power = part[0] in ("**", "power")
        exponent = part[-1]
        if power and (within_power or type(exponent) is not int or not 2 <= exponent <= _POWER):
            raise ArtefactError(f"{str(form)[:60]!r} is no size: it has a power of {str(exponent)[:20]}")
        for argument in arguments:
            look(argument, within_power or power, depth + 1)

    look(form, False, 0)
    return form


def value_of(form: Any, values: Mapping[str, int]) -> Any:
    """What a checked expression comes to. Raises ``ArithmeticError`` for a division by nothing."""
    if isinstance(form, list):
        return _OPERATORS[form[0]][0](*(value_of(part, values) for part in form[1:]))
    return values[form] if isinstance(form, str) else form


@dataclass(frozen=True)
class SavedSymbol:
    """A symbol (``_torch.SizeSymbol``) and where a call tells it: the size, or with ``of`` as ``"stride"``
    the stride, along ``dim`` of input ``input`` of the program; with ``of`` as ``"number"`` it is number
    ``input`` of the arguments."""

    name: str
    hint: int
    low: int | None
    high: int | None
    positive: bool
    of: str
    input: int
    dim: int

    def place(self, said: Sequence[str]) -> str:
        """Where a call tells it, in words; ``said`` has those of the inputs."""
        if self.of == "number":
            return f"number {self.input} of the call"
        return f"{self.of} {self.dim} of {said[self.input]}"

    def refusal(self, value: int) -> str:
        """Why ``value`` is not one that the program was made for, or ``""``."""
        if self.low is not None and value < self.low:
            return f"the step was saved for {self.low} or more"
        if self.high is not None and value > self.high:
            return f"the step was saved for {self.high} or less"
        return ""


@dataclass(frozen=True)
class Sizes:
    """The symbols of a step and what has to hold of them (``guards``, expressions)."""

    symbols: tuple[SavedSymbol, ...] = ()
    guards: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        names: dict[str, SavedSymbol] = {}
        for symbol in self.symbols:
            bounds = [n for n in (symbol.hint, symbol.low, symbol.high) if n is not None]
            sound = _NAME.match(symbol.name) and symbol.name not in names and symbol.of in _OF
            if not sound or any(abs(n) >= _LIMIT for n in bounds) or symbol.input < 0 or symbol.dim < 0:
                raise ArtefactError(f"{symbol.name[:60]!r} is no symbol of a size")
            if symbol.refusal(symbol.hint) or (symbol.positive and symbol.hint < 1):
                raise ArtefactError(f"{symbol.name} was {symbol.hint}, which is out of its own bounds")
            names[symbol.name] = symbol
        for guard in self.guards:
            checked_expression(guard, names)
        failed = self.failed({symbol.name: symbol.hint for symbol in self.symbols})
        if failed:
            raise ArtefactError(f"{failed} does not hold for the sizes that the program was traced with")

    @property
    def known(self) -> dict[str, SavedSymbol]:
        """The symbols by name."""
        return {symbol.name: symbol for symbol in self.symbols}

    def failed(self, values: Mapping[str, int]) -> str:
        """The first guard that does not hold of ``values``, as text, or ``""``."""
        for guard in self.guards:
            try:
                holds = bool(value_of(guard, values))
            except ArithmeticError:
                holds = False
            if not holds:
                return expression_text(guard)
        return ""

    def context(self) -> Any:
        """A tracing context for programs of these sizes."""
        if not self.symbols:
            context = _torch.static_context()
            assert context.fake_mode is not None
            context.fake_mode.allow_non_fake_inputs = True
            return context
        return _torch.symbolic_context(self._known_to_torch().values())

    def _known_to_torch(self) -> dict[str, _torch.SizeSymbol]:
        return {
            s.name: _torch.SizeSymbol(s.name, s.hint, s.low, s.high, s.positive) for s in self.symbols
        }

    def maker(self, mode: Any) -> Callable[[Any], Any]:
        """What makes sizes of expressions under the fake mode of a ``context``. It raises
        ``ArtefactError``."""
        known, symbols = self._known_to_torch(), self.known
        found: dict[str, Any] = {}

        def made(form: Any) -> Any:
            try:
                # Graphs are full of the same few.
                if (text := repr(form)) not in found:
                    found[text] = _torch.sized(checked_expression(form, symbols), known, mode)
                return found[text]
            except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
                raise ArtefactError(f"{str(form)[:60]!r} is no size: {error}") from error

        return made

    def with_guards(self, found: Sequence[Any]) -> Sizes:
        """These, and what else was assumed while programs were traced."""
        known = {str(guard) for guard in self.guards}
        return Sizes(self.symbols, (*self.guards, *(guard for guard in found if str(guard) not in known)))


NO_SIZES = Sizes()


def _names(form: Any) -> Iterator[str]:
    """The symbols of an expression."""
    if isinstance(form, list):
        for part in form[1:]:
            yield from _names(part)
    elif isinstance(form, str):
        yield form


def expression_text(form: Any) -> str:
    """``["==", ["%", "s77", 4], 0]`` -> ``s77 % 4 == 0``."""
    if not isinstance(form, list):
        return str(form)
    name, *rest = form
    parts = [f"({expression_text(part)})" if isinstance(part, list) else str(part) for part in rest]
    if isinstance(name, str) and name in ("max", "min", "power", "modulo", "not"):
        return f"{name}({', '.join(map(expression_text, rest))})"
    if len(parts) == 2 and name in ("==", "!=", "<", "<=", ">", ">="):
        parts = [expression_text(part) for part in rest]
    return f" {name} ".join(parts)


def sizes_of(examples: Sequence[Any], others: Sequence[Any], arguments: Any) -> Sizes:
    """The sizes of a program whose inputs look like ``examples``; ``others`` are values of it that may be
    made of symbols as well. Whole numbers in ``arguments`` (``structure_json``) that are symbols become
    numbers of the call there. Raises ``ArtefactError`` for sizes that no input tells."""
    try:
        symbols = _torch.size_symbols([examples, others])
        guards = _torch.size_guards([examples, others])
    except ValueError as error:
        raise ArtefactError(f"sizes of the program cannot be written: {error}") from None
    places: dict[str, tuple[str, int, int]] = {}
    for number, value in enumerate(examples):
        if not isinstance(value, torch.Tensor):
            continue
        for of, numbers in (("size", value.shape), ("stride", value.stride())):
            for dim, size in enumerate(numbers):
                form = _torch.expression_form(size) if isinstance(size, torch.SymInt) else size
                if isinstance(form, str):
                    places.setdefault(form, (of, number, dim))
    _place_numbers(set(symbols) - set(places), _torch.size_sources([examples, others]), arguments, places)
    if untold := sorted({*symbols, *(name for guard in guards for name in _names(guard))} - set(places)):
        raise ArtefactError(
            f"{untold[0]} of the program is told by no input of it: it is made of numbers of the model, or "
            "the size of a tensor that no operator reads",
            hint="optimize with dynamic_shapes=False, and run the module once for each size before saving it",
        )
    made = tuple(SavedSymbol(*symbols[name], *places[name]) for name in sorted(symbols))
    try:
        return Sizes(made, tuple(guards))
    except ArtefactError as error:
        raise ArtefactError(f"what is assumed of sizes cannot be written: {error.message}") from None


def _place_numbers(
    untold: set[str],
    sources: Mapping[str, Sequence[str]],
    arguments: Any,
    places: dict[str, tuple[str, int, int]],
) -> None:
    """Let numbers of the call tell the symbols that are taken from them: ``L['count']``,
    ``L['sizes'][0]``."""
    leaves = {
        path: leaf
        for name, item in arguments["dict"].items()
        for path, leaf in constants_of(item, name)
        if type(leaf["constant"]) is int
    }
    number = 0
    for symbol in sorted(untold):
        for source in sources.get(symbol, ()):
            found = _ARGUMENT.match(source)
            path = found.group(1) + found.group(2) if found else ""
            if path in leaves:
                leaf = leaves.pop(path)
                del leaf["constant"]
                leaf["number"] = number
                places[symbol] = "number", number, 0
                number += 1
                break


def check_results(results: Any) -> None:
    """Raise ``ArtefactError`` for numbers in what a step of symbolic sizes returns (``structure_json``): they
    may be made of sizes, and would be those of the call that was saved."""
    for path, leaf in constants_of(results, "the result"):
        if type(leaf["constant"]) in (int, float):
            said = f"the number {leaf['constant']}, which may be made of sizes known at run time alone"
            raise ArtefactError(
                f"{path} is {said}",
                hint="return it as a tensor, or optimize with dynamic_shapes=False",
            )
