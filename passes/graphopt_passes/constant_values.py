"""Values of a program that depend on no input: they are computed, on the CPU, not guessed from patterns."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.aliasing import Aliases
from graphopt.capture.structure import attribute, is_inline

__all__ = ["constant_value", "hides_a_row"]

_aten = torch.ops.aten

# What these make depends on the shape and type of their input, not on what it holds.
_SHAPE_ONLY = frozenset(
    {
        _aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default, _aten.new_empty.default,
        _aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default,
    }
)  # fmt: skip
_LARGEST = 2**28
"""Elements of the largest value that is computed: 256 MiB as booleans."""


def constant_value(wanted: fx.Node, what: str, aliases: Aliases | None) -> torch.Tensor | Reason:
    """The value of a node, or the reason why it cannot be known; ``what`` names it there.

    ``aliases`` are those of the graph; ``None`` where no part of the value is known to be written in place.
    """
    known = wanted.meta.get("val")
    if isinstance(known, torch.Tensor):
        if any(isinstance(size, torch.SymInt) for size in known.shape):
            return Reason(f"the size of {what} is not fixed", (wanted.name,))
        if known.numel() > _LARGEST:
            return Reason(f"{what} has {known.numel()} elements, more than {_LARGEST}", (wanted.name,))
    values: dict[fx.Node, Any] = {}
    stack = [wanted]
    while stack:
        node = stack[-1]
        if node in values:
            stack.pop()
            continue
        if aliases is not None and aliases.roots.get(node, frozenset()) & aliases.changed:
            return Reason(f"{what} is written in place", (node.name,))
        if node.op == "placeholder":
            return Reason(f"{what} depends on an input", (node.name,))
        if node.op == "get_attr":
            constant = attribute(node.graph, node)
            if not is_inline(constant):
                return Reason(f"{what} depends on a constant of the model", (node.name,))
            values[node] = constant.detach().cpu().clone()
            continue
        if node.op != "call_function":
            return Reason(f"{what} depends on what is no call of an operator", (node.name,))
        shaped = node.args[0] if node.target in _SHAPE_ONLY else None
        if isinstance(shaped, fx.Node):
            stand_in = shaped.meta["val"]
            values.setdefault(shaped, torch.empty(stand_in.shape, dtype=stand_in.dtype))
        missing = [source for source in node.all_input_nodes if source not in values]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return Reason(f"{what} is random", (node.name,))
        try:
            values[node] = _run(node, values)
        except Exception as error:
            return Reason(f"{what} could not be evaluated ({type(error).__name__})", (node.name,))
        if isinstance(shaped, fx.Node):
            # The stand-in has the shape alone: whoever needs the value computes it.
            del values[shaped]
    result = values[wanted]
    return result if isinstance(result, torch.Tensor) else Reason(f"{what} is not a tensor", (wanted.name,))


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def bind(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args = fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
    assert callable(node.target)
    return node.target(*map(bind, args), **{key: bind(value) for key, value in kwargs.items()})


def hides_a_row(
    mask: fx.Node, aliases: Aliases, given: Collection[str] = (), hidden: bool | None = None
) -> Reason | None:
    """Whether a row of a mask may be hidden whole, and where that would come from; ``None`` if not.

    ``hidden`` is the value of a boolean mask where it hides; without it the mask is added to the scores,
    and what hides is minus infinity. Parameters are taken to be finite.
    """
    value = constant_value(mask, "the mask", aliases)
    if isinstance(value, torch.Tensor):
        hides = value == float("-inf") if hidden is None else value == hidden
        whole = bool(hides.all(-1).any())
        return Reason("a row of the mask hides everything", (mask.name,)) if whole else None
    if hidden is not None:
        return value
    seen: set[fx.Node] = set()
    stack = [mask]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        known = node.meta.get("val")
        is_floating = isinstance(known, torch.Tensor) and known.is_floating_point()
        if node.op == "placeholder" and is_floating and node.name in given:
            return Reason("the mask comes from an input, which may hide a whole row", (node.name,))
        literals = [item for item in (*node.args, *node.kwargs.values()) if isinstance(item, float)]
        if any(item in (float("-inf"), float("inf")) for item in literals):
            return Reason("the mask holds minus infinity, and may hide a whole row", (node.name,))
        if is_floating or node is mask:
            stack.extend(node.all_input_nodes)
    return None

