"""Stages solved by scipy's mixed-integer solver (HiGHS)."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from graphopt_passes.insert_checkpoints.exact.answer import Answer
from graphopt_passes.insert_checkpoints.exact.relaxation import matrix
from graphopt_passes.insert_checkpoints.exact.stages import Stages

__all__ = ["solve"]

_TOLERANCE = 1e-6
"""By how much, as a share, HiGHS may miss a row or its bound."""


def solve(stages: Stages, seconds: float, gap: float = 0.0) -> Answer:
    """Least seconds under the rows, within a time limit, up to a relative ``gap``. HiGHS takes no hint
    through scipy."""
    if stages.impossible:
        return Answer(None, math.inf, True)
    unit = max(stages.costs, default=0.0) or 1.0
    rows, least = matrix(stages)
    found = milp(
        np.array(stages.costs) / unit,
        constraints=LinearConstraint(rows, lb=least) if stages.rows else (),
        integrality=np.ones(len(stages.costs)),
        bounds=Bounds(0.0, 1.0),
        options={"time_limit": max(seconds, 0.01), "mip_rel_gap": gap},
    )
    if found.status == 2:
        return Answer(None, math.inf, True)
    proven = found.mip_dual_bound if found.mip_dual_bound is not None else 0.0
    bound = max(0.0, proven * (1 - _TOLERANCE)) * unit if math.isfinite(proven) else 0.0
    values = None if found.x is None else [bool(x > 0.5) for x in found.x]
    return Answer(values, bound, found.status == 0)
