"""Jitted functions written out for one launch: what is known of their arguments is put in, the rest stays.

    rows_kernel[(96,)](grad, ..., heads=12, rows=333, ROWS=32)
        -> the text of ``rows_kernel`` and of the functions that it calls, without ``heads``,
           without branches that are not taken, without arguments that nothing reads

The source that the package itself runs stays the only one: kernels are never written twice. Comments and
docstrings go along. A parameter of a function is put in where all of its calls agree on it.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt_kernels.emit.fold import Folded

__all__ = ["Slot", "Specialized", "Wanted", "broken", "specialized"]

WIDTH = 104
"""Columns of a line; longer calls are broken after commas."""

_STATEMENTS_THAT_ONLY_NAME = (ast.Assign, ast.AugAssign, ast.AnnAssign)


@dataclass(frozen=True)
class Wanted:
    """A kernel to write: the jitted ``function``, and what is ``known`` of its parameters."""

    function: Any
    known: Mapping[str, Any]


@dataclass(frozen=True)
class Slot:
    """Text in place of a function that kernels call: ``source`` of a function of the same name with the same
    parameters, and after the parameter ``handed`` the ``pointers`` that it reads. Kernels take these
    instead of ``handed``, which starts as 0 and so counts what would have been steps from it."""

    function: str
    source: str
    handed: str
    pointers: tuple[str, ...]


@dataclass(frozen=True)
class Specialized:
    """``text``: all functions, those first that others call. ``parameters`` of each kernel that are left."""

    text: str
    parameters: Mapping[str, tuple[str, ...]]


@dataclass
class _Function:
    name: str
    node: ast.FunctionDef
    lines: list[str]
    names: Mapping[str, Any]
    """What its module knows."""
    known: dict[str, Any] | None = None
    """What its parameters are, by name; ``None`` before its callers were looked at."""
    calls: list[ast.Call] = field(default_factory=list)

    @property
    def parameters(self) -> list[str]:
        return [argument.arg for argument in self.node.args.args]


def specialized(wanted: Sequence[Wanted], slot: Slot | None = None) -> Specialized:
    """The text of kernels with what is known of their parameters put in."""
    functions: dict[str, _Function] = {}
    for each in wanted:
        _reach(each.function, functions, slot)
        functions[each.function.fn.__name__].known = dict(each.known)
    kernels = {each.function.fn.__name__ for each in wanted}
    order = _callers_first(functions)
    if slot is not None:
        _thread(slot, functions, kernels)
    for function in order:
        _put_in(function, functions)
    for function in reversed(order):
        if function.known is not None:
            _drop_unread(function, function.name in kernels)
    left = [function for function in reversed(order) if function.known is not None]
    text = "\n\n\n".join(_text(function) for function in left)
    return Specialized(text, {f.name: tuple(f.parameters) for f in left if f.name in kernels})


def _reach(function: Any, functions: dict[str, _Function], slot: Slot | None) -> None:
    """A jitted function and those that it calls, as syntax trees."""
    name = function.fn.__name__
    if name in functions:
        if functions[name].names is not function.fn.__globals__:
            raise ValueError(f"two functions are called {name}")
        return
    source = textwrap.dedent(inspect.getsource(function.fn))
    if slot is not None and slot.function == name:
        source = slot.source
    (node,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    functions[name] = _Function(name, node, source.splitlines(), function.fn.__globals__)
    for call in _calls(node):
        callee = function.fn.__globals__.get(call.func.id)  # type: ignore[attr-defined]
        if hasattr(callee, "fn"):
            _reach(callee, functions, slot)


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """Calls of functions by their plain name."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name):
            yield inner


def _callers_first(functions: Mapping[str, _Function]) -> list[_Function]:
    done: list[_Function] = []

    def visit(function: _Function) -> None:
        for call in _calls(function.node):
            callee = functions.get(call.func.id)  # type: ignore[attr-defined]
            if callee is not None and callee not in done:
                visit(callee)
        if function not in done:
            done.append(function)

    for function in functions.values():
        visit(function)
    return done[::-1]


def _thread(slot: Slot, functions: Mapping[str, _Function], kernels: set[str]) -> None:
    """Have the slot's pointers wherever what it is handed goes."""
    for function in functions.values():
        if slot.handed not in function.parameters:
            continue
        for call in _calls(function.node):
            callee = functions.get(call.func.id)  # type: ignore[attr-defined]
            if callee is None or slot.handed not in callee.parameters or callee.name == slot.function:
                continue
            at = callee.parameters.index(slot.handed) + 1
            call.args[at:at] = [ast.Name(pointer, ast.Load()) for pointer in slot.pointers]
        for call in _calls(function.node):
            if call.func.id == slot.function:  # type: ignore[attr-defined]
                at = functions[slot.function].parameters.index(slot.handed) + 1
                call.args[at:at] = [ast.Name(pointer, ast.Load()) for pointer in slot.pointers]
    for function in functions.values():
        if slot.handed in function.parameters:
            at = function.parameters.index(slot.handed) + 1
            function.node.args.args[at:at] = [ast.arg(pointer) for pointer in slot.pointers]
    for name in kernels:
        node = functions[name].node
        if slot.handed in functions[name].parameters:
            node.args.args = [a for a in node.args.args if a.arg != slot.handed]
            start = ast.parse(f"{slot.handed} = 0").body[0]
            node.body.insert(1 if ast.get_docstring(node) else 0, start)


