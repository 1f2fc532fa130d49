"""How a saved value may be held without loss: which rule, what it comes to, the edit that does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.edit import Edit
from graphopt.plugins import default_host
from graphopt_passes.compress_saved.conditions import Condition, condition_of, masks_behind, only_shape
from graphopt_passes.compress_saved.ranges import interval_of, narrowest
from graphopt_passes.compress_saved.rewrite import Rewriter, held_by_forward
from graphopt_passes.compress_saved.saved import Read, SavedValue, SavedValues

__all__ = ["Packing", "needs_less", "operator_of", "packing_of", "reduce_reads"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Packing:
    """``packed_bytes``: what is held instead of ``value.bytes``; ``traffic``: bytes read and written to
    pack and unpack, by ``launches`` kernels. ``error``: the most that is lost, in the unit of ``metric``."""

    rule: str
    value: SavedValue
    packed_bytes: int
    traffic: int
    launches: int
    edit: Callable[[Rewriter, SavedValue], None]
    error: float = 0.0
    metric: str = ""

    def apply(self, edit: Edit, values: SavedValues, *, opaque: bool) -> None:
        """Rewrite the program that ``values`` is of."""
        self.edit(Rewriter(edit, values, opaque=opaque), self.value)


def packing_of(value: SavedValue, values: SavedValues) -> Packing | Reason | None:
    """The packing of a value, why one that looks packable is not, or ``None`` where nothing fits."""
    found = _found(value, values)
    if isinstance(found, Packing):
        obstacle = values.obstacle(value)
        if obstacle is not None:
            return obstacle
        if found.packed_bytes >= value.bytes:
            return Reason("packed it would take as many bytes", (value.node.name,))
    return found


def _found(value: SavedValue, values: SavedValues) -> Packing | Reason | None:
    tensor: torch.Tensor = value.node.meta["val"]
    if tensor.dtype is torch.bool:
        return _bits(value, tensor)
    if not tensor.is_floating_point() and not tensor.is_complex():
        return _narrow(value, tensor)
    return _conditions(value, values)


# --- booleans ------------------------------------------------------------------------------


def _bits(value: SavedValue, tensor: torch.Tensor) -> Packing | Reason:
    if (reason := _bit_kernels(tensor)) is not None:
        return Reason(reason.text, (value.node.name,))
    packed = -(-tensor.numel() // 8)
    return Packing("bits", value, packed, 2 * (value.bytes + packed), 2 * _SLOTS, _hold_bits)


_SLOTS = 9
"""Kernels that pack or unpack bits: one for each place in a byte, one to clear or mask."""


def _hold_bits(rewriter: Rewriter, value: SavedValue) -> None:
    _bits_for(rewriter, value.node, value.node, value.node, value.reads)


def _bits_for(
    rewriter: Rewriter, node: fx.Node, anchor: fx.Node, start: fx.Node, reads: tuple[Read, ...]
) -> None:
    """Let ``reads``, of ``start``, read the booleans of ``node`` out of bits packed after ``anchor``."""
    rewriter.feed(start, reads, _held_as_bits(rewriter, node, anchor))


def _held_as_bits(rewriter: Rewriter, node: fx.Node, anchor: fx.Node) -> Callable[[fx.Node], fx.Node]:
    """Pack the booleans of ``node`` after ``anchor``; the function returned unpacks them before a node."""
    kernels = default_host().kernels()
    pack, unpack = kernels["pack-bits"], kernels["unpack-bits"]
    tensor = rewriter.value(node)
    size, stride = list(tensor.shape), list(tensor.stride())
    packed = rewriter.pack(node, anchor, operator_of(pack.op), pack.reference)

    def unpacked(reader: fx.Node) -> fx.Node:
        return rewriter.unpack(packed, reader, operator_of(unpack.op), unpack.reference, size, stride)

    return unpacked


def _bit_kernels(tensor: torch.Tensor) -> Reason | None:
    """Asking for the kernels also registers their operators."""
    kernels = default_host().kernels()
    for name in ("pack-bits", "unpack-bits"):
        if name not in kernels:
            return Reason(f"no plugin offers kernel {name!r}")
    reason: Reason | None = kernels["pack-bits"].supports(tensor)
    return reason


def operator_of(name: str) -> Any:
    """The operator of a qualified name, its only overload."""
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op).default


# --- integers ------------------------------------------------------------------------------


def _narrow(value: SavedValue, tensor: torch.Tensor) -> Packing | Reason | None:
    if tensor.dtype.itemsize < 4:
        return None
    interval = interval_of(value.node)
    if interval is None:
        return Reason("what it can hold is not known", (value.node.name,))
    dtype = narrowest(interval)
    if dtype is None or dtype.itemsize >= tensor.dtype.itemsize:
        return Reason(f"it holds numbers up to {interval[1]}", (value.node.name,))
    packed = tensor.numel() * dtype.itemsize

    def hold(rewriter: Rewriter, value: SavedValue) -> None:
        node = value.node
        narrow = held_by_forward(rewriter.after(node, _aten._to_copy.default, (node,), {"dtype": dtype}))
        rewriter.feed(
            node,
            value.reads,
            lambda reader: rewriter.edit.call_before(
                reader, _aten._to_copy.default, (narrow,), {"dtype": tensor.dtype}
            ),
        )

    return Packing("narrow", value, packed, 2 * (value.bytes + packed), 2, hold)


# --- conditions ----------------------------------------------------------------------------


def _conditions(value: SavedValue, values: SavedValues) -> Packing | Reason | None:
    """Every reader needs a condition on the value or its shape: none needs the value."""
    masks: dict[fx.Node, None] = {}
    own = unpacked = copies = 0
    whole: list[fx.Node] = []
    less = False
    for read in value.reads:
        if only_shape(read):
            copies += 1
        elif condition_of(read) is not None:
            own += -(-_count(read.view) // 8)
            unpacked += _count(read.view)
        elif (behind := masks_behind(read, values)) is not None:
            masks.update(dict.fromkeys(behind))
        else:
            whole.append(read.reader)
            continue
        less = True
    if not less:
        return None
    if whole:
        names = tuple(reader.name for reader in whole[:3])
        return Reason("others need less of it, but it is read whole as well", names)
    boolean = torch.empty(0, dtype=torch.bool)
    if (own or masks) and (reason := _bit_kernels(boolean)) is not None:
        return reason
    packed = own + sum(-(-_count(mask) // 8) for mask in masks)
    unpacked += sum(map(_count, masks))
    sets = len(masks) + (own > 0)
    return Packing(
        "condition",
        value,
        packed,
        value.bytes + 2 * unpacked + 2 * packed,
        copies + 2 * _SLOTS * sets,
        reduce_reads,
    )


def _count(node: fx.Node) -> int:
    return math.prod(node.meta["val"].shape)


def needs_less(read: Read, values: SavedValues) -> bool:
    """Whether a reader needs a condition on the value, or its shape, and not the value."""
    return only_shape(read) or condition_of(read) is not None or masks_behind(read, values) is not None


def reduce_reads(rewriter: Rewriter, value: SavedValue) -> None:
    """Let readers that need less of a value (``needs_less``) read that, held as bits."""
    values = rewriter.values
    hoisted: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for read in value.reads:
        if read.view not in read.reader.all_input_nodes:
            continue
        if only_shape(read):
            _stand_in(rewriter, read)
        elif (condition := condition_of(read)) is not None:
            _hold_condition(rewriter, value, read, condition)
        else:
            for mask in masks_behind(read, values) or ():
                copy, anchor = rewriter.hoist(mask, hoisted)
                reads = tuple(r for r in values.reads(mask) if masks_behind(r, values) is None)
                _bits_for(rewriter, copy, anchor, mask, reads)


def _stand_in(rewriter: Rewriter, read: Read) -> None:
    """Memory of the value's layout, its contents arbitrary, for a reader of sizes and strides."""
    tensor: torch.Tensor = read.view.meta["val"]
    made = rewriter.edit.call_before(
        read.reader,
        _aten.empty_strided.default,
        (list(tensor.shape), list(tensor.stride())),
        {"dtype": tensor.dtype, "device": tensor.device},
    )
    read.reader.replace_input_with(read.view, made)


def _hold_condition(rewriter: Rewriter, value: SavedValue, read: Read, condition: Condition) -> None:
    reader, rest = read.reader, read.reader.args[2:]
    node = value.node

    def ahead(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return rewriter.after(node, target, args, kwargs)

    def here(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return rewriter.edit.call_before(reader, target, args, kwargs, replaces=(reader,))

    mask = condition.make(ahead, rewriter.viewed_ahead(read.view, node), *rest)
    unpack = _held_as_bits(rewriter, mask, node)
    made = condition.use(here, reader.args[0], unpack(reader), *rest)
    rewriter.edit.replace(reader, made)
