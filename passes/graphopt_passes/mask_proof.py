"""What a mask of any size hides, from how it is put together: it is never made.

A model that is captured in one graph compares positions with positions::

    %25 = aten.le(%keys, %queries)      : bool[1,1,n,n]     j <= i
    %29 = aten.eq(%27, %28)             : bool[1,1,n,n]     the same document
    %30 = aten.__and__(%25, %29)

The operands are vectors of n positions and constants. Whether their comparison is a band along the diagonal,
such as the triangle or a window, or hides nothing, is decided by their running maxima and minima, in O(n)
and exactly. Of masks that are combined only what each of them is matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import Aliases
from graphopt_passes.constant_values import constant_value

__all__ = ["Band", "band", "hides_later", "proven"]

_aten = torch.ops.aten

_BOTH = frozenset(
    {_aten.__and__.Tensor, _aten.bitwise_and.Tensor, _aten.logical_and.default, _aten.mul.Tensor}
)
_SAME = frozenset(
    {
        _aten.expand.default, _aten.unsqueeze.default, _aten.view.default, _aten.reshape.default,
        _aten.to.dtype, _aten.to.dtype_layout, _aten.clone.default, _aten.contiguous.default,
        _aten.alias.default, _aten.detach.default,
    }
)  # fmt: skip
_UNMOVED = frozenset(
    {
        _aten.unsqueeze.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.alias.default,
        _aten.detach.default, _aten.clone.default,
    }
)  # fmt: skip
"""What leaves numbers where they are along the axis that they are counted along."""

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


Band = tuple[int | None, int | None]
"""``(left, right)``: query i sees the keys from i - left to i + right; ``None`` where there is no bound."""

_NO_BOUND: Band = (None, None)


def proven(mask: fx.Node, aliases: Aliases) -> str:
    """``"causal"`` where a boolean mask is true on and below the diagonal alone, ``"empty"`` where it is true
    everywhere, ``""`` where neither could be shown. The size of the mask does not matter."""
    return {_NO_BOUND: "empty", (None, 0): "causal"}.get(band(mask, aliases) or (0, 0), "")


def band(mask: fx.Node, aliases: Aliases) -> Band | None:
    """The band along which a boolean mask is true, every key within it and none beyond; ``None`` where none
    could be shown. Bounds that hide no key are left out. The size of the mask does not matter."""
    value = mask.meta.get("val")
    if (
        not isinstance(value, torch.Tensor)
        or value.dtype is not torch.bool
        or any(isinstance(size, torch.SymInt) for size in value.shape)
        or aliases.roots.get(mask, frozenset()) & aliases.changed
    ):
        return None
    if mask.target in _ONES:
        return _NO_BOUND
    if mask.target in _BOTH:
        return _both(mask, value, aliases)
    if mask.target in _SAME and isinstance(mask.args[0], fx.Node):
        return _same(mask.args[0], value, aliases)
    if mask.target in _COMPARISONS or mask.target is _aten.eq.Tensor:
        return _compared(mask, aliases)
    return None


def hides_later(mask: fx.Node, aliases: Aliases) -> bool:
    """Whether a boolean mask surely hides from every query the keys behind its own place, whatever else it
    hides. Other than a band's, its size may be a symbol, and parts of it may depend on inputs."""
    found = band(mask, aliases)
    if found is not None:
        return found[1] is not None and found[1] <= 0
    value = mask.meta.get("val")
    written = aliases.roots.get(mask, frozenset()) & aliases.changed
    if written or not isinstance(value, torch.Tensor) or not _is_boolean(value):
        return False
    if mask.target in _BOTH or mask.target in _SAME:
        # A band that is spread is another band.
        return any(
            isinstance(part, fx.Node)
            and _is_boolean(part.meta.get("val"))
            and part.meta["val"].dim() >= 2
            and all(map(_torch.is_same_size, part.meta["val"].shape[-2:], value.shape[-2:]))
            and hides_later(part, aliases)
            for part in mask.args[:2]
        )
    if mask.target is _aten.tril.default:
        diagonal = mask.args[1] if len(mask.args) > 1 else 0
        return isinstance(diagonal, int) and diagonal <= 0
    return mask.target in _COMPARISONS and _counts_later_out(mask)


