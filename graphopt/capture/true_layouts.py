"""Layouts that kernels on the CPU really give their results, where torch says another when tracing.

A batch norm of an input that is not contiguous returns a contiguous tensor; traced, it keeps the strides of
its input. A view further down that was possible while tracing may then be none, and ``graphopt.emit.eager``
copies instead. That copy is made explicit, so that it is counted::

    %n = aten.native_batch_norm(%x: f32[4,8,6] strides [48,1,8], ...)     %n: strides [48,6,1]
    %t = aten.transpose(%n, 1, 2)                                         %t: strides [48,1,6]
    %v = aten.view(%t, [24, 8])                                           %c = aten.clone(%t)
                                                                          %v = aten.view(%c, [24, 8])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.errors import brief
from graphopt.program import tensor_leaves

__all__ = ["settle_layouts"]

_aten = torch.ops.aten

_NORMS = frozenset({
    _aten.native_batch_norm, _aten._native_batch_norm_legit, _aten._native_batch_norm_legit_functional,
})  # fmt: skip
"""``aten/src/ATen/native/Normalization.cpp``: ``empty_like(input, input.suggest_memory_format())``."""

_CONTIGUOUS = frozenset({
    _aten.mse_loss_backward, _aten.smooth_l1_loss_backward, _aten.huber_loss_backward,
})  # fmt: skip
"""``aten/src/ATen/native/Loss.cpp``: ``zeros_like(input, LEGACY_CONTIGUOUS_MEMORY_FORMAT)``."""

_VIEWS = frozenset({_aten.view.default, _aten._unsafe_view.default})


def settle_layouts(gm: fx.GraphModule) -> tuple[str, ...]:
    """Give values of a functional graph the layouts that they will have on the CPU, in place.

    Returns a sentence for each value that keeps the layout that it was traced with although what it is made
    of lies otherwise: what it takes may be predicted otherwise than it is.
    """
    stale: set[fx.Node] = set()
    changed = False
    unsettled: list[str] = []
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        before = node.meta.get("val")
        if stale.intersection(node.all_input_nodes):
            copied, why = _compute(gm.graph, node)
            changed |= copied
            if why:
                unsettled.append(
                    f"{node.name} reads what lies otherwise than it was traced, and keeps its layout: {why}"
                )
        _correct(node)
        if node.meta.get("val") is not before:
            stale.add(node)
    if changed:
        gm.recompile()
    return tuple(unsettled)


def _correct(node: fx.Node) -> None:
    """Let the value of ``node`` say how its kernel lays it out."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in _NORMS and packet not in _CONTIGUOUS and packet is not _aten.native_batch_norm_backward:
        return
    value = node.meta.get("val")
    results = list(value) if isinstance(value, (tuple, list)) else [value]
    first = results[0]
    if not isinstance(first, torch.Tensor) or first.device.type != "cpu":
        return
    like = first
    if packet is _aten.native_batch_norm_backward:
        like = node.args[1].meta["val"]  # type: ignore[union-attr]
    elif packet in _NORMS:
        like = node.args[0].meta["val"]  # type: ignore[union-attr]
    settled = _torch.packed_like(first, like if packet not in _CONTIGUOUS else None)
    if [*map(_torch.hint, settled.stride())] == [*map(_torch.hint, first.stride())]:
        return
    results[0] = settled
    node.meta["val"] = type(value)(results) if isinstance(value, (tuple, list)) else settled
    node.meta.pop("tensor_meta", None)


def _compute(graph: fx.Graph, node: fx.Node) -> tuple[bool, str]:
    """Compute the value of ``node`` from what it reads now: whether a copy was put before it for that, and
    why its value stays as it was traced, ``""`` where it does not."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False, f"{node.target} runs graphs of its own"
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta.get("val"))
    like = next(iter(tensor_leaves((args, kwargs))))
    target: Any = node.target
    copied = False
    if target in _VIEWS and not _viewable(args[0], args[1]):
        source: Any = node.args[0]
        contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
        with graph.inserting_before(node):
            copy = graph.call_function(_aten.clone.default, (source,), contiguous)
        copy.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        copy.meta["val"] = _torch.call_on_fakes(like, _aten.clone.default, (args[0],), contiguous)
        node.args = (copy, *node.args[1:])
        args, copied = (copy.meta["val"], *args[1:]), True
    try:
        value = _torch.call_on_fakes(like, target, args, kwargs)
    except _REFUSALS as error:
        return copied, brief(error)
    if copied or _differs(value, node.meta.get("val")) or _shares(value, (args, kwargs)):
        node.meta["val"] = value
        node.meta.pop("tensor_meta", None)
    return copied, ""


_REFUSALS = (RuntimeError, TypeError, ValueError)
"""What operators raise on values that they do not take: shapes and strides that were right when traced, and
what an operator without an implementation for fakes says."""


def _viewable(value: torch.Tensor, sizes: Any) -> bool:
    try:
        _torch.call_on_fakes(value, _aten.view.default, (value, sizes), {})
    except (RuntimeError, ValueError):
        return False
    return True


def _differs(one: Any, other: Any) -> bool:
    return [*map(_layout, tensor_leaves(one))] != [*map(_layout, tensor_leaves(other))]


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return tensor.dtype, *map(_torch.hint, numbers)


def _shares(value: Any, args: Any) -> bool:
    """Whether a result lies in memory of an argument."""
    read = {_torch.storage_key(t) for t in tensor_leaves(args)}
    return any(_torch.storage_key(t) in read for t in tensor_leaves(value))
