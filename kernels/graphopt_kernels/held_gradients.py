"""Gradients that a forward computed, times that of its loss: in their own memory where nobody can tell.

A backward that multiplies what its forward kept holds every gradient twice. It may write over what was kept
where this is the last backward of its graph, no transform, trace or hook is between, and no other tensor,
view or graph has that memory. References are counted: to the tensor and to its storage, of Python and of
C++. How many there are where nobody else has it depends on the version of torch, so those of a backward
whose tensors are known to be its own alone are counted once, and any other number means that somebody else
is there. Then the product is a new tensor, as it is while a graph is traced.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt import _torch

__all__ = ["scaled"]

_counting = threading.local()


def scaled(kept: Sequence[torch.Tensor], grad: torch.Tensor, again: Callable[[], Any]) -> list[torch.Tensor]:
    """Each of ``kept``, the saved tensors of the backward that runs now, times the number ``grad``.

    ``again`` runs a small forward and backward of the same operator, whose kept tensors nobody else has.
    """
    found = [_torch.holders(tensor) if _torch.runs_at_once(tensor) else None for tensor in kept]
    if getattr(_counting, "seen", None) is not None:
        _counting.seen.extend(found)
        return [tensor * grad for tensor in kept]
    if _torch.keeps_graph() or not _torch.runs_at_once(grad):
        return [tensor * grad for tensor in kept]
    alone = _alone(again)
    # A number on the device: multiplying by it converts nothing.
    return [
        tensor.mul_(grad) if count is not None and count == alone else tensor * grad
        for tensor, count in zip(kept, found, strict=True)
    ]


@functools.cache
def _alone(again: Callable[[], Any]) -> tuple[int, ...] | None:
    """What ``holders`` says of tensors that a backward has alone; ``None`` where they differ."""
    _counting.seen = []
    try:
        again()
        seen: set[tuple[int, ...] | None] = set(_counting.seen)
    finally:
        _counting.seen = None
    return seen.pop() if len(seen) == 1 else None
