"""Plan the programs of an observed step: every choice is judged by the peak of the whole."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.candidate import FrontierPoint
from graphopt.captured import Captured
from graphopt.cost import CostModel, MemoryProfile
from graphopt.emit.fused_halves import FusedHalves
from graphopt.emit.lowered import LoweredMemory
from graphopt.observed import Choice, ObservedStep
from graphopt.observed_memory import ObservedMemory
from graphopt.planner import Combination, combinations

__all__ = ["ObservedPlan"]


class ObservedPlan:
    """Programs with their frontiers, and the step that they were seen to make up.

    Bytes are above the static base. Programs are counted in ``step`` as in ``group``. With kernels that
    are fused (``fuses``) a choice is judged by its code as soon as that is there (``state``).
    """

    def __init__(
        self, cost: CostModel, step: ObservedStep, group: Sequence[Captured], *, fuses: bool
    ) -> None:
        self.step, self.group = step, tuple(group)
        self.calls = [step.calls(k) for k in range(len(group))]
        self.simulated = cost.observed(step)
        granularity = cost.device.allocation_granularity
        self.code = FusedHalves(granularity=granularity) if fuses else None
        self.memory = (
            self.simulated if self.code is None else ObservedMemory(step, self.code, granularity=granularity)
        )
        self._front: tuple[Combination, ...] | None = None

    def peak(self, points: Sequence[FrontierPoint]) -> int:
        return self.memory.peak(self._choices(points))

    def profile(self, points: Sequence[FrontierPoint], base_bytes: int) -> MemoryProfile:
        """Bytes over the step, run op by op."""
        return self.simulated.profile(self._choices(points), base_bytes=base_bytes)

    def state(self, captured: Captured, records: Sequence[LoweredMemory]) -> None:
        """Go by the memory of the code that one of the programs was compiled to at its present point."""
        assert captured.point is not None
        program = captured.program_at(captured.point)
        if self.code is not None and program is not None:
            self.code.state(program, captured.schedule, records)
            self._front = None

    def forget(self) -> None:
        """The programs' frontiers are others than before."""
        self._front = None

    @property
    def front(self) -> tuple[Combination, ...]:
        """Choices of which none is worse than another in peak and in seconds, least peak first."""
        if self._front is None:
            frontiers = [c.frontier for c in self.group if c.frontier is not None]
            self._front = combinations(frontiers, self.calls, self.peak)
        return self._front

    def choose(self, room: int | None, tolerance: float = 0.0) -> list[FrontierPoint] | None:
        """The fastest choice that takes at most ``room`` bytes, ``None`` if none does. Of those that are
        slower by no more than ``tolerance`` seconds, the one of the least peak."""
        fitting = [found for found in self.front if room is None or found.peak_bytes <= room]
        if not fitting:
            return None
        latest = fitting[-1].seconds + tolerance
        return list(next(found for found in fitting if found.seconds <= latest).points)

    def _choices(self, points: Sequence[FrontierPoint]) -> list[Choice]:
        found = []
        for captured, point in zip(self.group, points, strict=True):
            program = captured.program_at(point)
            assert program is not None
            found.append((program, point.schedule))
        return found
