"""What an elementwise chain computes, as a sum of terms: ``0.9 * m + 0.1 * g``.

A ``Form`` maps terms to the numbers that they are multiplied by. Terms are nodes, ``CONSTANT`` (1 in each
element), products, quotients and square roots of forms. Calls on lists of tensors (``_foreach_*``) count as
one call for each element. Chains are followed back to what is no arithmetic of this kind.
"""

from __future__ import annotations

import operator
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt_passes.fuse_optimizer.scalars import ONE, Scalar, close, known, of_node, over, plus

__all__ = [
    "CONSTANT",
    "Expansion",
    "Form",
    "Numbering",
    "Product",
    "Quotient",
    "SquareRoot",
    "is_sized",
    "ratio",
]

_DEPTH = 64
"""Calls that a chain is followed back over: an update has some ten."""

CONSTANT = "1"

Form = dict[Any, Scalar]


@dataclass(frozen=True)
class Product:
    """A product of two forms, each the items of one."""

    factors: frozenset[frozenset[tuple[Any, Scalar]]]
    """Two forms, or one where it is the square of that."""


@dataclass(frozen=True)
class Quotient:
    numerator: frozenset[tuple[Any, Scalar]]
    denominator: frozenset[tuple[Any, Scalar]]


@dataclass(frozen=True)
class SquareRoot:
    of: frozenset[tuple[Any, Scalar]]


class Numbering:
    """Tensors of one element, those that are computed alike known as the same."""

    def __init__(self) -> None:
        self._first: dict[Any, fx.Node] = {}
        self._known: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> Scalar:
        return of_node(self._canonical(node))

    def _canonical(self, node: fx.Node, depth: int = 0) -> fx.Node:
        if node in self._known:
            return self._known[node]
        found = node
        if node.op == "call_function" and depth < _DEPTH and _is_plain(node):
            args = tuple(self._part(arg, depth) for arg in node.args)
            key = (node.target, args, tuple((k, self._part(v, depth)) for k, v in node.kwargs.items()))
            try:
                found = self._first.setdefault(key, node)
            except TypeError:
                found = node
        self._known[node] = found
        return found

    def _part(self, arg: Any, depth: int) -> Any:
        if isinstance(arg, fx.Node):
            return self._canonical(arg, depth + 1)
        # 1 and 1.0 and True compare as equal.
        return (type(arg), arg)


def _is_plain(node: fx.Node) -> bool:
    """Whether an operator gives the same each time, without effects."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


class Expansion:
    """Forms of the values of one shape; ``stops`` are not looked into. ``forms`` holds those of all nodes
    that were passed."""

    def __init__(self, value: torch.Tensor, stops: Set[fx.Node], numbering: Numbering) -> None:
        self._shape, self._stops, self._numbering = value.shape, stops, numbering
        self.forms: dict[fx.Node, Form] = {}

    def of(self, node: fx.Node) -> Form:
        """What the value of a write is, whatever dtype it is rounded to."""
        source = node
        while (cast := _cast_of(source)) is not None and self._fits(cast) and cast not in self._stops:
            source = cast
        return self._expanded(source, 0)

    def _expanded(self, node: fx.Node, depth: int) -> Form:
        if node not in self.forms:
            found = None
            if node not in self._stops and depth < _DEPTH:
                found = self._called(node, depth)
            self.forms[node] = {node: ONE} if found is None else found
        return self.forms[node]

    def _called(self, node: fx.Node, depth: int) -> Form | None:
        call = _call_of(node)
        if call is None:
            return None
        name, args = call
        if name == "where":
            taken = _filled_with(args[0])
            # What a decomposition of ``lerp`` writes where it knows its weight.
            chosen = None if taken is None else self._value(args[1 if taken else 2], depth)
            return chosen if isinstance(chosen, dict) else None
        if name in _CASTS:
            source = args[1] if name == "copy" else args[0]
            return self._expanded(source, depth + 1) if _widens(source, node) and self._fits(source) else None
        rule, most = _RULES.get(name, (None, 0))
        values = [self._value(arg, depth) for arg in (args[1:2] if name in _FILLS else args)]
        # Arguments that the rule does not know: a rounding mode.
        if rule is None or len(values) > most or any(value is None for value in values):
            return None
        result = rule(*values)
        return {CONSTANT: result} if isinstance(result, Scalar) else result

    def _fits(self, node: Any) -> bool:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return is_sized(value) and value.shape == self._shape

    def _value(self, arg: Any, depth: int) -> Form | Scalar | None:
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return known(arg)
        if not isinstance(arg, fx.Node):
            return None
        if self._fits(arg):
            return self._expanded(arg, depth + 1)
        value = arg.meta.get("val")
        if is_sized(value) and value.numel() == 1 and value.dtype.is_floating_point:
            number = _filled_with(arg)
            return self._numbering.of(arg) if number is None else known(number)
        return None


def is_sized(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor of known sizes: comparing others would add guards."""
    return isinstance(value, torch.Tensor) and not any(isinstance(n, torch.SymInt) for n in value.shape)


