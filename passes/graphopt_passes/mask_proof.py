"""What a mask of any size hides, from how it is put together: it is never made.

A model that is captured in one graph compares positions with positions::

    %25 = aten.le(%keys, %queries)      : bool[1,1,n,n]     j <= i
    %29 = aten.eq(%27, %28)             : bool[1,1,n,n]     the same document
    %30 = aten.__and__(%25, %29)

The operands are vectors of n positions and constants. Whether their comparison is the triangle, or hides
nothing, is decided by their running maxima and minima, in O(n) and exactly. Of masks that are combined
only what each of them is matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from graphopt.capture.aliasing import Aliases
from graphopt_passes.constant_values import constant_value

__all__ = ["proven"]

_aten = torch.ops.aten

_BOTH = frozenset(
    {_aten.__and__.Tensor, _aten.bitwise_and.Tensor, _aten.logical_and.default, _aten.mul.Tensor}
)
_SAME = frozenset(
    {
        _aten.expand.default, _aten.unsqueeze.default, _aten.view.default, _aten.reshape.default,
        _aten.to.dtype, _aten.clone.default, _aten.contiguous.default, _aten.alias.default,
        _aten.detach.default,
    }
)  # fmt: skip
_ONES = frozenset({_aten.ones.default, _aten.new_ones.default, _aten.ones_like.default})

Comparison = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# (of a key's position and a query's, whether smaller keys are visible too)
_COMPARISONS: dict[Any, tuple[Comparison, bool]] = {
    _aten.le.Tensor: (torch.le, True),
    _aten.lt.Tensor: (torch.lt, True),
    _aten.ge.Tensor: (torch.ge, False),
    _aten.gt.Tensor: (torch.gt, False),
}
_TURNED = {
    _aten.le.Tensor: _aten.ge.Tensor,
    _aten.lt.Tensor: _aten.gt.Tensor,
    _aten.ge.Tensor: _aten.le.Tensor,
    _aten.gt.Tensor: _aten.lt.Tensor,
}
_VECTOR = 2**24
"""Elements of the longest vector that is computed."""


def proven(mask: fx.Node, aliases: Aliases) -> str:
    """``"causal"`` where a boolean mask is true on and below the diagonal alone, ``"empty"`` where it is true
    everywhere, ``""`` where neither could be shown. The size of the mask does not matter."""
    value = mask.meta.get("val")
    if (
        not isinstance(value, torch.Tensor)
        or value.dtype is not torch.bool
        or any(isinstance(size, torch.SymInt) for size in value.shape)
        or aliases.roots.get(mask, frozenset()) & aliases.changed
    ):
        return ""
    if mask.target in _ONES:
        return "empty"
    if mask.target in _BOTH:
        return _both(mask, value, aliases)
    if mask.target in _SAME and isinstance(mask.args[0], fx.Node):
        return _same(mask.args[0], value, aliases)
    if mask.target in _COMPARISONS or mask.target is _aten.eq.Tensor:
        return _compared(mask, aliases)
    return ""


def _both(mask: fx.Node, value: torch.Tensor, aliases: Aliases) -> str:
    found = []
    for part in mask.args[:2]:
        if not isinstance(part, fx.Node):
            return ""
        verdict = proven(part, aliases)
        # A triangle that is spread is another triangle.
        if not verdict or (verdict == "causal" and part.meta["val"].shape[-2:] != value.shape[-2:]):
            return ""
        found.append(verdict)
    return "causal" if "causal" in found else "empty"


def _same(source: fx.Node, value: torch.Tensor, aliases: Aliases) -> str:
    verdict = proven(source, aliases)
    known = source.meta.get("val")
    if verdict == "causal" and (known is None or known.shape[-2:] != value.shape[-2:]):
        return ""
    return verdict


def _compared(mask: fx.Node, aliases: Aliases) -> str:
    """Keys along the last axis compared with queries along the one before, or the other way round."""
    left, right = (_vector(part, aliases) for part in mask.args[:2])
    if left is None or right is None:
        return ""
    target: Any = mask.target
    if left[1] == -2 and right[1] == -1:
        left, right, target = right, left, _TURNED.get(target, target)
    if (left[1], right[1]) != (-1, -2):
        return ""
    keys, queries = left[0], right[0]
    if target is _aten.eq.Tensor:
        same = keys.min() == keys.max() == queries.min() and queries.min() == queries.max()
        return "empty" if bool(same) else ""
    compare, downward = _COMPARISONS[target]
    # The key that is visible last of those up to k, and first of those from k on.
    hardest = (torch.cummax if downward else torch.cummin)(keys, 0).values
    easiest = (torch.cummin if downward else torch.cummax)(keys.flip(0), 0).values.flip(0)
    if bool(compare(hardest[-1], queries).all()):
        return "empty"
    rows = torch.arange(len(queries))
    seen = compare(hardest[rows.clamp(max=len(keys) - 1)], queries)
    below = rows < len(keys) - 1
    beyond = compare(easiest[rows[below] + 1], queries[below])
    return "causal" if bool(seen.all()) and not bool(beyond.any()) else ""


def _vector(part: Any, aliases: Aliases) -> tuple[torch.Tensor, int] | None:
    """An operand that varies along one of the last two axes alone, with that axis: integers, constant."""
    value = part.meta.get("val") if isinstance(part, fx.Node) else None
    if (
        not isinstance(value, torch.Tensor)
        or value.is_floating_point()
        or value.is_complex()
        or any(isinstance(size, torch.SymInt) for size in value.shape)
        or not 0 < value.numel() <= _VECTOR
    ):
        return None
    shape = (1, 1, *value.shape)
    axis = -1 if shape[-1] == value.numel() else -2
    if shape[axis] != value.numel():
        return None
    found = constant_value(part, "an operand", aliases)
    return (found.reshape(-1), axis) if isinstance(found, torch.Tensor) else None
