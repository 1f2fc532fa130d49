"""Sizes that are symbols: their values while tracing, their bounds, expressions of them."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._guards import TracingContext
from torch._subclasses import FakeTensorMode

__all__ = [
    "SizeSymbol",
    "context_guards",
    "depends_on",
    "expression_form",
    "hint",
    "hinted",
    "is_multiple_of",
    "is_same_size",
    "is_symbol",
    "size_at",
    "size_from",
    "size_guards",
    "size_sources",
    "size_symbols",
    "sized",
    "symbolic_context",
    "symbolic_fakes",
]


def symbolic_fakes(fixed: Sequence[torch.Tensor], free: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fake tensors like those given, in a mode of their own. Sizes of ``free`` ones are symbols, the same
    where they are the same number; those of ``fixed`` ones are numbers."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True), allow_non_fake_inputs=True)
    found: list[torch.Tensor] = []
    for tensors, kind in ((fixed, DimDynamic.STATIC), (free, DimDynamic.DUCK)):
        for tensor in tensors:
            context: Any = StatelessSymbolicContext(dynamic_sizes=[kind] * tensor.dim())
            found.append(mode.from_tensor(tensor, symbolic_context=context))
    return found


def is_symbol(size: Any) -> bool:
    """Whether a size is a symbol still, that nothing has taken for one number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def hint(size: Any) -> int:
    """The value that a possibly symbolic size had while tracing, without guarding on it.

    A size that depends on values had none: it is the largest that it can be, so that memory is bounded, or 1
    where nothing bounds it.
    """
    if isinstance(size, torch.SymInt):
        value = size.node.hint
        return int(value) if value is not None else _largest(size)
    return int(size)


def _largest(size: torch.SymInt) -> int:
    largest = size.node.shape_env.bound_sympy(size.node.expr).upper
    # Operators that know no bound name the largest number of 64 bits, or one less.
    return int(largest) if largest.is_Integer and largest < sys.maxsize - 1 else 1


def hinted(value: Any) -> Any:
    """A number, in place of a symbolic one that which it had while tracing, without guarding on it."""
    if not isinstance(value, torch.SymInt | torch.SymFloat):
        return value
    number = value.node.hint
    return type(number)(number) if number is not None else 1


def depends_on(size: Any, symbol: torch.SymInt) -> bool:
    """Whether a size is made of the symbol that ``symbol`` is."""
    if not isinstance(size, torch.SymInt):
        return False
    return bool(size.node.expr.free_symbols & symbol.node.expr.free_symbols)


