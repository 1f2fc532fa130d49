"""ATen's pointwise operators as Triton expressions, with the numbers that ATen gives.

Half-precision arguments arrive in float32 and results are rounded where ATen rounds. Division and square
root are rounded as IEEE 754 says (Triton's ``/`` is not); maximum and minimum let NaN through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

__all__ = ["HELPERS", "TEXTS", "Pointwise", "pointwise_of"]

aten = torch.ops.aten
prims = torch.ops.prims

Computed = Literal["result", "arguments"]


@dataclass(frozen=True)
class Pointwise:
    """``name`` in ``TEXTS``. ``computed``: arguments are converted to the dtype of the result, or to the one
    that they promote to. ``rounds``: whether a result may not be a number of a 16-bit dtype."""

    name: str
    computed: Computed = "result"
    rounds: bool = True


_SAME = {"rounds": False}
_COMPARED: dict[str, Any] = {"computed": "arguments", "rounds": False}

_TABLE: dict[Any, Pointwise] = {
    aten.add: Pointwise("add"),
    aten.sub: Pointwise("sub"),
    aten.mul: Pointwise("mul"),
    aten.remainder: Pointwise("remainder", rounds=False),
    aten.fmod: Pointwise("fmod", rounds=False),
    aten.neg: Pointwise("neg", rounds=False),
    aten.abs: Pointwise("abs", rounds=False),
    aten.exp: Pointwise("exp"),
    aten.exp2: Pointwise("exp2"),
    aten.expm1: Pointwise("expm1"),
    aten.log: Pointwise("log"),
    aten.log2: Pointwise("log2"),
    aten.log1p: Pointwise("log1p"),
    aten.sqrt: Pointwise("sqrt"),
    aten.rsqrt: Pointwise("rsqrt"),
    aten.reciprocal: Pointwise("reciprocal"),
    aten.sin: Pointwise("sin"),
    aten.cos: Pointwise("cos"),
    aten.tanh: Pointwise("tanh"),
    aten.sigmoid: Pointwise("sigmoid"),
    aten.erf: Pointwise("erf"),
    aten.relu: Pointwise("relu", rounds=False),
    aten.floor: Pointwise("floor", rounds=False),
    aten.ceil: Pointwise("ceil", rounds=False),
    aten.trunc: Pointwise("trunc", rounds=False),
    aten.sign: Pointwise("sign", rounds=False),
    aten.maximum: Pointwise("maximum", rounds=False),
    aten.minimum: Pointwise("minimum", rounds=False),
    aten.eq: Pointwise("eq", **_COMPARED),
    aten.ne: Pointwise("ne", **_COMPARED),
    aten.lt: Pointwise("lt", **_COMPARED),
    aten.le: Pointwise("le", **_COMPARED),
    aten.gt: Pointwise("gt", **_COMPARED),
    aten.ge: Pointwise("ge", **_COMPARED),
    aten.isnan: Pointwise("isnan", **_COMPARED),
    aten.isinf: Pointwise("isinf", **_COMPARED),
    aten.logical_not: Pointwise("logical_not", **_COMPARED),
    aten.logical_and: Pointwise("logical_and", **_COMPARED),
    aten.logical_or: Pointwise("logical_or", **_COMPARED),
    aten.logical_xor: Pointwise("logical_xor", **_COMPARED),
    aten.bitwise_not: Pointwise("bitwise_not", rounds=False),
    aten.bitwise_and: Pointwise("bitwise_and", rounds=False),
    aten.bitwise_or: Pointwise("bitwise_or", rounds=False),
    aten.bitwise_xor: Pointwise("bitwise_xor", rounds=False),
}


_BY_NAME = {packet._qualified_op_name.removeprefix("aten::"): rule for packet, rule in _TABLE.items()}


def pointwise_of(target: Any) -> Pointwise | None:
    """The rule of an operator (one of its overloads), ``None`` for one that is not in the table.

    Prims are called by torch's references of ATen and mean what the operator of that name does.
    """
    if getattr(target, "namespace", "") == "prims":
        return _BY_NAME.get(target._opname)
    return _TABLE.get(getattr(target, "overloadpacket", None))


Text = Callable[[Sequence[str], torch.dtype], str]


def _infix(sign: str) -> Text:
    return lambda a, dtype: f"{a[0]} {sign} {a[1]}"


def _call(name: str) -> Text:
    return lambda a, dtype: f"{name}({', '.join(a)})"


def _quotient(a: Sequence[str], dtype: torch.dtype) -> str:
    # Triton rounds float64 divisions correctly as they are.
    return f"tl.div_rn({a[0]}, {a[1]})" if dtype == torch.float32 else f"{a[0]} / {a[1]}"


def _root(a: Sequence[str], dtype: torch.dtype) -> str:
    return f"tl.sqrt_rn({a[0]})" if dtype == torch.float32 else f"tl.sqrt({a[0]})"


_NAN = "propagate_nan=tl.PropagateNan.ALL"


def _extreme(name: str) -> Text:
    def text(a: Sequence[str], dtype: torch.dtype) -> str:
        return f"tl.{name}({a[0]}, {a[1]}" + (f", {_NAN})" if dtype.is_floating_point else ")")

    return text


TEXTS: dict[str, Text] = {
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _quotient,
    "floordiv": lambda a, dtype: f"_floor_divide({a[0]}, {a[1]})",
    "remainder": _call("_remainder"),
    "fmod": _infix("%"),
    "neg": lambda a, dtype: f"-{a[0]}",
    "abs": _call("tl.abs"),
    "exp": _call("tl.exp"),
    "exp2": _call("tl.exp2"),
    "expm1": _call("_expm1"),
    "log": _call("tl.log"),
    "log2": _call("tl.log2"),
    "log1p": _call("_log1p"),
    "sqrt": _root,
    "rsqrt": lambda a, dtype: _quotient(("1.0", _root(a, dtype)), dtype),
    "reciprocal": lambda a, dtype: _quotient(("1.0", a[0]), dtype),
    "sin": _call("tl.sin"),
    "cos": _call("tl.cos"),
    "tanh": _call("_tanh"),
    "sigmoid": lambda a, dtype: _quotient(("1.0", f"1.0 + tl.exp(-{a[0]})"), dtype),
    "erf": _call("tl.erf"),
    "relu": lambda a, dtype: f"tl.where({a[0]} < 0, 0, {a[0]})",
    "floor": _call("tl.floor"),
    "ceil": _call("tl.ceil"),
    "trunc": lambda a, dtype: f"tl.where({a[0]} < 0, tl.ceil({a[0]}), tl.floor({a[0]}))",
    "sign": lambda a, dtype: f"tl.where({a[0]} > 0, 1, tl.where({a[0]} < 0, -1, 0))",
    "maximum": _extreme("maximum"),
    "minimum": _extreme("minimum"),
    "where": lambda a, dtype: f"tl.where({a[0]}, {a[1]}, {a[2]})",
    "eq": _infix("=="),
    "ne": _infix("!="),
    "lt": _infix("<"),
    "le": _infix("<="),
    "gt": _infix(">"),
    "ge": _infix(">="),
    "isnan": lambda a, dtype: f"{a[0]} != {a[0]}",
    "isinf": lambda a, dtype: f"tl.abs({a[0]}) == float('inf')",
    "logical_not": lambda a, dtype: f"{a[0]} == 0",
    "logical_and": lambda a, dtype: f"({a[0]} != 0) & ({a[1]} != 0)",
    "logical_or": lambda a, dtype: f"({a[0]} != 0) | ({a[1]} != 0)",
    "logical_xor": lambda a, dtype: f"({a[0]} != 0) ^ ({a[1]} != 0)",
    "bitwise_not": lambda a, dtype: f"{a[0]} == 0" if dtype == torch.bool else f"~{a[0]}",
    "bitwise_and": _infix("&"),
    "bitwise_or": _infix("|"),
    "bitwise_xor": _infix("^"),
    "to": lambda a, dtype: a[0],
}

HELPERS: dict[str, str] = {
    "_expm1": """\
