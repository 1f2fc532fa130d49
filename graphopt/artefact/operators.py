"""What a node of a saved graph may call: registered operators of known namespaces, and few functions by name.

    "aten::mm.default"   ->  torch.ops.aten.mm.default
    "getitem"            ->  operator.getitem
    "os.system"          ->  ArtefactError

Names are looked up where operators are registered, never imported, so a graph from elsewhere can call nothing
but these. Operators that read or write files are none of them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.errors import ArtefactError, nearest

if TYPE_CHECKING:
    from graphopt.plugins.host import PluginHost

__all__ = ["Operators", "target_text"]

_TORCH = ("aten", "prims", "rngprims")
"""torch's own namespaces of operators that compute."""

_NAME = re.compile(r"([A-Za-z_]\w*)::([A-Za-z_]\w*)\.([A-Za-z_]\w*)\Z")

_HIGHER_ORDER = ("run_and_save_rng_state", "run_with_rng_state")
"""Operators that take an operator: they draw the same random numbers again."""


_ARITHMETIC = (
    *("add", "sub", "mul", "floordiv", "mod", "neg", "pow", "truediv"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
)
"""Functions of ``operator`` that programs compute sizes with."""

_SYMBOLIC = ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum")
"""Functions of ``torch`` that they compute sizes with."""


def _functions() -> dict[str, Callable[..., Any]]:
    return {
        **{name: getattr(operator, name) for name in _ARITHMETIC},
        **{name: getattr(torch, name) for name in _SYMBOLIC if hasattr(torch, name)},
        "getitem": operator.getitem,
        "enter_autocast": _torch.enter_autocast(),
        "exit_autocast": _torch.exit_autocast(),
        "set_grad_enabled": _torch.set_grad_enabled(),
    }


def target_text(target: Any) -> str:
    """The name of what a node calls, as ``Operators.target`` reads it.

    Raises ``ArtefactError`` for a function of the model's own, or of Python's.
    """
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name}.{target._overloadname}"
    if isinstance(target, torch._ops.HigherOrderOperator) and str(target) in _HIGHER_ORDER:
        return str(target)
    for name, function in _functions().items():
        if target is function:
            return name
    said = target if isinstance(target, str) else getattr(target, "__qualname__", None) or str(target)
    raise ArtefactError(f"the program calls {said}, which is no registered operator")


class Operators:
    """The operators that graphs of an artefact may call: torch's, those of the plugins of ``host``, and those
    in the namespaces ``more``, which the caller trusts."""

    def __init__(self, host: PluginHost, more: Iterable[str] = ()) -> None:
        # Asked for, plugins bring the operators that graphs call.
        self._kernels = {spec.op for spec in host.kernels().values()}
        host.codecs()
        self._plugins = {op.partition("::")[0] for op in self._kernels}
        self._more = frozenset(more)
        self._functions = _functions()
        self._found: dict[str, Any] = {}

    @property
    def spaces(self) -> list[str]:
        """Namespaces of operators that may be called."""
        return sorted({*_TORCH, "graphopt", *self._plugins, *self._more})

    def target(self, name: str, *, provider: str = "") -> Any:
        """What the node calls whose target is ``name``. ``provider``: the plugin that it is said to be of.

        Raises ``ArtefactError`` for whatever is no operator that may be called, naming it.
        """
        if name not in self._found:
            self._found[name] = self._look_up(name, provider)
        return self._found[name]

    def _look_up(self, name: str, provider: str) -> Any:
        if name in self._functions:
            return self._functions[name]
        if name in _HIGHER_ORDER:
            return getattr(torch.ops.higher_order, name)
        found = _NAME.match(name)
        if found is None:
            raise ArtefactError(
                f"a graph calls {name!r}, which is no operator",
                hint="expected namespace::operator.overload of a registered operator",
            )
        space, operator_name, overload = found.groups()
        if space not in self.spaces:
            close = nearest(space, self.spaces)
            raise ArtefactError(
                f"a graph calls {name!r}, whose namespace {space!r} is not one that artefacts may call"
                + (f"; plugin {provider} provides it" if provider else ""),
                hint=(f"install and load plugin {provider}; " if provider else "")
                + (f"nearest: {close!r}; " if close else "")
                + f'where you trust it, graphopt.load(..., operators=("{space}",))',
            )
        packet = getattr(getattr(torch.ops, space), operator_name, None)
        made = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
        if not isinstance(made, torch._ops.OpOverload):
            raise ArtefactError(
                f"a graph calls {name!r}, which is not registered here",
                hint=f"install and load plugin {provider}"
                if provider
                else "import the package that defines it",
            )
        if any(argument.name == "filename" for argument in made._schema.arguments):
            raise ArtefactError(f"a graph calls {name!r}, which reads or writes files")
        return made