def _put_in(function: _Function, functions: Mapping[str, _Function]) -> None:
    """Fold a function over what is known of its parameters, and note what it hands to others."""
    if function.known is None:
        if not function.calls:
            return
        function.known = _agreed(function)
    stored = {n.id for n in ast.walk(function.node) if isinstance(n, ast.Name) and not _is_read(n)}
    known = {name: value for name, value in function.known.items() if name not in stored}
    folded = Folded(known, function.names).visit(copy.deepcopy(function.node))
    function.node = ast.fix_missing_locations(folded)
    for call in _calls(function.node):
        callee = functions.get(call.func.id)  # type: ignore[attr-defined]
        if callee is not None:
            callee.calls.append(call)
    function.known = known


def _is_read(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Load)


def _agreed(function: _Function) -> dict[str, Any]:
    """Parameters for which every call hands over the same constant."""
    agreed: dict[str, Any] = {}
    for place, name in enumerate(function.parameters):
        given = [_argument(call, place, name) for call in function.calls]
        first = given[0]
        if isinstance(first, ast.Constant) and all(
            isinstance(other, ast.Constant)
            and (type(other.value), other.value) == (type(first.value), first.value)
            for other in given
        ):
            agreed[name] = first.value
    return agreed


def _argument(call: ast.Call, place: int, name: str) -> ast.expr:
    if place < len(call.args):
        return call.args[place]
    return next(keyword.value for keyword in call.keywords if keyword.arg == name)


def _drop_unread(function: _Function, kernel: bool) -> None:
    """Take out statements that name what nothing reads, then parameters that nothing reads."""
    while _without_dead(function.node):
        pass
    read = {n.id for n in ast.walk(function.node) if isinstance(n, ast.Name)}
    parameters = function.parameters
    gone = [place for place, name in enumerate(parameters) if name not in read]
    function.node.args.args = [a for a in function.node.args.args if a.arg in read]
    if kernel:
        return
    for call in function.calls:
        names = {parameters[place] for place in gone}
        call.keywords = [keyword for keyword in call.keywords if keyword.arg not in names]
        call.args = [argument for place, argument in enumerate(call.args) if place not in gone]


def _without_dead(node: ast.FunctionDef) -> bool:
    read = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and _is_read(inner):
            read.add(inner.id)
    found = False
    for inner in ast.walk(node):
        for attribute in ("body", "orelse"):
            block = getattr(inner, attribute, None)
            if not isinstance(block, list):
                continue
            kept = [s for s in block if not _is_dead(s, read)]
            found |= len(kept) < len(block)
            setattr(inner, attribute, kept)
    return found


def _is_dead(statement: ast.stmt, read: set[str]) -> bool:
    """Whether a statement gives names to values alone, none of which is read."""
    if not isinstance(statement, _STATEMENTS_THAT_ONLY_NAME):
        return False
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return not read & set(names)


# --- text --------------------------------------------------------------------------------------


def _text(function: _Function) -> str:
    node = function.node
    arguments = [_unparsed(argument) for argument in node.args.args]
    lines = ["@jit", *_call_lines(f"def {function.name}(", arguments, "):", 0)]
    lines += _block(node.body, 1, function.lines)
    return "\n".join(lines)


def _block(body: Sequence[ast.stmt], depth: int, source: Sequence[str]) -> Iterator[str]:
    pad = "    " * depth
    for statement in body:
        for comment in _comments(statement, source):
            yield pad + comment
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            yield from _docstring(statement, depth, source)
        elif isinstance(statement, ast.If):
            yield f"{pad}if {_unparsed(statement.test)}:"
            yield from _block(statement.body, depth + 1, source)
            if statement.orelse:
                yield f"{pad}else:"
                yield from _block(statement.orelse, depth + 1, source)
        elif isinstance(statement, ast.For):
            yield f"{pad}for {_unparsed(statement.target)} in {_unparsed(statement.iter)}:"
            yield from _block(statement.body, depth + 1, source)
        else:
            yield from broken(_unparsed(statement), depth)


def _comments(statement: ast.stmt, source: Sequence[str]) -> list[str]:
    """The lines of comments above a statement."""
    found: list[str] = []
    line = getattr(statement, "lineno", 1) - 2
    while 0 < line < len(source) and source[line].strip().startswith("#"):
        found.append(source[line].strip())
        line -= 1
    return found[::-1]


def _docstring(statement: ast.Expr, depth: int, source: Sequence[str]) -> Iterator[str]:
    for line in source[statement.lineno - 1 : statement.end_lineno]:
        yield "    " * depth + line.strip()


def _unparsed(node: ast.AST) -> str:
    text = ast.unparse(node)
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        text = f"return {text.removeprefix('return ').strip('()')}" if "(" not in text[8:-1] else text
    return text.replace("'", '"') if '"' not in text else text


def broken(text: str, depth: int) -> list[str]:
    """A statement of one line, broken inside of its outermost call where it is long."""
    pad = "    " * depth
    start = text.find("(")
    if (
        len(pad + text) <= WIDTH
        or start < 0
        or not text.endswith(")")
        or _closing(text, start) != len(text) - 1
    ):
        return [pad + text]
    return _call_lines(text[: start + 1], _split(text[start + 1 : -1].rstrip(",")), ")", depth)


def _call_lines(head: str, arguments: Sequence[str], tail: str, depth: int) -> list[str]:
    pad = "    " * depth
    whole = f"{pad}{head}{', '.join(arguments)}{tail}"
    if len(whole) <= WIDTH:
        return [whole]
    lines = [pad + head]
    current = ""
    for argument in arguments:
        longer = f"{current} {argument}," if current else f"{pad}    {argument},"
        if current and len(longer) > WIDTH:
            lines.append(current)
            longer = f"{pad}    {argument},"
        current = longer
    return [*lines, current, pad + tail]


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if not depth:
            return place
    return -1


def _split(text: str) -> list[str]:
    """Arguments of a call, apart."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]
