"""Proven lower bounds, for the backward order given: on the peak, and on the seconds at a budget.

The peak: what one operator needs while it runs. The seconds: the linear relaxation of the problem in two
stages (``exact.relaxed``), solved when a budget is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from graphopt_passes.insert_checkpoints.exact.relaxation import least_seconds
from graphopt_passes.insert_checkpoints.exact.relaxed import two_stages
from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["peak_floor", "seconds_bound"]

_SECONDS = 5.0
"""How long the linear program of one budget may take; without an answer by then the bound is 0."""


def peak_floor(model: StepModel) -> int:
    """Bytes that some slot holds under every plan, above the static base."""
    floor = max((size for size in _operator_floors(model)), default=0)
    for slot in model.slots:
        operands = sum(model.size[b] for b in slot.reads if not model.free[b])
        floor = max(floor, model.output_bytes + operands + slot.during)
    return max(floor, model.opening + model.output_bytes)


def _operator_floors(model: StepModel) -> list[int]:
    return [
        sum(model.size[b] for b in {*model.inputs[i], *model.outputs[i]} if not model.only_saved[b])
        + model.workspace[i]
        for i in range(len(model.operators))
    ]


def seconds_bound(model: StepModel) -> Callable[[int], float]:
    """The bound as a function of the budget (bytes above the static base), in added seconds.

    Infinite where no plan can be within the budget.
    """

    @cache
    def bound(budget: int) -> float:
        return least_seconds(two_stages(model, budget), _SECONDS)

    return bound