def _is_boolean(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _counts_later_out(mask: fx.Node) -> bool:
    left, right = (_counted(part) for part in mask.args[:2])
    target: Any = mask.target
    if left is None or right is None:
        return False
    if (left[1], right[1]) == (-2, -1):
        left, right, target = right, left, _TURNED[target]
    if (left[1], right[1]) != (-1, -2):
        return False
    # Key j is shown to query i where j + left <= i + right.
    last = right[0] - left[0]
    return (target is _aten.le.Tensor and last <= 0) or (target is _aten.lt.Tensor and last <= 1)


def _counted(part: object) -> tuple[int, int] | None:
    """From which number on an operand counts places one by one, along one of the last two axes, and along
    which; ``None`` where it does not."""
    value = part.meta.get("val") if isinstance(part, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    shape = (1, 1, *value.shape)
    axis = -2 if isinstance(shape[-1], int) and shape[-1] == 1 else -1
    first = 0
    while isinstance(part, fx.Node) and part.target is not _aten.arange.default:
        number = part.args[1] if len(part.args) > 1 else None
        if part.target is _aten.add.Tensor and isinstance(number, int) and not part.kwargs:
            first += number
        elif part.target not in _UNMOVED and not _is_beginning(part):
            return None
        part = part.args[0] if part.args else None
    others = [*shape[:-2], *(shape[-2:-1] if axis == -1 else ())]
    alone = all(isinstance(size, int) and size == 1 for size in others)
    return (first, axis) if isinstance(part, fx.Node) and alone else None


def _is_beginning(part: fx.Node) -> bool:
    """Whether a value is a slice that begins where its source does, and leaves nothing out between."""
    names = ("self", "dim", "start", "end", "step")
    given: dict[str, Any] = dict(zip(names, part.args, strict=False)) | dict(part.kwargs)
    start, step = given.get("start"), given.get("step", 1)
    return part.target is _aten.slice.Tensor and (start is None or start == 0) and step == 1


def _both(mask: fx.Node, value: torch.Tensor, aliases: Aliases) -> Band | None:
    left: list[int] = []
    right: list[int] = []
    for part in mask.args[:2]:
        found = band(part, aliases) if isinstance(part, fx.Node) else None
        # A band that is spread is another band.
        if found is None or (
            found != _NO_BOUND
            and (not isinstance(part, fx.Node) or part.meta["val"].shape[-2:] != value.shape[-2:])
        ):
            return None
        left += [found[0]] if found[0] is not None else []
        right += [found[1]] if found[1] is not None else []
    return min(left, default=None), min(right, default=None)


def _same(source: fx.Node, value: torch.Tensor, aliases: Aliases) -> Band | None:
    found = band(source, aliases)
    known = source.meta.get("val")
    if found is not None and found != _NO_BOUND and (known is None or known.shape[-2:] != value.shape[-2:]):
        return None
    return found


def _compared(mask: fx.Node, aliases: Aliases) -> Band | None:
    """Keys along the last axis compared with queries along the one before, or the other way round."""
    left, right = (_vector(part, aliases) for part in mask.args[:2])
    if left is None or right is None:
        return None
    target: Any = mask.target
    if left[1] == -2 and right[1] == -1:
        left, right, target = right, left, _TURNED.get(target, target)
    if (left[1], right[1]) != (-1, -2):
        return None
    keys, queries = left[0], right[0]
    if target is _aten.eq.Tensor:
        same = keys.min() == keys.max() == queries.min() and queries.min() == queries.max()
        return _NO_BOUND if bool(same) else None
    compare, downward = _COMPARISONS[target]
    hardest = (torch.amax if downward else torch.amin)(keys, 0)
    if bool(compare(hardest, queries).all()):
        return _NO_BOUND
    bound = _last_seen(keys, queries, compare, downward)
    if bound is not None:
        return None, bound
    # The same from the other end: key n - 1 - j for key j, and the last query first.
    bound = _last_seen(keys.flip(0), queries.flip(0), compare, downward)
    return None if bound is None else (bound + len(queries) - len(keys), None)


def _last_seen(
    keys: torch.Tensor, queries: torch.Tensor, compare: Comparison, downward: bool
) -> int | None:
    """``r`` where every query i sees the keys up to i + r and no others; ``None`` where none was found."""
    partial = compare(keys[0], queries) & ~compare(keys[-1], queries)
    if not bool(partial.any()):
        return None
    row = int(partial.nonzero()[0])
    bound = int(compare(keys, queries[row]).nonzero()[-1]) - row
    # The key that is visible last of those up to k, and first of those from k on.
    hardest = (torch.cummax if downward else torch.cummin)(keys, 0).values
    easiest = (torch.cummin if downward else torch.cummax)(keys.flip(0), 0).values.flip(0)
    last = (torch.arange(len(queries)) + bound).clamp(-1, len(keys) - 1)
    some, below = last >= 0, last < len(keys) - 1
    seen = compare(hardest[last[some]], queries[some])
    beyond = compare(easiest[last[below] + 1], queries[below])
    return bound if bool(seen.all()) and not bool(beyond.any()) else None


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
