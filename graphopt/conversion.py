"""Passes that change the model before it is captured, where a step of it as it is does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Program

if TYPE_CHECKING:
    from graphopt.packing.calibration import Calibration

__all__ = ["Conversion", "conversion_among"]


@dataclass(frozen=True)
class Conversion(Pass):
    """Base of passes that keep weights in fewer bytes. It proposes nothing for programs: the model is changed
    before they are captured, and only as far as the budget asks for.
    """

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        return ()

    def wanted_schemes(self) -> Sequence[str] | None:
        """Schemes to choose among, as they are spelled; ``None``: all that are registered."""
        raise NotImplementedError(f"{type(self).__name__} does not define wanted_schemes()")

    def wanted_score(self) -> str | None:
        """The scorer that says what an error is; ``None``: as ``graphopt.quantize`` chooses."""
        return None

    def wanted_calibration(self) -> Calibration | None:
        """What is known of the inputs of weights."""
        return None


def conversion_among(passes: Sequence[Pass]) -> Conversion | None:
    """The conversion of a pipeline, the first of several."""
    return next((step for step in passes if isinstance(step, Conversion)), None)
