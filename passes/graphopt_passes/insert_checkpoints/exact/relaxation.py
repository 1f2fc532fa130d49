"""The linear relaxation of stages: a lower bound in one linear program, at any size."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from graphopt_passes.insert_checkpoints.exact.stages import Stages

__all__ = ["least_seconds", "matrix"]

Floats = npt.NDArray[np.float64]


def matrix(stages: Stages) -> tuple[csr_matrix, Floats]:
    """``A`` and ``b`` of ``A x >= b``, rows of memory in units of their largest factor.

    A row that is given only if a variable is 1 is weakened by as much as it may be missed otherwise.
    """
    data: list[float] = []
    columns: list[int] = []
    starts = [0]
    least = np.zeros(len(stages.rows))
    for index, row in enumerate(stages.rows):
        scale = max(map(abs, row.factors), default=1)
        data += [factor / scale for factor in row.factors]
        columns += row.variables
        right = float(row.least)
        if row.unless >= 0:
            slack = row.least - sum(min(factor, 0) for factor in row.factors)
            data.append(-slack / scale)
            columns.append(row.unless)
            right -= slack
        starts.append(len(data))
        least[index] = right / scale
    shape = (len(stages.rows), len(stages.costs))
    return csr_matrix((np.array(data), np.array(columns, np.int32), np.array(starts)), shape=shape), least


def least_seconds(stages: Stages, seconds: float) -> float:
    """A proven lower bound on the seconds of any assignment, 0 where time runs out, infinite where rows
    cannot be met even by fractions.

    The bound is worked out from the prices that the solver puts on the rows, not read from it: by weak
    duality any prices prove ``b.y + sum(min(c - A^T y, 0))``, whatever the solver's tolerance.
    """
    if stages.impossible:
        return math.inf
    unit = max(stages.costs, default=0.0)
    if not unit:
        return 0.0
    rows, least = matrix(stages)
    costs = np.array(stages.costs) / unit
    found = linprog(
        costs, A_ub=-rows, b_ub=-least, bounds=(0.0, 1.0), method="highs",
        options={"time_limit": max(seconds, 0.01)},
    )  # fmt: skip
    if found.status == 2:
        return math.inf
    if found.status != 0:
        return 0.0
    prices = np.maximum(-found.ineqlin.marginals, 0.0)
    reduced = costs - rows.T @ prices
    bound = float(least @ prices) + float(np.minimum(reduced, 0.0).sum())
    return max(0.0, bound - 1e-9 * float(np.abs(least) @ prices)) * unit