@jit
def _expm1(x):
    # Kahan: (u - 1) x / log(u) with u = exp(x) takes the rounding of u out again.
    u = tl.exp(x)
    exact = tl.where(u == 1.0, x, tl.div_rn((u - 1.0) * x, tl.where(u == 1.0, 1.0, tl.log(u))))
    return tl.where(tl.abs(x) < 0.5, exact, u - 1.0)
""",
    "_log1p": """\
@jit
def _log1p(x):
    # Kahan: log(u) x / (u - 1) with u = 1 + x takes the rounding of u out again.
    u = 1.0 + x
    near = tl.where(u == 1.0, x, tl.div_rn(tl.log(u) * x, tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(tl.abs(x) < 0.5, near, tl.log(u))
""",
    "_tanh": """\
@jit
def _tanh(x):
    # Near 0 the polynomial of Cephes (tanhf), elsewhere 1 - 2 / (exp(2 |x|) + 1), exact in the limits.
    a = tl.abs(x)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    far = 1.0 - tl.div_rn(2.0, tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, p * z * x + x, tl.where(x < 0, -far, far))
""",
    "_floor_divide": """\
@jit
def _floor_divide(a, b):
    q = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), q - 1, q)
""",
    "_remainder": """\
@jit
def _remainder(a, b):
    # Of the sign of the divisor, where % has that of the dividend.
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)
""",
    "_max": """\
@jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "_min": """\
@jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
}
