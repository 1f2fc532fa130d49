"""How a kernel is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Launch"]


@dataclass(frozen=True)
class Launch:
    """``constants``: elements of a tile along each axis and other constants of the kernel, by name;
    ``warps`` of a program; ``grid``: programs along each axis; ``stages`` of loads in a loop, ``None`` for
    what Triton does by itself; ``numbers``: what it takes as whole numbers after its pointers, by name."""

    constants: Mapping[str, Any]
    warps: int
    grid: tuple[int, ...]
    stages: int | None = None
    numbers: Mapping[str, int] = field(default_factory=dict)
