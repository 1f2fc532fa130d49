"""The frontier: from keeping everything down to the least peak, cheapest steps first.

Going down, each target below the present peak is reached by giving up storages in order of
bytes-above-target removed per second added; each time one is given up its neighbours' prices
change, so prices are looked up again. Once a target is met, what was given up needlessly is taken
back, dearest first. Every step is judged on the true peak, and every plan that lands on the frontier
is kept, so the result is at least as good as any starting point.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence, Set

import numpy as np
import numpy.typing as npt

from graphopt_passes.insert_checkpoints.incremental import Incremental, Snapshot
from graphopt_passes.insert_checkpoints.moves import NEGLIGIBLE, Key, Kind, Move, Moves

__all__ = ["Front", "Start", "search"]

Array = npt.NDArray[np.int64]

_COARSE = 8
"""Of so many targets one is aimed at where only plans near one peak are asked for."""

_NARROW = 0.1
"""Which share of all peaks is searched closely above that one, and half of it below: plans that were found
above are where those below come from."""

_REACH = 0.15
"""Which share of all peaks, to both sides of that one, is looked at again at the end."""

Start = tuple[Set[int], Set[tuple[int, int]]]
"""Storages handed over, and what is released after which slot."""


class Front:
    """Plans none of which is beaten in both peak and price, by rising peak."""

    def __init__(self) -> None:
        self.items: list[Snapshot] = []
        self._peaks: list[int] = []

    def add(self, plan: Incremental) -> bool:
        peak, price = plan.peak, plan.price
        at = bisect.bisect_right(self._peaks, peak)
        if at and self.items[at - 1].price <= price:
            return False
        start = bisect.bisect_left(self._peaks, peak)
        end = start
        while end < len(self.items) and self.items[end].price >= price:
            end += 1
        self.items[start:end] = [plan.snapshot()]
        self._peaks[start:end] = [peak]
        return True

    def best_within(self, target: int) -> Snapshot | None:
        count = bisect.bisect_right(self._peaks, target)
        return self.items[count - 1] if count else None


def search(
    plan: Incremental,
    starts: Sequence[Start],
    *,
    targets: int,
    effort: int,
    own: Sequence[tuple[Start, int]] = (),
    repeat: bool = False,
    room: int | None = None,
) -> Front:
    """The frontier of ``plan``'s model.

    ``room``: the peak that the caller is after, ``None`` for all of them. Where a plan fits it most of the
    work is done around it, and the rest of the frontier is coarse.

    ``targets``: how many peaks between the least and the largest are aimed at. ``effort``: how
    many changes may be spent on each step of that. ``own``: plans that are each the start of a
    descent of their own, with how many changes it may take. ``repeat``: whether a storage may be made
    again more than once.
    """
    front = Front()
    top = 0
    for start in starts:
        # Neighbours in the family share much of the backward.
        plan.load(*start)
        plan.settle()
        front.add(plan)
        top = max(top, plan.peak)
    descent = _Descent(plan, front, repeat)
    low = top
    for start, limit in own:
        plan.load(*start)
        descent.run(0, limit)
        low = min(low, plan.peak)
    low = min(low, front.items[0].peak)
    aims = [low + (top - low) * (targets - 1 - step) // targets for step in range(targets)]
    near = room is not None and low <= room < top
    if room is not None and near:
        aims = _aims_at(room, aims, low)
    for target in aims:
        _load(plan, _nearest_above(front, target))
        descent.run(target, effort)
        best = front.best_within(target)
        if best is not None:
            _load(plan, best)
            _take_back(descent, target, effort)
            _exchange(descent, target, effort)
    items, count = front.items, targets // 4
    if room is not None and near:
        count, reach = max(4, len(aims) // 4), _REACH * (top - low)
        items = [item for item in items if room - reach <= item.peak <= room + reach]
    for item in _kinks(items, count):
        _load(plan, item)
        _shift(descent, 2 * effort)
        descent.run(plan.peak - plan.peak // 1000, effort)
    return front


def _aims_at(room: int, aims: Sequence[int], low: int) -> list[int]:
    """Falling targets, a part of as many as ``aims``: a few of those, and several around ``room``."""
    coarse = aims[:: _COARSE]
    narrow = max(4, len(aims) // _COARSE)
    reach = (aims[0] - low) * _NARROW
    close = [room + int(reach * (narrow - 1 - 1.5 * step) / narrow) for step in range(narrow)]
    return sorted({*coarse, *(max(low, target) for target in close), room}, reverse=True)


def _load(plan: Incremental, item: Snapshot) -> None:
    plan.load(item.saved, item.released)
    plan.settle()


def _nearest_above(front: Front, target: int) -> Snapshot:
    above = [item for item in front.items if item.peak > target]
    return above[0] if above else front.items[-1]


class _Descent:
    """Gives storages up until the peak is within a target."""

    def __init__(self, plan: Incremental, front: Front, repeat: bool) -> None:
        self.plan, self.front = plan, front
        self._moves = Moves(plan, repeat)
        model = plan.model
        self.size = np.maximum(np.array(model.size, dtype=np.int64), 1)
        self.maker = np.array(model.maker, dtype=np.int64)
        self.own = np.array(plan.prices, dtype=np.float64)[self.maker]
        self._savable = np.array(model.savable, dtype=bool)
        # So many at once that a whole program takes some dozens of steps.
        self._batch_size = max(16, len(plan.model.size) // 64)

    def run(self, target: int, effort: int, keep: Set[int] = frozenset()) -> None:
        """Change the plan until its peak is ``target`` at most; 0: as little as can be had."""
        plan = self.plan
        refused = {(b, kind, 0) for b in keep for kind in (Kind.GIVE_UP, Kind.APART)}
        spent = 0
        while (peak := plan.peak) > target and spent < effort:
            aim = target if target else peak - max(1, peak // 50)
            excess = plan.excess(aim)
            batch = self._batch(aim, excess, refused)
            if not batch:
                break
            mark = plan.mark()
            self._do(batch)
            spent += 1
            if plan.excess(aim) >= excess:
                plan.undo(mark)
                if len(batch) > 1:
                    self._do(batch[:1])
                    spent += 1
                if len(batch) == 1 or plan.excess(aim) >= excess:
                    plan.undo(mark)
                    refused.add(batch[0].key)
                    continue
            self.front.add(plan)

    def made_again(self) -> Array:
        """Storages that operators which run again make, that might be handed over instead."""
        plan = self.plan
        made = np.flatnonzero(self._savable & (plan.runs[self.maker] > 0))
        held: Array = made[[not plan.held[b] for b in made.tolist()]]
        return held

    def _do(self, moves: Sequence[Move]) -> None:
        self.plan.change(
            give=[move.storage for move in moves if move.kind is not Kind.RELEASE],
            release=[pair for move in moves for pair in move.released],
        )

    def _batch(self, target: int, excess: int, refused: Set[Key]) -> list[Move]:
        """The best moves that together remove about a tenth of the excess."""
        batch: list[Move] = []
        removed = 0
        for move in self._moves.best(target, refused):
            batch.append(move)
            removed += move.gain
            if removed * 10 > excess or len(batch) >= self._batch_size:
                break
        return batch


def _take_back(descent: _Descent, target: int, effort: int) -> None:
    """Save again, or hold again, what fits, dearest per byte first."""
    plan = descent.plan
    model, size = plan.model, descent.size
    made = descent.made_again()
    rates = descent.own[made] * plan.runs[descent.maker[made]] / size[made]
    dearest = made[np.argsort(-rates, kind="stable")[:effort]].tolist()
    options = [
        (-plan.prices[i] * int(plan.runs[i]) / max(model.size[b], 1), b, -1)
        for b in dearest
        for i in (model.maker[b],)
    ]
    options += [(-plan.prices[model.maker[b]] / max(model.size[b], 1), b, slot) for b, slot in plan.released]
    options.sort()
    for _, b, slot in options[:effort]:
        peak, price, mark = plan.peak, plan.price, plan.mark()
        if model.size[b] > target - peak and model.size[b] > target:
            continue
        if slot >= 0:
            plan.change(hold=[(b, slot)])
        else:
            plan.change(save=[b])
        if plan.peak <= target and plan.price < price:
            descent.front.add(plan)
        else:
            plan.undo(mark)


def _exchange(descent: _Descent, target: int, effort: int) -> None:
    """Save something dear and give up whatever cheaper things make room for it."""
    plan = descent.plan
    limit = plan.changes + effort
    tried = np.zeros(len(plan.model.size), dtype=bool)
    while plan.changes < limit:
        made = descent.made_again()
        made = made[~tried[made]]
        if not len(made):
            break
        dear = int(made[np.argmax(descent.own[made])])
        tried[dear] = True
        mark, price = plan.mark(), plan.price
        plan.change(save=[dear])
        if plan.peak > target:
            descent.run(target, 8, frozenset({dear}))
        if plan.peak <= target and plan.price < price:
            _take_back(descent, target, 8)
            descent.front.add(plan)
            tried[:] = False
        else:
            plan.undo(mark)


def _kinks(items: Sequence[Snapshot], count: int) -> list[Snapshot]:
    """The points below which the price jumps most: where one kind of recomputation is used up."""
    pairs = itertools.pairwise(items)
    jumps = [(dearer.price / max(item.price, NEGLIGIBLE), item) for dearer, item in pairs]
    jumps.sort(key=lambda jump: -jump[0])
    return [item for _, item in jumps[:count]]


def _shift(descent: _Descent, effort: int) -> None:
    """Save what is made from a storage in its place, or what several were made from in theirs.

    Moves the cut between saved and made again by one operator, largest storages first.
    """
    plan = descent.plan
    limit = plan.changes + effort
    tried: set[tuple[int, ...]] = set()
    improved = True
    while improved:
        improved = False
        for give, save in _shifted(plan):
            key = (*give, -1, *save)
            if key in tried:
                continue
            if plan.changes >= limit:
                return
            tried.add(key)
            mark, peak, price = plan.mark(), plan.peak, plan.price
            plan.change(give=give, save=save)
            if descent.front.add(plan) and plan.peak <= peak and plan.price <= price:
                improved = True
                tried.clear()
                break
            plan.undo(mark)


def _shifted(plan: Incremental) -> Iterator[tuple[list[int], list[int]]]:
    """What to give up and what to save so that the cut moves by one operator."""
    model = plan.model
    onward: dict[int, set[int]] = {}
    for i in set(plan.recomputed()):
        for b in model.inputs[i]:
            if b in plan.kept and model.again[model.maker[b]]:
                onward.setdefault(b, set()).update(x for x in model.outputs[i] if model.savable[x])
    back: dict[int, set[int]] = {}
    for x in plan.kept:
        if model.again[model.maker[x]]:
            for b in model.inputs[model.maker[x]]:
                if not plan.held[b] and model.savable[b]:
                    back.setdefault(b, set()).add(x)
    for b in sorted({*onward, *back}, key=lambda b: (-model.size[b], b)):
        if b in onward:
            yield [b], sorted(onward[b])
        if b in back:
            yield sorted(back[b]), [b]
