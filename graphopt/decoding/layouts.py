"""How values are laid out: what lies under views, repeated heads, transposed keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from graphopt import _torch

if TYPE_CHECKING:
    from graphopt.decoding.capture import Uncached

__all__ = [
    "base_of_keys",
    "heads_first",
    "name_of",
    "peeled",
    "same_numbers",
    "scalar",
    "transposed",
]


def name_of(node: object) -> str:
    """``"matmul"`` for a call of ``aten.matmul.default``; empty for what calls no operator."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", "")) if packet is not None else ""


def scalar(value: object) -> float | None:
    """The number that an argument is: itself, or what a node fills a tensor without dimensions with."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node) and name_of(value) in ("full", "scalar_tensor", "full_like"):
        number = value.args[0] if name_of(value) == "scalar_tensor" else value.args[1]
        return float(number) if isinstance(number, (int, float)) else None
    return None


_RESHAPES = ("reshape", "view", "_unsafe_view", "clone", "contiguous", "flatten")
_EXPANSIONS = ("expand", "unsqueeze", "slice", "reshape", "view", "_unsafe_view", "clone", "contiguous", "to")


def base_of_keys(node: fx.Node, heads: int) -> fx.Node:
    """The keys or values [B, Hkv, S, D] that ``node`` [B, heads, S, D] repeats for the heads that share them;
    ``node`` itself where it repeats none.

    Head h reads head ``h // (heads / Hkv)``: ``reshape(expand(unsqueeze(k, 2)))`` and
    ``repeat_interleave(k, g, 1)`` do that, and ``expand`` of a single head.
    """
    shape = node.meta["val"].shape
    if len(shape) != 4:
        return node
    at = node
    while name_of(at) in ("clone", "contiguous") and isinstance(at.args[0], fx.Node):
        at = at.args[0]
    if name_of(at) == "repeat_interleave":
        source, _, dim = (*at.args, None, None)[:3]
        dim = at.kwargs.get("dim", dim)
        return source if isinstance(source, fx.Node) and dim in (1, -3) else node
    if name_of(at) == "expand" and isinstance(at.args[0], fx.Node):
        source = at.args[0]
        single = source.meta["val"].shape
        if len(single) == 4 and single[1] == 1 and _same(single, shape, (0, 2, 3)):
            return source
        return node
    if name_of(at) not in _RESHAPES or not isinstance(at.args[0], fx.Node):
        return node
    wide = at.args[0]
    while name_of(wide) in ("clone", "contiguous") and isinstance(wide.args[0], fx.Node):
        wide = wide.args[0]
    if name_of(wide) != "expand" or len(wide.meta["val"].shape) != 5:
        return node
    _, groups, repeats, _, _ = wide.meta["val"].shape
    if not isinstance(groups, int) or not isinstance(repeats, int) or groups * repeats != heads:
        return node
    narrow = wide.args[0]
    while isinstance(narrow, fx.Node) and len(narrow.meta["val"].shape) == 5:
        if name_of(narrow) == "unsqueeze" and narrow.args[1] in (2, -3):
            found = narrow.args[0]
            return _whole(found) if isinstance(found, fx.Node) else node
        if name_of(narrow) != "slice" or not _whole_slice(narrow):
            return node
        narrow = narrow.args[0]
    return node


def _whole(node: fx.Node) -> fx.Node:
    """What slices that take everything are taken of."""
    while name_of(node) == "slice" and _whole_slice(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


_PASSING = ("to", "_to_copy", "alias", "detach", "contiguous", "clone", "slice")


def same_numbers(node: fx.Node) -> fx.Node:
    """The value that ``node`` is a copy of, or a cast to what it is already."""
    while name_of(node) in _PASSING and isinstance(source := node.args[0], fx.Node):
        before, after = source.meta["val"], node.meta["val"]
        if before.dtype is not after.dtype or before.dim() != after.dim() or not _whole_slice(node):
            break
        node = source
    return node


def _whole_slice(node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return all(_torch.is_same_size(a, b) for a, b in zip(before, after, strict=True))


def _same(one: torch.Size, other: torch.Size, dims: tuple[int, ...]) -> bool:
    return all(_torch.is_same_size(one[d], other[d]) for d in dims)


def transposed(key: fx.Node) -> tuple[fx.Node, bool]:
    """Keys [.., S, D] of the operand [.., D, S], and whether they still have to be transposed to be that."""
    dims = key.meta["val"].dim()
    if name_of(key) in ("transpose", "permute") and isinstance(key.args[0], fx.Node):
        given: Any = key.args
        if name_of(key) == "transpose":
            swapped = {int(d) % dims for d in given[1:3]} == {dims - 2, dims - 1}
        else:
            swapped = [int(d) % dims for d in given[1]] == [*range(dims - 2), dims - 1, dims - 2]
        if swapped:
            return key.args[0], False
    if name_of(key) in ("mT", "t") and isinstance(key.args[0], fx.Node):
        return key.args[0], False
    return key, True


def peeled(node: fx.Node) -> fx.Node:
    """What is under views that only add or repeat dimensions."""
    while name_of(node) in _EXPANSIONS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def heads_first(node: fx.Node, uncached: Uncached) -> int | None:
    """The number of heads of scores [B, H, S, S] or [B * H, S, S]."""
    shape = node.meta["val"].shape
    if len(shape) == 4:
        return int(shape[1]) if isinstance(shape[1], int) else None
    batch = _torch.hint(uncached.batch)
    rows = _torch.hint(shape[0])
    return rows // batch if rows % batch == 0 and _torch.depends_on(shape[0], uncached.batch) else None
