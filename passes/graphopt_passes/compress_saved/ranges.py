"""Which whole numbers a value of a program can hold, from how it is computed.

An interval is proven from below: a comparison gives 0 or 1, indices of a reduction lie within the
dimension, indices of pooling within the plane, sums of non-negative numbers within their count. What is
not known is ``None``: the value of an input, or an operator that is not listed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
import torch.fx as fx

__all__ = ["Interval", "interval_of", "narrowest"]

_aten = torch.ops.aten
Interval = tuple[int, int]
"""Least and greatest, both possible."""

_DEPTH = 32
"""How many operators back a proof may go."""

_NARROW = (torch.uint8, torch.int16, torch.int32)


def narrowest(interval: Interval) -> torch.dtype | None:
    """The smallest integer type that holds an interval, ``None`` if int64 alone does."""
    for dtype in _NARROW:
        bounds = torch.iinfo(dtype)
        if bounds.min <= interval[0] and interval[1] <= bounds.max:
            return dtype
    return None


def interval_of(node: fx.Node, depth: int = _DEPTH) -> Interval | None:
    """What the elements of ``node``, a tensor of integers or booleans, lie between."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or depth == 0 or node.op != "call_function":
        return None
    if value.dtype is torch.bool:
        return (0, 1)
    if value.is_floating_point() or value.is_complex():
        return None
    rule = _element if node.target is operator.getitem else _RULES.get(_packet(node))
    found = rule(node, depth - 1) if rule is not None and _shape(node) is not None else None
    # A type that does not hold the result wraps around.
    bounds = torch.iinfo(value.dtype)
    return found if found is not None and bounds.min <= found[0] and found[1] <= bounds.max else None


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", node.target)


