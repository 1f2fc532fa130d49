"""A kernel as it is registered: named as its operator is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphopt.candidate import Reason
from graphopt.plugins import KernelSpec

__all__ = ["kernel"]


def kernel(
    name: str, reference: Callable[..., Any], supports: Callable[..., Reason | None], summary: str
) -> KernelSpec:
    """``name`` with hyphens; its operator is ``graphopt::<name>``, with underscores."""
    return KernelSpec(name, f"graphopt::{name.replace('-', '_')}", reference, supports, summary)
