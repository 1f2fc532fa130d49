"""The frontier: from keeping everything down to the least peak, cheapest steps first.

Going down, each target below the present peak is reached by giving up storages in order of
bytes-above-target removed per second added; each time one is given up its neighbours' prices
change, so prices are looked up again. Once a target is met, what was given up needlessly is taken
back, dearest first. Every evaluation is on the true peak, and every one that lands on the frontier
is kept, so the result is at least as good as any starting point.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from graphopt_passes.insert_checkpoints.evaluate import Evaluation, Evaluator
from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["Front", "search"]

_NEGLIGIBLE = 1e-7
"""Seconds (or the share of FLOPs) below which prices do not count."""


class Front:
    """Evaluations none of which is beaten in both peak and seconds, by rising peak."""

    def __init__(self) -> None:
        self.items: list[Evaluation] = []
        self._peaks: list[int] = []

    def add(self, item: Evaluation) -> bool:
        peak = item.peak
        at = bisect.bisect_right(self._peaks, peak)
        if at and self.items[at - 1].seconds <= item.seconds:
            return False
        start = bisect.bisect_left(self._peaks, peak)
        end = start
        while end < len(self.items) and self.items[end].seconds >= item.seconds:
            end += 1
        self.items[start:end] = [item]
        self._peaks[start:end] = [peak]
        return True

    def best_within(self, target: int) -> Evaluation | None:
        count = bisect.bisect_right(self._peaks, target)
        return self.items[count - 1] if count else None


def search(
    evaluate: Evaluator,
    seeds: Sequence[frozenset[int]],
    *,
    targets: int,
    effort: int,
    own: Sequence[frozenset[int]] = (),
    repeat: bool = False,
) -> Front:
    """The frontier of ``evaluate``'s model.

    ``targets``: how many peaks between the least and the largest are aimed at. ``effort``: how
    many evaluations may be spent on each step of that. ``own``: seeds that are each the start of a
    descent of their own. ``repeat``: whether a storage may be made again more than once.
    """
    front = Front()
    start: list[Evaluation] = []
    for seed in seeds:
        # Neighbours in the family share much of the backward.
        start.append(evaluate(seed, frozenset(), start[-1] if start else None))
    for item in start:
        front.add(item)
    top = max(item.peak for item in start)
    descent = _Descent(evaluate, front, repeat)
    bottom = descent.run(max(start, key=lambda item: item.peak), 0, 10**9)
    for seed in own:
        descent.run(evaluate(seed), 0, 8 * effort)
    low = min(bottom.peak, min(item.peak for item in front.items))
    for step in range(targets):
        target = low + (top - low) * (targets - 1 - step) // targets
        descent.run(_nearest_above(front, target), target, effort)
        best = front.best_within(target)
        if best is not None:
            _exchange(descent, _take_back(descent, best, target, effort), target, effort)
    for item in _kinks(front, targets // 4):
        item = _shift(descent, item, 2 * effort)
        descent.run(item, item.peak - item.peak // 1000, effort)
    return front


def _nearest_above(front: Front, target: int) -> Evaluation:
    above = [item for item in front.items if item.peak > target]
    return above[0] if above else front.items[-1]


class _Kind(IntEnum):
    """GIVE_UP: make a storage again; what its chain makes ahead of time waits. APART: likewise, and
    make the chain for it alone. RELEASE: let go of one that waits for its next reader."""

    GIVE_UP = 0
    APART = 1
    RELEASE = 2


@dataclass(frozen=True)
class _Move:
    """``gain``: bytes above the target that it removes; ``released``: what goes after which slot."""

    storage: int
    kind: _Kind
    slot: int
    gain: int
    released: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> tuple[int, _Kind, int]:
        return self.storage, self.kind, self.slot


class _Descent:
    """Gives storages up until the peak is within a target."""

    def __init__(self, evaluate: Evaluator, front: Front, repeat: bool) -> None:
        self.evaluate, self.front, self.model, self.repeat = evaluate, front, evaluate.model, repeat
        model = evaluate.model
        self._size = np.array(model.size, dtype=np.int64)
        self._last_read = np.array(model.last_read, dtype=np.int64)
        self._again = np.array([model.again[i] for i in model.maker], dtype=bool)

    def run(
        self, item: Evaluation, target: int, effort: int, keep: frozenset[int] = frozenset()
    ) -> Evaluation:
        refused = {(b, kind, 0) for b in keep for kind in (_Kind.GIVE_UP, _Kind.APART)}
        spent = 0
        while item.peak > target and spent < effort:
            aim = target if target else item.peak - max(1, item.peak // 50)
            batch = self._batch(item, aim, refused)
            if not batch:
                break
            excess = item.excess(aim)
            trial = self._moved(item, batch)
            spent += 1
            if trial.excess(aim) >= excess:
                if len(batch) > 1:
                    batch = batch[:1]
                    trial = self._moved(item, batch)
                    spent += 1
                if trial.excess(aim) >= excess:
                    refused.add(batch[0].key)
                    continue
            item = trial
            self.front.add(item)
        return item

    def _moved(self, item: Evaluation, moves: Sequence[_Move]) -> Evaluation:
        given = {move.storage for move in moves if move.kind is not _Kind.RELEASE}
        released = item.released.union(*(move.released for move in moves))
        return self.evaluate(item.saved - given, released, item)

    def _batch(self, item: Evaluation, target: int, refused: set[tuple[int, _Kind, int]]) -> list[_Move]:
        """The best few moves that together remove about a tenth of the excess."""
        excess = item.excess(target)
        batch: list[_Move] = []
        removed = 0
        for move in self._moves(item, target, refused):
            batch.append(move)
            removed += move.gain
            if removed * 10 > excess or len(batch) >= 16:
                break
        return batch

    def _moves(self, item: Evaluation, target: int, refused: set[tuple[int, _Kind, int]]) -> Iterator[_Move]:
        """What may be given up, by bytes above the target removed per second added.

        The seconds of the operator alone bound those of all that has to run again with it, so only
        what may come next is priced in full.
        """
        model = self.model
        over = np.concatenate(([0], (item.live > target).cumsum()))
        ahead = np.concatenate(([0], (item.forward_live > target).cumsum()))
        saved = np.fromiter(item.saved, np.int64, len(item.saved))
        saved = np.sort(saved[self._again[saved]])
        # Above the target until it is first read, and in the forward after its last use there.
        points = over[np.maximum(item.first_use[saved], 0)] + ahead[-1] - ahead[self._last_read[saved] + 1]
        gains = self._size[saved] * points
        # Entries: rate, storage, kind, slot, gain, and once priced what is released.
        heap: list[tuple[float, int, _Kind, int, int, tuple[tuple[int, int], ...] | None]] = []
        for b, gain in zip(saved[gains > 0].tolist(), gains[gains > 0].tolist(), strict=True):
            rate = -gain / (model.seconds[model.maker[b]] + _NEGLIGIBLE)
            heap.append((rate, b, _Kind.GIVE_UP, 0, gain, None))
        ends: dict[tuple[int, int], int] = {}
        for b, slot, begin, end in item.waits() if self.repeat else ():
            above = int(over[end] - over[begin + 1])
            if above > 0 and (b, _Kind.RELEASE, slot) not in refused:
                ends[b, slot] = end
                gain = model.size[b] * above
                rate = -gain / (model.seconds[model.maker[b]] + _NEGLIGIBLE)
                heap.append((rate, b, _Kind.RELEASE, slot, gain, None))
        heapq.heapify(heap)
        loose = {b for b, _ in item.released}
        while heap:
            rate, b, kind, slot, gain, released = heapq.heappop(heap)
            if released is not None:
                yield _Move(b, kind, slot, gain, released)
            elif kind is _Kind.RELEASE:
                chain = _chain(model, item, b, ends[b, slot], loose)
                rate = -gain / (chain.alone + _NEGLIGIBLE)
                heapq.heappush(heap, (rate, b, kind, slot, gain, ((b, slot), *chain.released)))
            else:
                use = int(item.first_use[b])
                chain = _chain(model, item, b, use, loose)
                waits = sum(model.size[x] * int(over[end] - over[begin]) for x, begin, end in chain.waits)
                if gain > waits and (b, kind, 0) not in refused:
                    rate = -(gain - waits) / (chain.shared + _NEGLIGIBLE)
                    heapq.heappush(heap, (rate, b, kind, 0, gain - waits, ()))
                if waits and self.repeat and (b, _Kind.APART, 0) not in refused:
                    rate = -gain / (chain.alone + _NEGLIGIBLE)
                    heapq.heappush(heap, (rate, b, _Kind.APART, 0, gain, chain.released))


@dataclass(frozen=True)
class _Chain:
    """What has to run so that a storage is there again at some point.

    Some of what it takes the backward makes anyway, but later, or has made before. ``shared``: seconds
    added if that waits; ``waits``: (storage, point, point) for each that does. ``alone``: seconds if it is
    made once more instead; ``released``: (storage, slot) for each that goes in between.
    """

    shared: float
    alone: float
    waits: tuple[tuple[int, int, int], ...]
    released: tuple[tuple[int, int], ...]


def _chain(model: StepModel, item: Evaluation, b: int, use: int, loose: Set[int]) -> _Chain:
    """How ``b`` is made again at point ``use`` from what the backward holds there, ``loose`` left out."""
    alone = shared = 0.0
    # Each operator with whether it has to run even where what there was waits.
    stack, seen = [(model.maker[b], True)], {model.maker[b]}
    waits, released = [], []
    while stack:
        i, needed = stack.pop()
        early = past = False
        for x in model.outputs[i]:
            first, last = int(item.first_use[x]), int(item.last_use[x])
            if x == b or first < 0 or x in item.saved or model.free[x] or x in loose:
                continue
            if first > use:
                early = True
                released.append((x, item.slot_of(use)))
                if needed:
                    waits.append((x, use, first))
            elif last < use:
                past = True
                released.append((x, item.slot_of(last)))
                if needed:
                    waits.append((x, last + 1, use))
        alone += model.seconds[i]
        needed = needed and not past
        shared += model.seconds[i] if needed and not early else 0.0
        for x in model.inputs[i]:
            if x in item.saved or model.free[x] or model.maker[x] in seen:
                continue
            if 0 <= item.first_use[x] <= use <= item.last_use[x] and x not in loose:
                continue
            seen.add(model.maker[x])
            stack.append((model.maker[x], needed))
    return _Chain(shared, alone, tuple(waits), tuple(released))


def _take_back(descent: _Descent, item: Evaluation, target: int, effort: int) -> Evaluation:
    """Save again, or hold again, what fits, dearest per byte first."""
    model = descent.model
    runs = Counter(item.recomputed)
    options: list[tuple[float, int, int]] = [
        (-model.seconds[i] * count / max(model.size[b], 1), b, -1)
        for i, count in runs.items()
        for b in model.outputs[i]
        if b not in item.saved and model.savable[b]
    ]
    options += [
        (-model.seconds[model.maker[b]] / max(model.size[b], 1), b, slot) for b, slot in item.released
    ]
    options.sort()
    for _, b, slot in options[:effort]:
        if model.size[b] > target - item.peak and model.size[b] > target:
            continue
        saved = item.saved if slot >= 0 else item.saved | {b}
        trial = descent.evaluate(saved, item.released - {(b, slot)}, item)
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
        trial = evaluate(item.saved | {dear[0]}, item.released, item)
        if trial.peak > target:
            trial = descent.run(trial, target, 8, frozenset({dear[0]}))
        if trial.peak <= target and trial.seconds < item.seconds:
            item = _take_back(descent, trial, target, 8)
            descent.front.add(item)
            tried.clear()
    return item


def _kinks(front: Front, count: int) -> list[Evaluation]:
    """The points below which the price jumps most: where one kind of recomputation is used up."""
    pairs = zip(front.items, front.items[1:], strict=False)
    jumps = [(dearer.seconds / max(item.seconds, _NEGLIGIBLE), item) for dearer, item in pairs]
    jumps.sort(key=lambda jump: -jump[0])
    return [item for _, item in jumps[:count]]


def _shift(descent: _Descent, item: Evaluation, effort: int) -> Evaluation:
    """Save what is made from a storage in its place, or what several were made from in theirs.

    Moves the cut between saved and made again by one operator, largest storages first.
    """
    evaluate = descent.evaluate
    limit = evaluate.evaluations + effort
    tried: set[frozenset[int]] = set()
    improved = True
    while improved:
        improved = False
        for saved in _shifted(evaluate.model, item):
            if saved in tried:
                continue
            if evaluate.evaluations >= limit:
                return item
            tried.add(saved)
            trial = evaluate(saved, item.released, item)
            if descent.front.add(trial) and trial.peak <= item.peak and trial.seconds <= item.seconds:
                item, improved = trial, True
                break
    return item


def _shifted(model: StepModel, item: Evaluation) -> Iterator[frozenset[int]]:
    """Saved sets one operator away from an evaluation's."""
    onward: dict[int, set[int]] = {}
    for i in set(item.recomputed):
        for b in model.inputs[i]:
            if b in item.saved and model.again[model.maker[b]]:
                onward.setdefault(b, set()).update(x for x in model.outputs[i] if model.savable[x])
    back: dict[int, set[int]] = {}
    for x in item.saved:
        for b in model.inputs[model.maker[x]]:
            if b not in item.saved and not model.free[b] and model.savable[b] and model.again[model.maker[x]]:
                back.setdefault(b, set()).add(x)
    for b in sorted({*onward, *back}, key=lambda b: (-model.size[b], b)):
        if b in onward:
            yield (item.saved - {b}) | onward[b]
        if b in back:
            yield (item.saved | {b}) - back[b]
