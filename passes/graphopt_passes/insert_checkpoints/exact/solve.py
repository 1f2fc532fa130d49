"""The best plan within a target, and the proof how good it is.

First in two stages (``relaxed``): where the evaluator finds the plan within the target and no slower than
the bound, that is all. Otherwise slot by slot. There the rows of ``Stages`` leave out how operators that run
again before one slot are ordered. So a solution is checked slot by slot: where no order fits, what the
operators of that slot find there is added to the rows; where it still does not fit, that combination is
forbidden (combinatorial Benders cuts, Codato and Fischetti 2006). Seconds of a solution in which every slot
fits are those of the best plan. What the evaluator makes of it is another matter: it runs again on demand, in
one order, and holds what is handed over until its last reader. Only what it judges to be within the target is
a plan; the bound holds regardless.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from graphopt_passes.insert_checkpoints.evaluate import Evaluation, Evaluator
from graphopt_passes.insert_checkpoints.exact import cpsat, milp
from graphopt_passes.insert_checkpoints.exact.answer import Answer
from graphopt_passes.insert_checkpoints.exact.order import fits
from graphopt_passes.insert_checkpoints.exact.relaxed import two_stages
from graphopt_passes.insert_checkpoints.exact.stages import Row, Stages
from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["Solved", "solve"]

_AGAIN = 3
"""How often a plan that the evaluator puts above the target is asked for again below it."""

_NEAR = 0.05
"""By what share of the target the evaluator may put it above for that to be worth while."""

_VARIABLES = 40_000
"""Above that many slots times operators and storages, slot by slot is not tried."""


@dataclass(frozen=True)
class Solved:
    """``plan``: the fastest within the target that was found, ``None`` if none was. ``bound``: seconds that
    every plan within the target adds, infinite if there is none. ``least``: seconds of the problem's
    optimum where it was found, whether or not the evaluator can run it. ``also``: what else was evaluated
    on the way, above the target."""

    plan: Evaluation | None
    bound: float
    least: float | None
    also: tuple[Evaluation, ...]


def solve(
    evaluate: Evaluator,
    target: int,
    solver: str,
    seconds: float,
    known: Evaluation | None = None,
    gap: float = 0.0,
) -> Solved:
    """Solve for a peak of at most ``target`` bytes above the static base.

    ``solver``: ``"milp"`` or ``"cp-sat"``. ``seconds``: the time limit. ``known``: a plan within the target
    to start from. ``gap``: the share of the bound by which a plan may exceed it to be good enough; with one,
    slot by slot is left out.
    """
    return _Search(evaluate, target, solver, time.perf_counter() + seconds, known, gap).run()


class _Search:
    def __init__(
        self,
        evaluate: Evaluator,
        target: int,
        solver: str,
        until: float,
        known: Evaluation | None,
        gap: float,
    ) -> None:
        self._evaluate, self._target, self._solver, self._until = evaluate, target, solver, until
        self._model, self._gap = evaluate.model, gap
        self._best = known
        self._also: list[Evaluation] = []
        self._starts = range(len(self._model.slots))

    def run(self) -> Solved:
        bound = self._roughly()
        size = len(self._starts) * (len(self._model.size) + len(self._model.operators))
        if self._gap or self._reached(bound) or bound == math.inf or size > _VARIABLES:
            least = self._best.seconds if self._best is not None and self._reached(bound) else None
            return Solved(self._best, bound, least, tuple(self._also))
        stages = Stages(self._model, self._target, self._starts)
        finer, least = self._settle(stages)
        if least is not None and not self._reached(least):
            self._within_reach()
        return Solved(self._best, max(bound, finer), least, tuple(self._also))

    def _reached(self, bound: float) -> bool:
        return self._best is not None and self._best.seconds <= bound * (1 + 1e-9) + 1e-15

    def _roughly(self) -> float:
        """The bound of two stages; plans from it, aimed lower by what the evaluator finds on top."""
        bound, target = 0.0, self._target
        for again in range(_AGAIN):
            if self._left() <= 0:
                break
            stages = two_stages(self._model, target)
            answer = self._answer(stages)
            if not again:
                bound = answer.bound
            if answer.values is None:
                break
            handed = [b for (k, b), v in stages.held.items() if k == 0 and answer.values[v]]
            missed = self._judge(self._evaluate(frozenset(handed))).peak - self._target
            if missed <= 0 or missed > _NEAR * self._target:
                break
            target -= missed
        return bound

    def _left(self) -> float:
        return self._until - time.perf_counter()

    def _answer(self, stages: Stages) -> Answer:
        if not stages.costs and not stages.impossible:
            return Answer([], 0.0, True)
        if self._solver == "cp-sat":
            return cpsat.solve(stages, self._left(), self._gap, self._hint(stages))
        return milp.solve(stages, self._left(), self._gap)

    def _settle(self, stages: Stages) -> tuple[float, float | None]:
        """Solve until every slot of the solution fits: bound, seconds if they are the least."""
        bound = 0.0
        refined: set[int] = set()
        while self._left() > 0:
            answer = self._answer(stages)
            bound = max(bound, answer.bound)
            if answer.values is None:
                break
            self._try(stages, answer.values)
            verdicts = {k: self._fits(stages, answer.values, k) for k in self._busy(stages, answer.values)}
            if all(verdicts.values()):
                cost = math.fsum(c for c, v in zip(stages.costs, answer.values, strict=True) if v)
                return bound, cost if answer.best else None
            if None in verdicts.values():
                break
            for k in (k for k, fit in verdicts.items() if not fit):
                if k in refined:
                    self._forbid(stages, answer.values, k)
                else:
                    stages.inside(k)
                    refined.add(k)
        return bound, None

    def _busy(self, stages: Stages, values: Sequence[bool]) -> list[int]:
        return sorted({k for (k, _), variable in stages.run.items() if values[variable]})

    def _sets(self, stages: Stages, values: Sequence[bool], k: int) -> tuple[set[int], set[int], set[int]]:
        """What is held as a slot begins, runs before it, is held as the next one begins."""
        size, count = len(self._model.size), len(self._model.operators)
        held, run = stages.held, stages.run
        here = {b for b in range(size) if (k, b) in held and values[held[k, b]]}
        runs = {i for i in range(count) if (k, i) in run and values[run[k, i]]}
        return here, runs, {b for b in range(size) if (k + 1, b) in held and values[held[k + 1, b]]}

    def _fits(self, stages: Stages, values: Sequence[bool], k: int) -> bool | None:
        return fits(self._model, k, *self._sets(stages, values, k), self._target)

    def _forbid(self, stages: Stages, values: Sequence[bool], k: int) -> None:
        """Not this set of operators from this set of storages, whatever else is held on."""
        _, _, onward = self._sets(stages, values, k)
        ones: list[int] = []
        zeros: list[int] = []
        for (stage, _), variable in (*stages.held.items(), *stages.run.items()):
            if stage == k:
                (ones if values[variable] else zeros).append(variable)
        ones += [stages.held[k + 1, b] for b in onward]
        factors = (-1,) * len(ones) + (1,) * len(zeros)
        stages.rows.append(Row((*ones, *zeros), factors, 1 - len(ones)))

    def _try(self, stages: Stages, values: Sequence[bool]) -> Evaluation:
        return self._judge(self._evaluate(*choice(self._model, stages, values)))

    def _judge(self, item: Evaluation) -> Evaluation:
        if item.peak > self._target:
            self._also.append(item)
        elif self._best is None or item.seconds < self._best.seconds:
            self._best = item
        return item

    def _within_reach(self) -> None:
        """Ask again for what the evaluator can run, and by as much less as it misses the target by."""
        target = self._target
        for _ in range(_AGAIN):
            if self._left() <= 0:
                return
            narrow = Stages(self._model, target, self._starts, kept_stays=True)
            for k in self._starts:
                narrow.inside(k)
            answer = self._answer(narrow)
            if answer.values is None:
                return
            missed = self._try(narrow, answer.values).peak - self._target
            if missed <= 0:
                return
            target -= missed

    def _hint(self, stages: Stages) -> dict[int, bool]:
        """What the best plan known hands over."""
        if self._best is None:
            return {}
        return {variable: b in self._best.saved for (k, b), variable in stages.held.items() if k == 0}


def choice(
    model: StepModel, stages: Stages, values: Sequence[bool]
) -> tuple[frozenset[int], frozenset[tuple[int, int]]]:
    """What a solution hands over, and what it lets go after which slot, as the evaluator takes them.

    Let go of is what the solution does not hold at every slot between two at which it is read or made.
    """
    held = [set[int]() for _ in range(len(model.slots) + 1)]
    for (k, b), variable in stages.held.items():
        if values[variable]:
            held[k].add(b)
    touched: dict[int, list[int]] = {}
    runs: dict[int, list[int]] = {}
    for (k, i), variable in stages.run.items():
        if values[variable]:
            runs.setdefault(k, []).append(i)
    for k, slot in enumerate(model.slots):
        met = {b for i in runs.get(k, ()) for b in (*model.inputs[i], *model.outputs[i])}
        for b in met.union(slot.reads):
            touched.setdefault(b, []).append(k)
    released: set[tuple[int, int]] = set()
    for b, at in touched.items():
        if b in held[0] or model.free[b]:
            continue
        for k, following in pairwise(at):
            if any(b not in held[between] for between in range(k + 1, following + 1)):
                released.add((b, k))
    return frozenset(held[0]), frozenset(released)
