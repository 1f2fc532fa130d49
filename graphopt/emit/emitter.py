"""What a code generator is to the rest: semantic graph in, callable out, decisions asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch.fx as fx

__all__ = ["Emitter", "Inference", "Partition"]

Partition = Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]]
"""(joint module, number of forward outputs) -> (forward module, backward module)."""

Inference = Callable[[fx.GraphModule], fx.GraphModule]
"""Functional inference graph -> the graph to run."""


class Emitter(Protocol):
    """Compiles a semantic graph; calls ``partition`` or ``inference`` once the graph is lowered."""

    @property
    def name(self) -> str: ...

    @property
    def fuses(self) -> bool:
        """Whether operators are fused, so that values between them may never be in memory."""
        ...

    @property
    def records(self) -> Sequence[Any]:
        """Memory of each graph compiled last (``LoweredMemory``); empty where nothing is fused."""
        ...

    @property
    def by_segments(self) -> bool:
        """Whether repeated blocks are compiled once and called again, not all in one graph."""
        ...

    def compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], partition: Partition, inference: Inference
    ) -> Callable[..., Any]:
        """A callable with the flat calling convention of a dynamo backend's result."""
        ...