def size_from(size: torch.SymInt, leaf: Callable[[Any], Any], combine: Callable[[Any, Any, Any], Any]) -> Any:
    """A size as a sum of products: ``leaf(symbol)`` for its symbols, which print as their sizes do, and
    ``combine(operator, one, other)`` for ``operator.add`` and ``operator.mul``. Raises ``ValueError`` for a
    size that is made otherwise."""
    import sympy  # type: ignore[import-untyped]

    def of(expression: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            return leaf(expression)
        if not isinstance(expression, (sympy.Add, sympy.Mul)):
            raise ValueError(f"the size {expression} is no sum of products")
        function = operator.add if isinstance(expression, sympy.Add) else operator.mul
        return functools.reduce(lambda a, b: combine(function, a, b), map(of, expression.args))

    return of(size.node.expr)


def size_at(size: torch.SymInt, numbers: Sequence[tuple[torch.SymInt, int]]) -> int:
    """What a size is where symbols that it is made of are ``numbers``. Raises ``ValueError`` where it is
    made of others too."""
    expression = size.node.expr.subs({symbol.node.expr: number for symbol, number in numbers})
    if not expression.is_Integer:
        raise ValueError(f"the size {size} is not told by those of the tokens")
    return int(expression)


def is_same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are the same number or the same expression of symbols, without guarding on it."""
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return type(one) is int and type(other) is int and one == other


def is_multiple_of(size: Any, symbol: torch.SymInt) -> bool:
    """Whether a size is ``symbol`` times what does not depend on it, without guarding on it."""
    if not isinstance(size, torch.SymInt):
        return False
    share = size.node.expr / symbol.node.expr
    return not share.has(symbol.node.expr)


class SizeSymbol(NamedTuple):
    """A size that is known at run time alone: ``hint`` is what it was while tracing, ``low`` and ``high``,
    both included, bound it where they are given; ``positive``: torch takes it to be above 0."""

    name: str
    hint: int
    low: int | None
    high: int | None
    positive: bool


def size_symbols(values: Any) -> dict[str, SizeSymbol]:
    """The symbols of sizes and strides in ``values``, tensors and symbolic numbers. Raises ``ValueError`` for
    one that depends on values, which has no size while tracing."""
    from torch.utils._sympy.numbers import int_oo

    found: dict[str, SizeSymbol] = {}
    for node in _symbolic_nodes(values):
        known: Any = node.shape_env
        for symbol in sorted(node.expr.free_symbols, key=str):
            if not symbol.is_integer or (value := _known_values(known).get(symbol)) is None:
                raise ValueError(f"the size {symbol} depends on values")
            bounds = known.var_to_range[symbol]
            low = None if bounds.lower == -int_oo else int(bounds.lower)
            high = None if bounds.upper == int_oo else int(bounds.upper)
            found[str(symbol)] = SizeSymbol(str(symbol), int(value), low, high, bool(symbol.is_positive))
    return found


def size_sources(values: Any) -> dict[str, list[str]]:
    """Where dynamo took the symbols of sizes in ``values`` from, as Python of its own:
    ``L['x'].size()[0]``."""
    found: dict[str, list[str]] = {}
    for node in _symbolic_nodes(values):
        for symbol in node.expr.free_symbols:
            names = [source.name for source in node.shape_env.var_to_sources.get(symbol, ())]
            # torch 2.11 has a method there.
            found[str(symbol)] = [str(name() if callable(name) else name) for name in names]
    return found


def size_guards(values: Any) -> list[Any]:
    """What was assumed of the symbols of sizes in ``values``, as ``expression_form`` has it."""
    known = {id(node.shape_env): node.shape_env for node in _symbolic_nodes(values)}
    return [form for env in known.values() for form in _guards_of(env)]


def context_guards(context: TracingContext) -> list[Any]:
    """What was assumed of sizes under ``context``, as ``expression_form`` has it."""
    assert context.fake_mode is not None
    return _guards_of(context.fake_mode.shape_env)


def _guards_of(env: Any) -> list[Any]:
    found = [] if env is None else [env.replace(guard.expr) for guard in env.guards]
    forms = [expression_form(expression) for expression in found]
    return list({str(form): form for form in forms if form is not True}.values())


def _symbolic_nodes(values: Any) -> Iterator[Any]:
    for value in torch.utils._pytree.tree_leaves(values):
        numbers = [value]
        if isinstance(value, torch.Tensor):
            numbers = [*value.shape, *value.stride(), value.storage_offset()]
        for number in numbers:
            if isinstance(number, torch.SymInt | torch.SymBool | torch.SymFloat):
                yield number.node


def _known_values(env: Any) -> Any:
    """What symbols of sizes were while tracing; torch 2.11 has another name for it."""
    return env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val


def symbolic_context(symbols: Iterable[SizeSymbol]) -> TracingContext:
    """A tracing context of its own, in which sizes may be made of ``symbols``."""
    import sympy
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRangesSLoc
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    env: Any = ShapeEnv()
    place = env._get_sloc()
    for symbol in symbols:
        made = _symbol(symbol)
        low = -int_oo if symbol.low is None else sympy.Integer(symbol.low)
        high = int_oo if symbol.high is None else sympy.Integer(symbol.high)
        _known_values(env)[made] = sympy.Integer(symbol.hint)
        env.var_to_range[made] = ValueRanges(low, high)
        # Inductor writes guards of its own code from these.
        env.var_to_range_sloc[made] = ValueRangesSLoc(place, place)
        env.var_to_sources[made] = [ConstantSource(symbol.name)]
    return TracingContext(FakeTensorMode(allow_non_fake_inputs=True, shape_env=env))


def _symbol(symbol: SizeSymbol) -> Any:
    import sympy

    return sympy.Symbol(symbol.name, integer=True, positive=True if symbol.positive else None)


def sized(form: Any, symbols: Mapping[str, SizeSymbol], mode: FakeTensorMode) -> Any:
    """A size under ``mode``, which is of ``symbolic_context(symbols)``: a number, or one made of symbols, as
    ``expression_form`` writes it. Raises ``ValueError`` for what is no size of these symbols."""
    import sympy

    expression = _expression_of(form, {name: _symbol(symbol) for name, symbol in symbols.items()})
    hint = expression.xreplace({_symbol(s): sympy.Integer(s.hint) for s in symbols.values()})
    if not hint.is_Integer or mode.shape_env is None:
        raise ValueError(f"{expression} is no size")
    return mode.shape_env.create_symintnode(expression, hint=int(hint))


def expression_form(expression: Any) -> Any:
    """An expression of symbols of sizes as numbers, names, ``True``, ``False`` and lists of an operator and
    what it is of: ``["*", 2, "s77"]``. Raises ``ValueError`` for an operator that has no name there."""
    import sympy

    if isinstance(expression, torch.SymInt | torch.SymBool):
        expression = expression.node.expr
    if expression is sympy.true or expression is sympy.false:
        return expression is sympy.true
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return str(expression)
    name = {kind: name for name, kind in _size_operators().items()}.get(type(expression))
    if name is None:
        raise ValueError(f"{expression} is computed by {type(expression).__name__}")
    return [name, *map(expression_form, expression.args)]


def _expression_of(form: Any, symbols: Mapping[str, Any]) -> Any:
    import sympy

    if type(form) is int:
        return sympy.Integer(form)
    if isinstance(form, str) and form in symbols:
        return symbols[form]
    kinds = _size_operators()
    if isinstance(form, list) and len(form) > 1 and isinstance(form[0], str) and form[0] in kinds:
        return kinds[form[0]](*(_expression_of(part, symbols) for part in form[1:]))
    raise ValueError(f"{str(form)[:60]!r} is no size")


def _size_operators() -> dict[str, Any]:
    import sympy
    from torch.utils._sympy import functions as f

    return {
        "+": sympy.Add, "*": sympy.Mul, "**": sympy.Pow, "power": f.PowByNatural,
        "//": f.FloorDiv, "/": f.CleanDiv, "%": f.Mod, "modulo": f.PythonMod, "max": f.Max, "min": f.Min,
        "==": sympy.Eq, "!=": sympy.Ne, "<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge,
        "and": sympy.And, "or": sympy.Or, "not": sympy.Not,
    }  # fmt: skip