# --- calls ----------------------------------------------------------------------------------------


def _filled_with(node: Any) -> float | None:
    """The number that is all of a tensor of one element made by ``full``."""
    made = isinstance(node, fx.Node) and node.target is torch.ops.aten.full.default
    if not made or not is_sized(node.meta.get("val")) or node.meta["val"].numel() != 1:
        return None
    return node.args[1] if isinstance(node.args[1], (bool, int, float)) else None


def _call_of(node: fx.Node) -> tuple[str, list[Any]] | None:
    """The operator that gives a value, and its arguments in the schema's order: of a call on lists, the
    element's."""
    source, index = node, None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        source, index = node.args[0], node.args[1]
    schema = _torch.schema_of(source.target) if source.op == "call_function" else None
    if schema is None or schema.is_mutable:
        return None
    space, _, name = schema.name.partition("::")
    if space not in ("aten", "prims") or (index is not None) != name.startswith("_foreach_"):
        return None
    args: list[Any] = []
    for position, parameter in enumerate(schema.arguments):
        given = source.args[position] if position < len(source.args) else None
        if position >= len(source.args):
            given = source.kwargs.get(parameter.name, parameter.default_value)
        if index is not None and isinstance(given, (list, tuple)):
            given = given[index]  # type: ignore[index]
        args.append(given)
    return name.removeprefix("_foreach_"), args


def _cast_of(node: fx.Node) -> fx.Node | None:
    """What a value is a cast of."""
    call = _call_of(node)
    if call is None or call[0] not in _CASTS:
        return None
    source = call[1][1] if call[0] == "copy" else call[1][0]
    return source if isinstance(source, fx.Node) else None


def _widens(source: Any, node: fx.Node) -> bool:
    if not isinstance(source, fx.Node):
        return False
    a, b = source.meta["val"].dtype, node.meta["val"].dtype
    return a.is_floating_point and torch.promote_types(a, b) is b


# --- arithmetic -----------------------------------------------------------------------------------

Value = Form | Scalar


def _form(value: Value) -> Form:
    return {CONSTANT: value} if isinstance(value, Scalar) else value


def _times(form: Form, factor: Scalar) -> Form:
    return {term: number * factor for term, number in form.items()}


def _add(a: Value, b: Value, alpha: Scalar = ONE) -> Value:
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        return plus(a, b * alpha)
    total = dict(_form(a))
    for term, number in _times(_form(b), alpha).items():
        total[term] = plus(total[term], number) if term in total else number
    return {term: number for term, number in total.items() if number.coefficient != 0}


def _negative(a: Value) -> Value:
    return -a if isinstance(a, Scalar) else _times(a, known(-1))


def _sub(a: Value, b: Value, alpha: Scalar = ONE) -> Value:
    return _add(a, b, -alpha)


def _rsub(a: Value, b: Value, alpha: Scalar = ONE) -> Value:
    return _add(b, a, -alpha)


def _mul(a: Value, b: Value) -> Value | None:
    if (number := _constant(a)) is not None:
        a, b, number = b, a, number
    else:
        number = _constant(b)
    if number is not None:
        return a * number if isinstance(a, Scalar) else _times(a, number)
    first, second = _form(a), _form(b)
    for one, other in ((first, second), (second, first)):
        inverse = _inverted(one)
        if inverse is not None:
            quotient, factor = inverse
            return _quotient(other, dict(quotient.denominator), factor)
    factor, (x, y) = ONE, (first, second)
    if len(x) == 1:
        (term, number), = x.items()  # fmt: skip
        x, factor = {term: ONE}, factor * number
    if len(y) == 1:
        (term, number), = y.items()  # fmt: skip
        y, factor = {term: ONE}, factor * number
    if (same := ratio(y, x)) is not None:
        y, factor = x, factor * same
    return {Product(frozenset({_items(x), _items(y)})): factor}


