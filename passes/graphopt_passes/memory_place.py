"""Where the elements of a value lie, in numbers: what views of one memory have to do with each other.

Models cut heads and halves of heads in many ways (slices, chunks, splits, selections, reshapes); where the
result lies tells them apart from anything else.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch

__all__ = [
    "are_halves",
    "are_pairs",
    "follows",
    "same_place",
    "source_of",
    "strides_match",
    "upwards",
    "value_of",
]


def value_of(node: Any) -> torch.Tensor | None:
    """The example value of a node that is one dense tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) and value.layout is torch.strided else None


def source_of(node: fx.Node) -> fx.Node | None:
    """The value that ``node`` is a view of, parts of a split too; ``None`` where it has its own memory."""
    source = node
    if node.target is operator.getitem:
        source = node.args[0]  # type: ignore[assignment]
    base = source.args[0] if source.op == "call_function" and source.args else None
    value, known = value_of(node), value_of(base)
    if not isinstance(base, fx.Node) or value is None or known is None:
        return None
    return base if _torch.storage_key(value) == _torch.storage_key(known) else None


def upwards(node: fx.Node) -> Iterator[fx.Node]:
    """``node``, what it is a view of, and so on."""
    at: fx.Node | None = node
    while at is not None:
        yield at
        at = source_of(at)


def strides_match(one: torch.Tensor, other: torch.Tensor, dims: int) -> bool:
    """Whether the first ``dims`` dimensions are as long and lie alike."""
    return one.shape[:dims] == other.shape[:dims] and all(
        size == 1 or a == b
        for size, a, b in zip(one.shape[:dims], one.stride()[:dims], other.stride()[:dims], strict=True)
    )


def same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two values are the same elements of one memory, in one order."""
    return (
        _torch.storage_key(one) == _torch.storage_key(other)
        and one.dtype is other.dtype
        and one.dim() == other.dim()
        and one.storage_offset() == other.storage_offset()
        and strides_match(one, other, one.dim())
    )


def follows(one: torch.Tensor, whole: torch.Tensor, start: int, step: int = 1) -> bool:
    """Whether ``one`` is every ``step``-th element of the last dimension of ``whole``, from ``start`` on."""
    along = whole.stride(-1)
    return (
        _torch.storage_key(one) == _torch.storage_key(whole)
        and one.dtype is whole.dtype
        and one.dim() == whole.dim()
        and strides_match(one, whole, whole.dim() - 1)
        and (one.shape[-1] <= 1 or one.stride(-1) == step * along)
        and (one.numel() == 0 or one.storage_offset() == whole.storage_offset() + start * along)
    )


def are_halves(first: torch.Tensor, second: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether they are the first and the second half of the last dimension of ``whole``."""
    half = first.shape[-1] if first.dim() else 0
    return (
        whole.shape[-1] == 2 * half
        and second.shape == first.shape
        and follows(first, whole, 0)
        and follows(second, whole, half)
    )


def are_pairs(first: torch.Tensor, second: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether they are the even and the odd elements of the last dimension of ``whole``."""
    half = first.shape[-1] if first.dim() else 0
    return (
        whole.shape[-1] == 2 * half
        and second.shape == first.shape
        and follows(first, whole, 0, 2)
        and follows(second, whole, 1, 2)
    )
