"""What a cost model answers, and the protocol that one implements.

The implementation that ships lives in ``graphopt_cost_model`` and registers through the plugin
host like any other; the core knows these records alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from graphopt.device import DeviceSpec

if TYPE_CHECKING:
    import torch
    import torch.fx as fx

    from graphopt.observed import ObservedStep, StepMemory
    from graphopt.program import Program
    from graphopt.schedule import Schedule

__all__ = ["Cost", "CostModel", "LiveTensor", "MemoryProfile", "MemoryStep", "NodeCost", "known_size"]


def known_size(size: int | torch.SymInt) -> int:
    """What a size that may be a symbol was when the program was captured. ``int(size)`` would fix it: the
    program would then be for that size alone."""
    from graphopt import _torch

    return _torch.hint(size)


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node executed on its own. Bytes are of device memory traffic.

    ``workspace_bytes`` is what the kernel allocates beyond its outputs and frees on return.
    """

    flops: int
    bytes_read: int
    bytes_written: int
    seconds: float
    workspace_bytes: int = 0


@dataclass(frozen=True)
class Cost:
    """What a whole step takes: peak and weight bytes, seconds. ``None``: not known.

    ``cache_bytes``, part of the peak: what is kept of keys and values from token to token.
    """

    peak_bytes: int
    weight_bytes: int
    seconds: float | None = None
    flops: int | None = None
    cache_bytes: int = 0


@dataclass(frozen=True)
class LiveTensor:
    """A storage alive at some point of a step."""

    node: str
    bytes: int
    layer: str = ""
    role: str = "activation"


@dataclass(frozen=True)
class MemoryStep:
    """Live bytes while ``node`` runs (its outputs allocated, its inputs not yet freed)."""

    program: str
    phase: str
    node: str
    bytes: int


@dataclass(frozen=True)
class MemoryProfile:
    """Live bytes over a step in execution order; ``peak_bytes`` is the largest of them.

    ``retained_bytes`` is what the forwards leave (saved values and outputs), ``gradient_bytes``
    what the backwards leave, both above the base.
    """

    peak_bytes: int
    steps: tuple[MemoryStep, ...]
    peak: MemoryStep | None
    live_at_peak: tuple[LiveTensor, ...] = ()
    retained_bytes: int = 0
    gradient_bytes: int = 0

    def phase_peak(self, phase: str) -> int:
        """Largest bytes of one phase, ``"forward"`` or ``"backward"``; 0 if there is none."""
        return max((step.bytes for step in self.steps if step.phase == phase), default=0)


class CostModel(Protocol):
    """Bytes and seconds of nodes and of whole steps on one device."""

    @property
    def device(self) -> DeviceSpec: ...

    def node(self, node: fx.Node) -> NodeCost:
        """Cost of one ATen node, from its metadata alone."""
        ...

    def memory(self, step: Sequence[tuple[Program, Schedule]], *, base_bytes: int = 0) -> MemoryProfile:
        """Exact op-by-op liveness of a step over the given programs in call order.

        ``base_bytes`` (parameters, buffers, inputs) are added to every point.
        """
        ...

    def observed(self, step: ObservedStep) -> StepMemory:
        """The same for a step that was seen to run, whatever its programs run as."""
        ...