def _inverted(form: Form) -> tuple[Quotient, Scalar] | None:
    """The quotient that a form is, where its numerator is a number."""
    if len(form) == 1:
        (term, number), = form.items()  # fmt: skip
        if isinstance(term, Quotient) and term.numerator == _items({CONSTANT: ONE}):
            return term, number
    return None


def _quotient(a: Form, b: Form, factor: Scalar = ONE) -> Form:
    if len(a) == 1:
        (term, number), = a.items()  # fmt: skip
        a, factor = {term: ONE}, factor * number
    return {Quotient(_items(a), _items(b)): factor}


def _div(a: Value, b: Value) -> Value | None:
    divisor = _constant(b)
    if divisor is None:
        return _quotient(_form(a), _form(b))
    inverse = over(ONE, divisor)
    if inverse is None:
        return None
    if isinstance(a, Scalar):
        return over(a, divisor)
    return {term: over(number, divisor) or number * inverse for term, number in a.items()}


def _reciprocal(a: Value) -> Value | None:
    return _div(ONE, a)


def _fused(a: Value, b: Value, c: Value) -> Value | None:
    product = _mul(a, b)
    return None if product is None else _add(product, c)


def _addcmul(a: Value, b: Value, c: Value, value: Scalar = ONE) -> Value | None:
    product = _mul(b, c)
    return None if product is None else _add(a, product, value)


def _addcdiv(a: Value, b: Value, c: Value, value: Scalar = ONE) -> Value | None:
    quotient = _div(b, c)
    return None if quotient is None else _add(a, quotient, value)


def _lerp(a: Value, b: Value, weight: Value) -> Value | None:
    share = _constant(weight)
    if share is None:
        return None
    rest = _mul(a, plus(ONE, -share))
    added = _mul(b, share)
    return None if rest is None or added is None else _add(rest, added)


def _root(a: Value) -> Value:
    if (number := _constant(a)) is not None:
        return number.root()
    form = _form(a)
    if len(form) == 1:
        (term, number), = form.items()  # fmt: skip
        return {SquareRoot(_items({term: ONE})): number.root()}
    return {SquareRoot(_items(form)): ONE}


def _inverse_root(a: Value) -> Value | None:
    return _reciprocal(_root(a))


def _square(a: Value) -> Value | None:
    return _mul(a, a)


def _power(a: Value, exponent: Value) -> Value | None:
    power = exponent.value if isinstance(exponent, Scalar) else None
    if power == 2:
        return _square(a)
    if power == 0.5:
        return _root(a)
    return _inverse_root(a) if power == -0.5 else None


def _same(a: Value) -> Value:
    return a


def _constant(value: Value) -> Scalar | None:
    """The number that a value has in each element, known or not."""
    if isinstance(value, Scalar):
        return value
    return value[CONSTANT] if value.keys() == {CONSTANT} else None


def _items(form: Form) -> frozenset[tuple[Any, Scalar]]:
    return frozenset(form.items())


def ratio(a: Form, b: Form) -> Scalar | None:
    """The number by which ``b`` is multiplied to give ``a``, if there is one."""
    if a.keys() != b.keys() or not a:
        return None
    found: Scalar | None = None
    for term, number in a.items():
        here = over(number, b[term])
        if here is None or (found is not None and not close(here, found)):
            return None
        found = here if found is None else found
    return found


_CASTS = frozenset({"_to_copy", "convert_element_type", "copy"})
_FILLS = frozenset({"full", "full_like"})

_RULES: dict[str, tuple[Any, int]] = {
    "add": (_add, 3), "sub": (_sub, 3), "rsub": (_rsub, 3), "mul": (_mul, 2), "div": (_div, 2),
    "neg": (_negative, 1), "reciprocal": (_reciprocal, 1), "fma": (_fused, 3), "addcmul": (_addcmul, 4),
    "addcdiv": (_addcdiv, 4), "lerp": (_lerp, 3), "sqrt": (_root, 1), "rsqrt": (_inverse_root, 1),
    "square": (_square, 1), "pow": (_power, 2), "full": (_same, 1), "full_like": (_same, 1),
}  # fmt: skip
"""By operator what it computes of how many arguments at most."""
