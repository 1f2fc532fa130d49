"""Stages solved by OR-Tools' CP-SAT, an optional extra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from graphopt_passes.insert_checkpoints.exact.answer import Answer
from graphopt_passes.insert_checkpoints.exact.stages import Stages

__all__ = ["solve"]

_RESOLUTION = 2**24
"""Steps in which the dearest operator is counted; seconds are rounded down, so that bounds hold."""


def solve(
    stages: Stages, seconds: float, gap: float = 0.0, hint: Mapping[int, bool] = MappingProxyType({})
) -> Answer:
    """Least seconds under the rows, within a time limit, up to a relative ``gap``. ``hint``: values that
    some variables have in a good plan.

    One thread and a fixed seed: the answer is the same on every machine unless the time runs out.
    Raises ``ImportError`` where OR-Tools is not installed.
    """
    from ortools.sat.python import cp_model

    if stages.impossible:
        return Answer(None, math.inf, True)
    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in stages.costs]
    for row in stages.rows:
        if set(row.factors) <= {1, -1} and row.least == 1 - row.factors.count(-1) and row.unless < 0:
            literals = zip(row.variables, row.factors, strict=True)
            model.add_bool_or([variables[v] if sign > 0 else variables[v].negated() for v, sign in literals])
            continue
        step = math.gcd(*row.factors) or 1
        total = cp_model.LinearExpr.weighted_sum(
            [variables[v] for v in row.variables], [factor // step for factor in row.factors]
        )
        constraint = model.add(total >= -(-row.least // step))
        if row.unless >= 0:
            constraint.only_enforce_if(variables[row.unless])
    unit = max(stages.costs, default=0.0) / _RESOLUTION or 1.0
    prices = [int(cost / unit) for cost in stages.costs]
    model.minimize(cp_model.LinearExpr.weighted_sum(variables, prices))
    for index, value in hint.items():
        model.add_hint(variables[index], value)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    solver.parameters.relative_gap_limit = gap
    solver.parameters.max_time_in_seconds = max(seconds, 0.001)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return Answer(None, math.inf, True)
    bound = max(solver.best_objective_bound, 0.0) * unit
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(None, bound if status == cp_model.UNKNOWN else 0.0, False)
    values = [bool(solver.value(variable)) for variable in variables]
    return Answer(values, bound, status == cp_model.OPTIMAL)
