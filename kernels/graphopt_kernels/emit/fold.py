"""Syntax trees folded over what is known: constants, branches that are taken, additions of 0.

What is folded is Triton: numbers that the compiler would fold as well. Only what it means the same without
loading, storing or computing anything is left out.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Folded"]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

_DIVIDED: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
"""Of what is not negative: Triton rounds towards zero, Python down."""

_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class Folded(ast.NodeTransformer):
    """Puts in ``known`` names, and constants out of the ``names`` of a module."""

    def __init__(self, known: Mapping[str, Any], names: Mapping[str, Any]) -> None:
        self._known, self._names = known, names

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        # Parameters stay: whether anything reads them shows later.
        node.body = self._block(node.body)
        return node

    def _block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in body:
            made = self.visit(statement)
            found += made if isinstance(made, list) else [made]
        return _to_the_return(found)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if not isinstance(node.ctx, ast.Load):
            return node
        if node.id in self._known:
            return _constant(self._known[node.id], node)
        value = getattr(self._names.get(node.id), "value", None)
        return _constant(value, node) if isinstance(value, (bool, int, float)) else node

    def visit_If(self, node: ast.If) -> Any:
        test = self.visit(node.test)
        if isinstance(test, ast.Constant):
            return self._block(node.body if test.value else node.orelse)
        node.test, node.body, node.orelse = test, self._block(node.body), self._block(node.orelse)
        return node

    def visit_For(self, node: ast.For) -> Any:
        node.iter, node.body = self.visit(node.iter), self._block(node.body)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        left = []
        for value in node.values:
            if not isinstance(value, ast.Constant):
                left.append(value)
            elif bool(value.value) is decides:
                return _constant(decides, node)
        if not left:
            return _constant(not decides, node)
        node.values = left
        return left[0] if len(left) == 1 else node

    def visit_Compare(self, node: ast.Compare) -> Any:
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.left, ast.Constant):
            (right,), compared = node.comparators, _COMPARED.get(type(node.ops[0]))
            if isinstance(right, ast.Constant) and compared is not None:
                return _constant(compared(node.left.value, right.value), node)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        left, right = node.left, node.right
        fold = _BINARY.get(type(node.op))
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant):
            one, other = _number(left), _number(right)
            if fold is None and one >= 0 and other > 0:
                fold = _DIVIDED.get(type(node.op))
            if fold is not None:
                return _constant(fold(one, other), node)
        # A factor of 0 stays: it has the shape of what it is multiplied with.
        unit = {ast.Mult: 1, ast.Add: 0}.get(type(node.op))
        if unit is not None:
            if _is_whole(left, unit):
                return right
            if _is_whole(right, unit):
                return left
        if isinstance(node.op, ast.FloorDiv) and _is_whole(right, 1):
            return left
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        self.generic_visit(node)
        return [] if isinstance(node.op, ast.Add) and _is_whole(node.value, 0) else node

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        # ``None`` is what operators of Triton take for what is not given.
        node.keywords = [
            k for k in node.keywords if not (isinstance(k.value, ast.Constant) and k.value.value is None)
        ]
        return node


def _to_the_return(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements up to one that ends the function: of a branch that is taken."""
    for number, statement in enumerate(body):
        if isinstance(statement, ast.Return):
            return body[: number + 1]
    return body


def _number(node: ast.Constant) -> Any:
    return node.value


def _is_whole(node: ast.expr, number: int) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value == number


def _constant(value: Any, like: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Constant(value), like)
