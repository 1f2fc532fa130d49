"""One of the steps that an optimized module has planned: its report, memory, programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graphopt.cost import MemoryProfile
from graphopt.explanation import MemoryExplanation
from graphopt.pareto_front import ParetoPoint
from graphopt.plans import Plan
from graphopt.program import Program
from graphopt.report import ProgramSummary, Report

if TYPE_CHECKING:
    from graphopt.capture.driver import Driver

__all__ = ["StepView", "step_name"]


class StepView:
    """A step of an ``Optimized``, for inputs or a mode of its own (``Optimized.steps``)."""

    def __init__(self, driver: Driver, number: int) -> None:
        self._driver, self._number = driver, number

    def __repr__(self) -> str:
        return f"<step {self.name}>"

    @property
    def name(self) -> str:
        """Program, mode and types of the inputs: ``g1 infer f32[s77=48,16]``."""
        return step_name(self.report.programs)

    @property
    def report(self) -> Report:
        """The report of this step alone; what was measured is in ``Optimized.report``."""
        with self._driver.showing(self._number):
            return replace(self._driver.report(), earlier=())

    @property
    def plan(self) -> Plan:
        with self._driver.showing(self._number):
            return self._driver.plan()

    @property
    def programs(self) -> tuple[Program, ...]:
        """Its programs at every level: semantic, joint, then the lowered halves."""
        with self._driver.showing(self._number):
            return self._driver.programs()

    def memory(self) -> tuple[MemoryProfile, MemoryProfile]:
        """Simulated live bytes over the step: of the baseline, and of the plan."""
        with self._driver.showing(self._number):
            return self._driver.memory()

    def explain_memory(self) -> MemoryExplanation:
        """What holds the peak of the step, before and after."""
        with self._driver.showing(self._number):
            return self._driver.explain_memory()

    def frontier(self) -> tuple[ParetoPoint, ...]:
        """Plans of the step that no other beats in peak and seconds, least peak first."""
        with self._driver.showing(self._number):
            return self._driver.frontier()

    def dump(self, format: str = "text", stage: str = "final") -> str:
        """Its programs as text (``Optimized.dump``)."""
        with self._driver.showing(self._number):
            return self._driver.dump(format, stage)


def step_name(programs: Sequence[ProgramSummary]) -> str:
    """What a step of these programs is called: by the first of them."""
    if not programs:
        return "a step"
    first = programs[0]
    name = first.name.partition(".")[0]
    return f"{name} {first.mode} {first.inputs}".rstrip()
