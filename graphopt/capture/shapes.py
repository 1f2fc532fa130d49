"""The shapes that a program was captured for, as text."""

from __future__ import annotations

import torch

from graphopt import _torch
from graphopt.dump.canonical import dtype_text
from graphopt.program import Program

__all__ = ["input_shapes"]


def input_shapes(program: Program) -> str:
    """Types of a program's user inputs: ``f32[s77=64,16], i64[8]``, symbolic sizes with what they were."""
    nodes = program.find([spec.node for spec in program.signature.by_role("input")])
    values = [node.meta.get("val", node.meta.get("example_value")) for node in nodes]
    return ", ".join(_type(value) for value in values if isinstance(value, torch.Tensor))


def _type(value: torch.Tensor) -> str:
    sizes = [
        f"{size}={_torch.hint(size)}" if isinstance(size, torch.SymInt) else str(size) for size in value.shape
    ]
    return f"{dtype_text(value.dtype)}[{','.join(sizes)}]"
