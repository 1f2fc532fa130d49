"""The frontier: from keeping everything down to the least peak, cheapest steps first.

Going down, each target below the present peak is reached by giving up storages in order of
bytes-above-target removed per second added; each time one is given up its neighbours' prices
change, so prices are looked up again. Once a target is met, what was given up needlessly is taken
back, dearest first. Every evaluation is on the true peak, and every one that lands on the frontier
is kept, so the result is at least as good as any starting point.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

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


def search(evaluate: Evaluator, seeds: Iterable[frozenset[int]], *, targets: int, effort: int) -> Front:
    """The frontier of ``evaluate``'s model.

    ``targets``: how many peaks between the least and the largest are aimed at. ``effort``: how
    many evaluations may be spent on each.
    """
    front = Front()
    start = [evaluate(seed) for seed in seeds]
    for item in start:
        front.add(item)
    top = max(item.peak for item in start)
    bottom = _Descent(evaluate, front).run(max(start, key=lambda item: item.peak), 0, 10**9)
    low = min(bottom.peak, min(item.peak for item in front.items))
    for step in range(targets):
        target = low + (top - low) * (targets - 1 - step) // targets
        begin = _nearest_above(front, target)
        _Descent(evaluate, front).run(begin, target, effort)
        best = front.best_within(target)
        if best is not None:
            _exchange(evaluate, front, _take_back(evaluate, front, best, target, effort), target, effort)
    return front


def _nearest_above(front: Front, target: int) -> Evaluation:
    above = [item for item in front.items if item.peak > target]
    return above[0] if above else front.items[-1]


class _Descent:
    """Gives storages up until the peak is within a target."""

    def __init__(self, evaluate: Evaluator, front: Front) -> None:
        self.evaluate, self.front, self.model = evaluate, front, evaluate.model

    def run(self, item: Evaluation, target: int, effort: int, keep: frozenset[int] = frozenset()) -> Evaluation:
        refused = set(keep)
        spent = 0
        while item.peak > target and spent < effort:
            aim = target if target else item.peak - max(1, item.peak // 50)
            prices = self._prices(item, aim, refused)
            if not prices:
                break
            batch = self._batch(prices, item.excess(aim))
            trial = self.evaluate(item.saved - {b for b, _ in batch})
            spent += 1
            if trial.excess(aim) >= item.excess(aim):
                if len(batch) > 1:
                    batch = batch[:1]
                    trial = self.evaluate(item.saved - {batch[0][0]})
                    spent += 1
                if trial.excess(aim) >= item.excess(aim):
                    refused.add(batch[0][0])
                    continue
            item = trial
            self.front.add(item)
        return item

    def _batch(self, prices: Sequence[tuple[float, int, int]], excess: int) -> list[tuple[int, int]]:
        """The best few that together remove about a tenth of the excess."""
        batch, removed = [], 0
        for _, b, gain in prices:
            batch.append((b, gain))
            removed += gain
            if removed * 10 > excess or len(batch) >= 16:
                break
        return batch

    def _prices(self, item: Evaluation, target: int, refused: set[int]) -> list[tuple[float, int, int]]:
        """(bytes above target removed per second added, storage, those bytes), best first."""
        model = self.model
        over = (item.live > target).cumsum()
        total_forward = int((item.forward_live > target).sum())
        out = []
        for b in item.saved:
            if b in refused or not model.again[model.maker[b]]:
                continue
            first = item.first_use.get(b, 0)
            points = int(over[first - 1]) if first > 0 else 0
            ahead = total_forward - int((item.forward_live[: model.last_read[b] + 1] > target).sum())
            gain = model.size[b] * (points + ahead)
            if gain <= 0:
                continue
            seconds, extended = _chain(model, item, b)
            out.append((gain / (seconds + 1e-7), b, gain))
        out.sort(reverse=True)
        return out


def _chain(model: StepModel, item: Evaluation, b: int) -> tuple[float, int]:
    """Seconds to make ``b`` again from what the backward holds, and bytes of the chain."""
    seconds, size = 0.0, 0
    stack, seen = [model.maker[b]], set()
    while stack:
        i = stack.pop()
        if i in seen:
            continue
        seen.add(i)
        seconds += model.seconds[i]
        for x in model.inputs[i]:
            if x in item.saved or model.free[x] or x in item.first_use:
                continue
            size += model.size[x]
            stack.append(model.maker[x])
    return seconds, size


def _take_back(evaluate: Evaluator, front: Front, item: Evaluation, target: int, effort: int) -> Evaluation:
    """Save again what fits, dearest per byte first."""
    model = evaluate.model
    again = sorted(
        {b for i in item.recomputed for b in model.outputs[i] if b not in item.saved and model.savable[b]},
        key=lambda b: (-model.seconds[model.maker[b]] / max(model.size[b], 1), b),
    )
    for b in again[:effort]:
        if model.size[b] > target - item.peak and model.size[b] > target:
            continue
        trial = evaluate(item.saved | {b})
        if trial.peak <= target and trial.seconds < item.seconds:
            item = trial
            front.add(item)
    return item


def _exchange(evaluate: Evaluator, front: Front, item: Evaluation, target: int, effort: int) -> Evaluation:
    """Save something dear and give up whatever cheaper things make room for it."""
    model = evaluate.model
    limit = evaluate.evaluations + effort
    tried: set[int] = set()
    while evaluate.evaluations < limit:
        dear = sorted(
            {b for i in item.recomputed for b in model.outputs[i] if b not in item.saved and model.savable[b]} - tried,
            key=lambda b: (-model.seconds[model.maker[b]], b),
        )
        if not dear:
            break
        tried.add(dear[0])
        trial = evaluate(item.saved | {dear[0]})
        if trial.peak > target:
            trial = _Descent(evaluate, front).run(trial, target, 8, frozenset({dear[0]}))
        if trial.peak <= target and trial.seconds < item.seconds:
            item = _take_back(evaluate, front, trial, target, 8)
            front.add(item)
            tried.clear()
    return item
