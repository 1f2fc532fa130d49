"""Operators of a backward that need less of a value than the value: a condition on it, or its shape.

===================================  =====================================================
reads                                what of it decides
===================================  =====================================================
``threshold_backward(g, x, t)``      ``x <= t`` (ReLU: its own output against 0)
``leaky_relu_backward(g, x, ...)``   ``x > 0``
a comparison                         itself: it can be made where the value is
pooling and the like                 the value's shape and layout alone
===================================  =====================================================

NaN compares false with everything, and -0.0 equals 0.0, in a condition as in the operator itself, so
gradients are the same to the bit. (``hardtanh_backward`` is not listed: on the CPU its vectorised and its
plain loop differ on NaN, so that no condition stands for it.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt_passes.compress_saved.saved import Read, SavedValues

__all__ = ["Condition", "condition_of", "is_hoistable", "masks_behind", "only_shape"]

_aten = torch.ops.aten
Call = Callable[..., Any]
"""``call(operator, *arguments, **named)`` makes a node, or a fake tensor."""


class Condition:
    """How an operator is computed from a condition on what it reads.

    ``make(call, x, *rest)`` says what decides, ``use(call, g, mask, *rest)`` what is done with it;
    ``rest`` are the operator's constants.
    """

    def __init__(self, make: Callable[..., Any], use: Callable[..., Any]) -> None:
        self.make, self.use = make, use


def _cleared(call: Call, grad: Any, mask: Any, *rest: Any) -> Any:
    value = grad.meta["val"] if isinstance(grad, fx.Node) else grad
    # masked_fill would lay its result out afresh.
    zero = call(_aten.full.default, [], 0, dtype=value.dtype, device=value.device)
    return call(_aten.where.self, mask, zero, grad)


def _sloped(call: Call, grad: Any, mask: Any, slope: Any, is_result: Any) -> Any:
    return call(_aten.where.self, mask, grad, call(_aten.mul.Scalar, grad, slope))


_CONDITIONS: dict[object, Condition] = {
    _aten.threshold_backward.default: Condition(lambda call, x, t: call(_aten.le.Scalar, x, t), _cleared),
    _aten.leaky_relu_backward.default: Condition(
        lambda call, x, slope, is_result: call(_aten.gt.Scalar, x, 0), _sloped
    ),
}

# Which argument an operator asks for its sizes and strides alone.
_SHAPE_ONLY: dict[object, int] = {
    _aten.max_pool2d_with_indices_backward.default: 1,
    _aten.max_pool3d_with_indices_backward.default: 1,
    _aten.adaptive_max_pool2d_backward.default: 1,
    _aten.adaptive_max_pool3d_backward.default: 1,
    _aten.avg_pool2d_backward.default: 1,
    _aten.avg_pool3d_backward.default: 1,
    _aten._adaptive_avg_pool2d_backward.default: 1,
    _aten._adaptive_avg_pool3d_backward.default: 1,
    _aten.zeros_like.default: 0,
    _aten.ones_like.default: 0,
    _aten.full_like.default: 0,
    _aten.empty_like.default: 0,
}


def condition_of(read: Read) -> Condition | None:
    """The condition that a reader needs of the value instead of the value.

    Only where the result lies in memory as before: operators choose its layout by what they read.
    """
    reader = read.reader
    found = _CONDITIONS.get(reader.target)
    if found is None or reader.args[1] is not read.view or reader.args[0] is read.view or reader.kwargs:
        return None

    grad, value = (node.meta["val"] for node in reader.args[:2] if isinstance(node, fx.Node))
    rest = reader.args[2:]
    # Deep programs ask of the same call a thousand times.
    known = (_layout(grad), _layout(value), value.device, rest)
    sized = all(isinstance(size, int) for part in (grad, value) for size in (*part.shape, *part.stride()))
    made = _made_known(reader.target, *known) if sized else _made(reader.target, grad, value, rest)
    return found if made == _layout(reader.meta["val"]) else None


_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _made(target: object, grad: torch.Tensor, value: torch.Tensor, rest: tuple[Any, ...]) -> _Layout:
    """The layout of what comes of the condition on ``value`` in the call's place."""

    def on_fakes(called: Any, *args: Any, **kwargs: Any) -> Any:
        return _torch.call_on_fakes(value, called, args, kwargs)

    found = _CONDITIONS[target]
    return _layout(found.use(on_fakes, grad, found.make(on_fakes, value, *rest), *rest))


@functools.lru_cache(maxsize=4096)
def _made_known(
    target: object, grad: _Layout, value: _Layout, device: torch.device, rest: tuple[Any, ...]
) -> _Layout:
    with _torch.fake_mode():
        given, read = (
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype in (grad, value)
        )
    return _made(target, given, read, rest)


def _layout(value: torch.Tensor) -> _Layout:
    return (tuple(value.shape), tuple(value.stride()), value.dtype)


def only_shape(read: Read) -> bool:
    """Whether a reader asks for sizes and strides alone."""
    place = _SHAPE_ONLY.get(read.reader.target)
    return place is not None and [
        index for index, arg in enumerate(read.reader.args) if arg is read.view
    ] == [place]


def is_hoistable(node: fx.Node, values: SavedValues) -> bool:
    """Whether a backward node gives booleans, element by element, from the forward alone."""
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and node not in values.driven
        and isinstance(value, torch.Tensor)
        and value.dtype is torch.bool
        and torch.Tag.pointwise in getattr(node.target, "tags", ())
    )


def masks_behind(read: Read, values: SavedValues) -> list[fx.Node] | None:
    """The booleans that ``read`` goes into, as the rest of the backward reads them.

    Before, ``x`` is held for ``where(logical_and(ge(x, -1), le(x, 1)), g, 0)``; after, the result of
    ``logical_and``. ``None`` if something on the way needs more than booleans of the forward.
    """
    found: list[fx.Node] = []
    stack, seen = [read.reader], {read.reader}
    while stack:
        node = stack.pop()
        if not is_hoistable(node, values) or not _from_forward(node, values):
            return None
        users = [reader.reader for reader in values.reads(node)]
        within = [user for user in users if is_hoistable(user, values) and _from_forward(user, values)]
        if len(within) < len(users):
            found.append(node)
        for user in within:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return found


def _from_forward(node: fx.Node, values: SavedValues) -> bool:
    """Whether all that a mask is made of can be computed in the forward: views and other masks only."""
    stack = list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        if source.op == "placeholder" or source.name in values.forward:
            continue
        if source in values.driven:
            return False
        is_view = values.root(source) is not None and any(
            values.root(source) == values.root(base) for base in source.all_input_nodes
        )
        if not is_view and not is_hoistable(source, values):
            return False
        stack.extend(source.all_input_nodes)
    return True
