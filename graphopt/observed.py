"""What one step of several programs did around them, as it was seen to run.

Between the programs of a model that is not one graph lies what runs as it did: values are made and
released there, a program may be called more than once, and what one program returns goes when the
last that reads it is through. The liveness of a whole step under other schedules follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from graphopt.cost import MemoryProfile
from graphopt.schedule import Schedule

__all__ = ["Gap", "ObservedRun", "ObservedStep", "ObservedStorage", "StepMemory"]


@dataclass(frozen=True)
class Gap:
    """A stretch between two runs of programs: bytes that it adds (``net``) and reaches (``peak``), both
    above what is held as it begins."""

    net: int
    peak: int


@dataclass(frozen=True)
class ObservedStorage:
    """Memory that one run read or returned.

    ``released`` is the position in the step (gap ``i`` is at ``2 i``, run ``i`` at ``2 i + 1``) at which
    nobody held it any more; ``None``: held to the end. ``dropped`` is the position up to which something
    besides the programs held it: it goes there unless a backward to come reads it.
    """

    bytes: int
    released: int | None = None
    dropped: int | None = None


@dataclass(frozen=True)
class ObservedRun:
    """One half of a program, run once. ``program`` counts the programs; ``forward`` is the position
    among the runs of the forward that this belongs to (its own, for a forward). ``inputs`` and
    ``outputs`` map names of nodes to storages; what a backward returns is not listed."""

    program: int
    backward: bool
    forward: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


@dataclass(frozen=True)
class ObservedStep:
    """Runs in execution order, one more gap than runs around them, storages that runs share.

    Where the model returns a run is ``None``. ``bare_gaps`` are the gaps before that as they are while
    no program keeps anything for its backward: what was ``dropped`` in them goes there.
    """

    runs: tuple[ObservedRun | None, ...]
    gaps: tuple[Gap, ...]
    storages: tuple[ObservedStorage, ...]
    bare_gaps: tuple[Gap, ...] = ()

    def calls(self, program: int) -> int:
        """How often the forward of a program runs."""
        return sum(run is not None and run.program == program and not run.backward for run in self.runs)


class StepMemory(Protocol):
    """Exact liveness of an observed step under schedules, one for each of its programs."""

    def peak(self, schedules: Sequence[Schedule]) -> int:
        """Peak in bytes above the static base."""
        ...

    def profile(self, schedules: Sequence[Schedule], *, base_bytes: int = 0) -> MemoryProfile:
        """Bytes over the whole step, ``base_bytes`` added to every point."""
        ...
