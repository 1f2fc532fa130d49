"""Plan the programs of an observed step: every choice is judged by the exact peak of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from graphopt.candidate import Frontier, FrontierPoint
from graphopt.cost import CostModel, MemoryProfile
from graphopt.observed import ObservedStep
from graphopt.planner import Combination, combinations
from graphopt.program import Program

__all__ = ["ObservedPlan"]


class ObservedPlan:
    """Programs with their frontiers, and the step that they were seen to make up.

    Bytes are above the static base. ``numbers`` are the programs' numbers in ``step``.
    """

    def __init__(
        self,
        cost: CostModel,
        step: ObservedStep,
        numbers: Sequence[int],
        programs: Sequence[Program],
        frontiers: Sequence[Frontier],
    ) -> None:
        place = {number: k for k, number in enumerate(numbers)}
        runs = tuple(run and replace(run, program=place[run.program]) for run in step.runs)
        self.step = replace(step, runs=runs)
        self.frontiers = frontiers
        self.memory = cost.observed(programs, self.step)
        self.calls = [self.step.calls(k) for k in range(len(programs))]

    def peak(self, points: Sequence[FrontierPoint]) -> int:
        return self.memory.peak([point.schedule for point in points])

    def profile(self, points: Sequence[FrontierPoint], base_bytes: int) -> MemoryProfile:
        return self.memory.profile([point.schedule for point in points], base_bytes=base_bytes)

    @cached_property
    def front(self) -> tuple[Combination, ...]:
        """Choices of which none is worse than another in peak and in seconds, least peak first."""
        return combinations(self.frontiers, self.calls, self.peak)

    def choose(self, room: int | None) -> list[FrontierPoint] | None:
        """The fastest choice that takes at most ``room`` bytes; ``None`` if none does."""
        fitting = [found for found in self.front if room is None or found.peak_bytes <= room]
        return list(fitting[-1].points) if fitting else None
