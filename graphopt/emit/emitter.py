"""What a code generator is to the rest: semantic graph in, callable out, decisions asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.fx as fx

from graphopt.candidate import NearMiss
from graphopt.group_record import GroupRecord

__all__ = ["NONE", "Emitter", "Gradients", "Inference", "Partition"]

Partition = Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]]
"""(joint module, number of forward outputs) -> (forward module, backward module)."""

Inference = Callable[[fx.GraphModule], fx.GraphModule]
"""Functional inference graph -> the graph to run."""


@dataclass(frozen=True)
class Gradients:
    """What becomes of gradients. ``parameters``: positions of the inputs that are parameters of the model,
    whose gradients are added to ``.grad``. ``held``: all of them are there when a step begins, unless the
    loop has let go of them, and no hook waits for any."""

    parameters: frozenset[int] = frozenset()
    held: bool = False


NONE = Gradients()


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
    def groups(self) -> Sequence[GroupRecord]:
        """What was said of groups of operators that a plugin has kernels for."""
        ...

    @property
    def slots(self) -> Sequence[Any]:
        """Gradients that the backward compiled last adds to those held (``Slot``)."""
        ...

    @property
    def near_misses(self) -> Sequence[NearMiss]:
        """What the code generator leaves as it is of what it usually rewrites, and why."""
        ...

    def note(self, groups: Sequence[GroupRecord], near_misses: Sequence[NearMiss]) -> None:
        """Let ``groups`` and ``near_misses`` be those."""
        ...

    @property
    def by_segments(self) -> bool:
        """Whether repeated blocks are compiled once and called again, not all in one graph."""
        ...

    def compile(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        partition: Partition,
        inference: Inference,
        gradients: Gradients = NONE,
        keep: str = "",
    ) -> Callable[..., Any]:
        """A callable with the flat calling convention of a dynamo backend's result. ``keep``: the name under
        which an emitter that can keeps the code for later processes."""
        ...
