"""Operators that ranks run together."""

from __future__ import annotations

from typing import Any

__all__ = ["is_collective", "staged_bytes"]

_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "_dtensor")


def is_collective(target: Any) -> bool:
    """Whether an operator communicates with other ranks, or waits for them."""
    return getattr(target, "namespace", "") in _NAMESPACES


def staged_bytes(target: Any, given: int, made: int) -> int:
    """What a collective between CPUs takes beyond its output, of which it reads ``given`` and returns
    ``made`` bytes: Gloo flattens what it gathers and scatters (measured with torch 2.13).
    Its thread may let go of that, and of what it read, some time after the result was waited for: then
    a step takes more, by as much."""
    name = str(getattr(target, "_schema", target)).split("(")[0].split("::")[-1]
    in_place = name.startswith(("all_reduce", "broadcast", "wait_tensor"))
    return 0 if in_place else max(given, made)
