"""Plans from solvers, and proofs how good plans are.

| file | does |
|---|---|
| `stages.py` | the problem as linear rows over binaries; neighbouring slots may be taken together |
| `relaxed.py` | two stages: a close relaxation in few variables |
| `relaxation.py` | a lower bound by linear programming, checked by weak duality |
| `milp.py`, `cpsat.py` | solvers |
| `order.py` | whether what runs again before one slot fits in any order |
| `solve.py` | these put together for one target |
"""

from __future__ import annotations

import importlib.util
import time

from graphopt.errors import PassError, nearest
from graphopt_passes.insert_checkpoints.evaluate import Evaluation, Evaluator
from graphopt_passes.insert_checkpoints.exact.solve import Solved, solve

__all__ = ["SOLVERS", "Solved", "chosen_solver", "plans", "solve"]

SOLVERS = ("auto", "milp", "cp-sat", "none")

_GAP = 1e-3
"""Share of the bound by which a plan of a frontier may exceed it: predicted seconds are no better."""

_TARGETS = 16
"""Peaks at which plans are asked for."""

_OPERATORS = 400
"""Operators of the forward up to which they are: beyond, a solver takes seconds for each."""


def chosen_solver(name: str) -> str:
    """The solver that an option names, ``""`` for none; ``"auto"`` is scipy's, which is always there and was
    faster on every public model tried.

    Raises ``PassError`` for an unknown name and for a solver that is not installed.
    """
    if name not in SOLVERS:
        close = nearest(str(name), SOLVERS)
        raise PassError(
            f"insert-checkpoints: solver={name!r}: expected one of {', '.join(map(repr, SOLVERS))}",
            hint=f"did you mean {close!r}?" if close else "",
        )
    if name == "cp-sat" and importlib.util.find_spec("ortools") is None:
        raise PassError(
            "insert-checkpoints: solver='cp-sat' needs OR-Tools, which is not installed",
            hint="pip install 'graphopt[exact]', or take solver='milp'",
        )
    return {"auto": "milp", "none": ""}.get(name, name)


def plans(evaluate: Evaluator, low: int, high: int, solver: str, seconds: float) -> list[Evaluation]:
    """Plans at evenly spaced peaks between ``low`` and ``high`` bytes, at first far apart, until ``seconds``
    are spent; also those that turned out to take more than asked for. None without a solver."""
    if not solver or len(evaluate.model.operators) > _OPERATORS:
        return []
    until = time.perf_counter() + seconds
    found: list[Evaluation] = []
    for place in _halving(_TARGETS):
        left = until - time.perf_counter()
        if left <= 0:
            break
        target = low + (high - low) * (2 * place + 1) // (2 * _TARGETS)
        solved = solve(evaluate, target, solver, min(left, seconds / 4), gap=_GAP)
        found += [*solved.also, *([solved.plan] if solved.plan is not None else [])]
    return found


def _halving(count: int) -> list[int]:
    """0 to ``count - 1``, a power of 2: after each power of 2 as even as possible (van der Corput 1935)."""
    order = [0]
    while len(order) < count:
        order = [2 * k for k in order] + [2 * k + 1 for k in order]
    return order