def _shape(node: object) -> tuple[int, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
        return None
    return tuple(value.shape)


def _within(count: int) -> Interval:
    return (0, max(count - 1, 0))


def _element(node: fx.Node, depth: int) -> Interval | None:
    """An element of a tuple: the indices that an operator returns beside its values."""
    call, index = node.args
    assert isinstance(call, fx.Node)
    packet = _packet(call)
    shape = _shape(call.args[0]) if call.args else None
    if shape is None or index != 1:
        return None
    if packet in _POOLS:
        # Offsets within the plane, or the volume, that is pooled over.
        return _within(math.prod(shape[-_POOLS[packet] :]))
    if packet in _SELECTIONS:
        position = _SELECTIONS[packet]
        dim = call.args[position] if len(call.args) > position else call.kwargs.get("dim", -1)
        return _within(shape[dim]) if isinstance(dim, int) and shape else (0, 0)
    return None


def _of_dimension(node: fx.Node, depth: int) -> Interval | None:
    """``argmax`` and the like: within the dimension, or the whole tensor where none is named."""
    shape = _shape(node.args[0])
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if shape is None:
        return None
    return _within(shape[dim]) if isinstance(dim, int) and shape else _within(math.prod(shape))


def _argsort(node: fx.Node, depth: int) -> Interval | None:
    shape = _shape(node.args[0])
    return _within(max(shape)) if shape else None


def _arange(node: fx.Node, depth: int) -> Interval | None:
    numbers = [arg for arg in node.args if not isinstance(arg, (fx.Node, torch.SymInt))]
    if len(numbers) != len(node.args) or not all(isinstance(n, int) for n in numbers):
        return None
    values = range(*numbers)  # type: ignore[arg-type]
    return (min(values), max(values)) if len(values) else (0, 0)


def _same(node: fx.Node, depth: int) -> Interval | None:
    source = node.args[0]
    return interval_of(source, depth) if isinstance(source, fx.Node) else None


def _full(node: fx.Node, depth: int) -> Interval | None:
    fill = node.args[1]
    return (int(fill), int(fill)) if isinstance(fill, (int, bool)) else None


def _sum(node: fx.Node, depth: int) -> Interval | None:
    """Partial sums of non-negative numbers too: those of ``cumsum``."""
    source = node.args[0]
    found = interval_of(source, depth) if isinstance(source, fx.Node) else None
    shape = _shape(source)
    if found is None or shape is None or found[0] < 0:
        return None
    made = node.meta["val"]
    if node.target is _aten.cumsum.default:
        dim = node.args[1]
        return (0, found[1] * (shape[dim] if shape and isinstance(dim, int) else 1))
    return (0, found[1] * (math.prod(shape) // max(math.prod(made.shape), 1)))


def _arithmetic(combine: Callable[[int, int], int]) -> Callable[[fx.Node, int], Interval | None]:
    """Corners of two intervals, for functions that are monotone in each argument."""

    def rule(node: fx.Node, depth: int) -> Interval | None:
        if node.kwargs or len(node.args) != 2:
            return None
        sides: list[Interval] = []
        for arg in node.args:
            found = interval_of(arg, depth) if isinstance(arg, fx.Node) else None
            if isinstance(arg, int):
                found = (int(arg), int(arg))
            if found is None:
                return None
            sides.append(found)
        corners = [combine(a, b) for a in sides[0] for b in sides[1]]
        return min(corners), max(corners)

    return rule


def _clamp(node: fx.Node, depth: int) -> Interval | None:
    places = ((1, "min"), (2, "max"))
    low, high = (node.args[at] if len(node.args) > at else node.kwargs.get(name) for at, name in places)
    known = _same(node, depth)
    if known is None and isinstance(low, int) and isinstance(high, int):
        return (low, high) if low <= high else None
    return known


def _remainder(node: fx.Node, depth: int) -> Interval | None:
    by = node.args[1]
    return (0, by - 1) if isinstance(by, int) and by > 0 else None


def _where(node: fx.Node, depth: int) -> Interval | None:
    sides = [interval_of(arg, depth) for arg in node.args[1:3] if isinstance(arg, fx.Node)]
    if len(sides) != 2 or sides[0] is None or sides[1] is None:
        return None
    return min(sides[0][0], sides[1][0]), max(sides[0][1], sides[1][1])


_POOLS = {
    _aten.max_pool2d_with_indices: 2, _aten.max_pool3d_with_indices: 3,
    _aten.adaptive_max_pool2d: 2, _aten.adaptive_max_pool3d: 3,
    _aten.fractional_max_pool2d: 2, _aten.fractional_max_pool3d: 3,
}  # fmt: skip
# Operators that return values and their positions in a dimension, and where that is among the arguments.
_SELECTIONS = {
    _aten.max: 1, _aten.min: 1, _aten.sort: 1, _aten.topk: 2, _aten.kthvalue: 2, _aten.mode: 1,
    _aten.median: 1, _aten.nanmedian: 1, _aten.cummax: 1, _aten.cummin: 1,
}  # fmt: skip
_RULES: dict[object, Callable[[fx.Node, int], Interval | None]] = {
    **dict.fromkeys((_aten.argmax, _aten.argmin), _of_dimension),
    _aten.argsort: _argsort,
    _aten.arange: _arange,
    **dict.fromkeys(
        (
            _aten.view, _aten.reshape, _aten._unsafe_view, _aten.expand, _aten.slice, _aten.select,
            _aten.permute, _aten.transpose, _aten.t, _aten.squeeze, _aten.unsqueeze, _aten.detach,
            _aten.clone, _aten.alias, _aten._to_copy, _aten.flip, _aten.repeat,
            _aten.index_select, _aten.gather,
        ),
        _same,
    ),
    **dict.fromkeys((_aten.full, _aten.full_like), _full),
    **dict.fromkeys((_aten.sum, _aten.cumsum), _sum),
    _aten.add: _arithmetic(lambda a, b: a + b),
    _aten.sub: _arithmetic(lambda a, b: a - b),
    _aten.mul: _arithmetic(lambda a, b: a * b),
    _aten.minimum: _arithmetic(min),
    _aten.maximum: _arithmetic(max),
    _aten.clamp: _clamp,
    _aten.remainder: _remainder,
    _aten.where: _where,
}  # fmt: skip
