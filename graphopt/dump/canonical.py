"""Canonical names, types and operands: what every dump format of a program is written with.

Nothing here depends on fx node names: values are numbered in graph order, parameters and buffers
go by their dotted name in the model, symbolic sizes by the input dimension that defines them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from itertools import count
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
import torch.fx as fx

from graphopt.program import Signature, tensor_leaves

__all__ = ["Names", "dtype_text", "op_text"]

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
# A symbol in the text of a size: an identifier that is not called (``Max(s0, 2)`` has one, s0).
_SYMBOL = re.compile(r"\b[A-Za-z_]\w*\b(?!\s*\()")


def dtype_text(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bf16"``; a dtype without a short name keeps torch's."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def op_text(node: fx.Node) -> str:
    """What a call node calls: ``aten.pow.Tensor_Scalar``, ``aten.mm`` (default overload), ``.item``."""
    if isinstance(node.target, str):
        return f".{node.target}" if node.op == "call_method" else f"@{node.target}"
    return _callable_text(node.target)


def _callable_text(target: Any) -> str:
    if isinstance(target, (type, FunctionType, MethodType, BuiltinFunctionType)):
        return f"{str(target.__module__).removeprefix('_')}.{target.__qualname__}"
    text = str(target)
    # Operators print their own name; what else is callable prints its address, its type does not.
    return type(target).__qualname__ if text.startswith("<") else text.removesuffix(".default")


class Names:
    """Names of one graph's values. ``symbols`` maps torch's symbols to the names used in dumps.

    Values are ``%0``, ``%1``, ... in graph order (inputs first); a parameter or buffer goes by its
    dotted name, an input that is a symbolic size by that symbol, an attribute of the graph module
    by ``@name``. ``definitions`` says where symbols come from (``"batch": "%0[0]"``).
    """

    def __init__(
        self, graph: fx.Graph, signature: Signature, symbols: Mapping[str, str], *, inherited: bool = False
    ) -> None:
        self.symbols: dict[str, str] = dict(symbols) if inherited else _symbol_names(graph, symbols)
        self._names: dict[fx.Node, str] = {}
        fqns = {spec.node: spec.fqn for spec in signature.by_role("parameter", "buffer") if spec.fqn}
        taken: set[str] = set()
        number = 0
        for node in graph.nodes:
            if node.op == "output":
                continue
            given = ""
            if node.op == "placeholder":
                given = fqns.get(node.name, "") or self.symbols.get(str(node.meta.get("val")), "")
            if node.op == "get_attr":
                self._names[node] = f"@{node.target}"
            elif given and given not in taken:
                taken.add(given)
                self._names[node] = given
            else:
                self._names[node] = f"%{number}"
                number += 1
        self._by_node_name = {node.name: name for node, name in self._names.items()}
        self.definitions: dict[str, str] = {} if inherited else self._define(graph, symbols)

    def _define(self, graph: fx.Graph, told: Mapping[str, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in graph.nodes:
            for raw, place in _dimensions(node) if node.op == "placeholder" else ():
                if raw in self.symbols and place:
                    found.setdefault(raw, self._names[node] + place)
        out = {}
        for raw, name in self.symbols.items():
            text = told.get(raw, "")
            if text and not text.isidentifier():
                out[name] = text
            elif raw in found:
                out[name] = found[raw]
        return out

    def of(self, node: fx.Node) -> str:
        return self._names[node]

    def of_name(self, node_name: str) -> str:
        """The canonical name of the node called ``node_name``; that text itself where there is none."""
        return self._by_node_name.get(node_name, node_name)

    def size(self, value: Any) -> str:
        """A size, symbolic or not, with symbols renamed."""
        return _SYMBOL.sub(lambda match: self.symbols.get(match[0], match[0]), str(value))

    def type(self, value: Any) -> str:
        """``f32[B,8]``; ``(f32[B,8], f32[B])`` for several values; ``int = 4*B`` for a symbolic size."""
        if isinstance(value, torch.Tensor):
            return f"{dtype_text(value.dtype)}[{','.join(self.size(dim) for dim in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.type(item) for item in value)})"
        for kind, name in ((torch.SymInt, "int"), (torch.SymFloat, "float"), (torch.SymBool, "bool")):
            if isinstance(value, kind):
                return f"{name} = {self.size(value)}"
        if isinstance(value, (bool, int, float, complex)):
            return f"{type(value).__name__} = {value}"
        return "none" if value is None else type(value).__name__

    def operand(self, value: Any) -> str:
        """An argument as it reads in a call."""
        if isinstance(value, fx.Node):
            return self.of(value)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.operand(item) for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{key}: {self.operand(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            bounds = [value.start, value.stop] + ([value.step] if value.step is not None else [])
            return ":".join("" if bound is None else self.operand(bound) for bound in bounds)
        if isinstance(value, torch.dtype):
            return dtype_text(value)
        if isinstance(value, (torch.layout, torch.memory_format)):
            return str(value).removeprefix("torch.")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.size(value)
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            return repr(value)
        if isinstance(value, torch.device):
            return str(value)
        if callable(value):
            return _callable_text(value)
        # The repr of an arbitrary object may hold its address; its type does not.
        return f"<{type(value).__qualname__}>"

    def call(self, node: fx.Node) -> str:
        """``aten.pow.Tensor_Scalar(%10, 2)``; ``%4[0]`` for one of several values."""
        if node.target is operator.getitem and len(node.args) == 2:
            return f"{self.operand(node.args[0])}[{self.operand(node.args[1])}]"
        parts = [self.operand(arg) for arg in node.args]
        parts += [f"{key}={self.operand(value)}" for key, value in node.kwargs.items()]
        return f"{op_text(node)}({', '.join(parts)})"


def _symbol_names(graph: fx.Graph, told: Mapping[str, str]) -> dict[str, str]:
    """A name for every symbol, in order of appearance: the one told where it is a name, else s0, s1."""
    names: dict[str, str] = {}
    free = (name for index in count() if (name := f"s{index}") not in told.values())
    for node in graph.nodes:
        for raw, _ in _dimensions(node):
            for symbol in _SYMBOL.findall(raw):
                if symbol not in names:
                    given = told.get(symbol, "")
                    names[symbol] = given if given.isidentifier() else next(free)
    return names


def _dimensions(node: fx.Node) -> Iterable[tuple[str, str]]:
    """Symbolic sizes of a value with where each stands, as text: ``("s77", "[0]")``."""
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        yield str(value), ""
    for tensor in tensor_leaves(value):
        for index, dim in enumerate(tensor.shape):
            if not isinstance(dim, int):
                yield str(dim), f"[{index}]"
