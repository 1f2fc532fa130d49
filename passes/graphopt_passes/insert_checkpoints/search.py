"""The frontier: from keeping everything down to the least peak, cheapest steps first.

Going down, each target below the present peak is reached by giving up storages in order of
bytes-above-target removed per second added; each time one is given up its neighbours' prices
change, so prices are looked up again. Once a target is met, what was given up needlessly is taken
back, dearest first. Every evaluation is on the true peak, and every one that lands on the frontier
is kept, so the result is at least as good as any starting point.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphopt_passes.insert_checkpoints.evaluate import Evaluation, Evaluator
from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["Front", "search"]


class Front:
    """Evaluations none of which is beaten in both peak and seconds, by rising peak."""

    def __init__(self) -> None:
        self.items: list[Evaluation] = []

    def add(self, item: Evaluation) -> bool:
        at = bisect.bisect_right([e.peak for e in self.items], item.peak)
        if at and self.items[at - 1].seconds <= item.seconds:
            return False
        start = bisect.bisect_left([e.peak for e in self.items], item.peak)
        end = start
        while end < len(self.items) and self.items[end].seconds >= item.seconds:
            end += 1
        self.items[start:end] = [item]
        return True

    def best_within(self, target: int) -> Evaluation | None:
        fitting = [item for item in self.items if item.peak <= target]
        return fitting[-1] if fitting else None


def search(
    evaluate: Evaluator, seeds: Iterable[frozenset[int]], *, targets: int, effort: int, repeat: bool = False
) -> Front:
    """The frontier of ``evaluate``'s model.

    ``targets``: how many peaks between the least and the largest are aimed at. ``effort``: how
    many evaluations may be spent on each. ``repeat``: whether a storage may be made again more than
    once.
    """
    front = Front()
    start = [evaluate(seed) for seed in seeds]
    for item in start:
        front.add(item)
    top = max(item.peak for item in start)
    descent = _Descent(evaluate, front, repeat)
    bottom = descent.run(max(start, key=lambda item: item.peak), 0, 10**9)
    low = min(bottom.peak, min(item.peak for item in front.items))
    for step in range(targets):
        target = low + (top - low) * (targets - 1 - step) // targets
        descent.run(_nearest_above(front, target), target, effort)
        best = front.best_within(target)
        if best is not None:
            _exchange(descent, _take_back(descent, best, target, effort), target, effort)
    return front


def _nearest_above(front: Front, target: int) -> Evaluation:
    above = [item for item in front.items if item.peak > target]
    return above[0] if above else front.items[-1]


@dataclass(frozen=True)
class _Move:
    """Give ``storage`` up (make it again, once or, ``repeatedly``, whenever a step needs it)."""

    rate: float
    storage: int
    repeatedly: bool
    gain: int


class _Descent:
    """Gives storages up until the peak is within a target."""

    def __init__(self, evaluate: Evaluator, front: Front, repeat: bool) -> None:
        self.evaluate, self.front, self.model, self.repeat = evaluate, front, evaluate.model, repeat

    def run(
        self, item: Evaluation, target: int, effort: int, keep: frozenset[int] = frozenset()
    ) -> Evaluation:
        refused = {(b, False) for b in keep}
        spent = 0
        while item.peak > target and spent < effort:
            aim = target if target else item.peak - max(1, item.peak // 50)
            moves = self._moves(item, aim, refused)
            if not moves:
                break
            excess = item.excess(aim)
            batch = self._batch(moves, excess)
            trial = self._moved(item, batch)
            spent += 1
            if trial.excess(aim) >= excess:
                if len(batch) > 1:
                    batch = batch[:1]
                    trial = self._moved(item, batch)
                    spent += 1
                if trial.excess(aim) >= excess:
                    refused.add((batch[0].storage, batch[0].repeatedly))
                    continue
            item = trial
            self.front.add(item)
        return item

    def _moved(self, item: Evaluation, moves: Sequence[_Move]) -> Evaluation:
        given = {move.storage for move in moves if not move.repeatedly}
        return self.evaluate(
            item.saved - given, item.fleeting | {move.storage for move in moves if move.repeatedly}
        )

    def _batch(self, moves: Sequence[_Move], excess: int) -> list[_Move]:
        """The best few that together remove about a tenth of the excess."""
        batch, removed = [], 0
        for move in moves:
            batch.append(move)
            removed += move.gain
            if removed * 10 > excess or len(batch) >= 16:
                break
        return batch

    def _moves(self, item: Evaluation, target: int, refused: set[tuple[int, bool]]) -> list[_Move]:
        """What may be given up, by bytes above the target removed per second added."""
        model = self.model
        over = (item.live > target).cumsum()
        total_forward = int((item.forward_live > target).sum())
        out = []
        for b in item.saved:
            if (b, False) in refused or not model.again[model.maker[b]]:
                continue
            first = item.first_use.get(b, 0)
            points = int(over[first - 1]) if first > 0 else 0
            ahead = total_forward - int((item.forward_live[: model.last_read[b] + 1] > target).sum())
            gain = model.size[b] * (points + ahead)
            if gain > 0:
                out.append(_Move(gain / (_chain(model, item, b) + 1e-7), b, False, gain))
        if self.repeat:
            gains: dict[int, int] = {}
            for b, begin, end in item.waits:
                if (points := int(over[end - 1] - over[begin])) > 0 and (b, True) not in refused:
                    gains[b] = gains.get(b, 0) + model.size[b] * points
            for b, gain in gains.items():
                out.append(_Move(gain / (_chain(model, item, b) + 1e-7), b, True, gain))
        out.sort(key=lambda move: (-move.rate, move.storage, move.repeatedly))
        return out


def _chain(model: StepModel, item: Evaluation, b: int) -> float:
    """Seconds to make ``b`` again from what the backward holds."""
    seconds = 0.0
    stack, seen = [model.maker[b]], set()
    while stack:
        i = stack.pop()
        if i in seen:
            continue
        seen.add(i)
        seconds += model.seconds[i]
        for x in model.inputs[i]:
            if x in item.saved or model.free[x] or (x in item.first_use and x not in item.fleeting):
                continue
            stack.append(model.maker[x])
    return seconds


def _take_back(descent: _Descent, item: Evaluation, target: int, effort: int) -> Evaluation:
    """Save again, or hold again, what fits, dearest per byte first."""
    model = descent.model
    runs = Counter(item.recomputed)
    options = [
        (-model.seconds[i] * count / max(model.size[b], 1), b, False)
        for i, count in runs.items()
        for b in model.outputs[i]
        if b not in item.saved and model.savable[b]
    ]
    options += [
        (-model.seconds[model.maker[b]] * (runs[model.maker[b]] - 1) / max(model.size[b], 1), b, True)
        for b in item.fleeting
    ]
    options.sort()
    for _, b, held in options[:effort]:
        if model.size[b] > target - item.peak and model.size[b] > target:
            continue
        trial = descent.evaluate(item.saved if held else item.saved | {b}, item.fleeting - {b})
        if trial.peak <= target and trial.seconds < item.seconds:
            item = trial
            descent.front.add(item)
    return item


def _exchange(descent: _Descent, item: Evaluation, target: int, effort: int) -> Evaluation:
    """Save something dear and give up whatever cheaper things make room for it."""
    evaluate, model = descent.evaluate, descent.model
    limit = evaluate.evaluations + effort
    tried: set[int] = set()
    while evaluate.evaluations < limit:
        dear = sorted(
            {b for i in item.recomputed for b in model.outputs[i] if b not in item.saved and model.savable[b]}
            - tried,
            key=lambda b: (-model.seconds[model.maker[b]], b),
        )
        if not dear:
            break
        tried.add(dear[0])
        trial = evaluate(item.saved | {dear[0]}, item.fleeting - {dear[0]})
        if trial.peak > target:
            trial = descent.run(trial, target, 8, frozenset({dear[0]}))
        if trial.peak <= target and trial.seconds < item.seconds:
            item = _take_back(descent, trial, target, 8)
            descent.front.add(item)
            tried.clear()
    return item
