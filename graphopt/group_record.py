"""What became of a group of operators that a plugin has a kernel for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GroupRecord"]


@dataclass(frozen=True)
class GroupRecord:
    """A group of operators that a kernel of a plugin computes: ``kernel`` by name, ``operators`` and the
    model's ``layers`` that they are of, whether it is ``kept``, and why or why not. ``apart`` and
    ``together``: predicted seconds of the graph with the code generator's kernels for the group, and with
    the plugin's."""

    kernel: str
    operators: tuple[str, ...]
    layers: tuple[str, ...]
    kept: bool
    reason: str
    apart: float
    together: float
