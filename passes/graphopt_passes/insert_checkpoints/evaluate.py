"""What a set of saved storages costs: peak of both halves, added time, order of the backward.

A storage that is not saved is made again right before the first slot that needs it, along with
whatever it needs itself, in the order of the forward, and then held until its last use. A *release*
lets it go after a slot that made or read it, to be made once more for the next one that needs it: in
between it takes no memory (recursive checkpointing: Griewank and Walther 2000; several intervals for
each value: Bartan et al. 2023).

Written to be read: ``incremental``, made to be fast, is held against it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["Evaluation", "Evaluator"]

Array = npt.NDArray[np.int64]


@dataclass
class _Trace:
    """The backward as it was simulated.

    ``reads[p]``: storages read at point p. ``births``: storages made and the points where;
    ``drops``: (storage, birth, end, slot) of released ones; ``kept``: storages handed over, in the order
    in which they are needed. ``begins[k]``: the first point of slot k, and past the last the end.
    """

    reads: list[tuple[int, ...]] = field(default_factory=list)
    births: list[int] = field(default_factory=list)
    birth_points: list[int] = field(default_factory=list)
    drops: list[tuple[int, int, int, int]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    recomputed: list[int] = field(default_factory=list)
    level: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)


@dataclass
class Evaluation:
    """``saved``: every storage handed over, those forced by operators that cannot run again
    included. ``released``: (storage, slot) for each that is let go after a slot. ``live`` holds bytes at
    each point of the backward, ``forward_live`` at each operator of the forward. ``first_use[b]`` is
    the point of the backward at which a storage is first read, -1 for never, ``last_use[b]`` that at which
    it is last read, 0 for never; ``recomputed`` the operators that run again, in order."""

    saved: frozenset[int]
    released: frozenset[tuple[int, int]]
    forward_peak: int
    backward_peak: int
    retained: int
    seconds: float
    flops: int
    live: Array
    forward_live: Array
    first_use: Array
    last_use: Array
    recomputed: list[int]
    trace: _Trace

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak)

    def excess(self, target: int) -> int:
        """Bytes above ``target``, summed over all points of the step."""
        over = self.live - target
        ahead = self.forward_live - target
        return int(over[over > 0].sum()) + int(ahead[ahead > 0].sum())

    def waits(self) -> list[tuple[int, int, int, int]]:
        """(storage, slot, point, point) where one that was made again is held unread between two points,
        the first of them in the slot, the second in a later one."""
        trace = self.trace
        if not trace.births:
            return []
        count = len(trace.reads) + 1
        flat, points = _flat(trace.reads)
        births = np.array(trace.births, dtype=np.int64)
        again = np.zeros(len(self.first_use), dtype=bool)
        again[births] = True
        flat, points = flat[again[flat]], points[again[flat]]
        born = births * count + np.array(trace.birth_points, dtype=np.int64)
        # A birth comes before a read at its point.
        keys = np.concatenate((born * 2, (flat * count + points) * 2 + 1))
        keys.sort()
        places = keys // 2
        storages, at = places // count, places % count
        begins = np.array(trace.begins, dtype=np.int64)
        slots = np.searchsorted(begins, at, side="right") - 1
        waiting = (storages[1:] == storages[:-1]) & (slots[1:] > slots[:-1]) & (keys[1:] % 2 == 1)
        where = np.flatnonzero(waiting)
        return list(
            zip(
                storages[where].tolist(),
                slots[where].tolist(),
                at[where].tolist(),
                at[where + 1].tolist(),
                strict=True,
            )
        )

    def slot_of(self, point: int) -> int:
        """The slot that a point of the backward belongs to."""
        return bisect_right(self.trace.begins, point) - 1


class Evaluator:
    """Evaluates sets of saved storages on one model; holds the parts that never change."""

    def __init__(self, model: StepModel) -> None:
        self.model = model
        count = len(model.operators)
        self._size = np.array(model.size, dtype=np.int64)
        self._last_read = np.array(model.last_read, dtype=np.int64)
        self._maker = np.array(model.maker, dtype=np.int64)
        self._workspace = np.array(model.workspace, dtype=np.int64)
        self._only_saved = np.array(model.only_saved, dtype=bool)
        self._free = np.array(model.free, dtype=bool)
        self._count = count
        self._allocated = np.zeros(count + 2, dtype=np.int64)
        np.add.at(self._allocated, self._maker, self._size)

    def __call__(self, saved: Set[int], released: Set[tuple[int, int]] = frozenset()) -> Evaluation:
        """Evaluate storages handed over and (storage, slot) for each that is let go after a slot."""
        trace = _Trace()
        self._simulate(trace, saved, released)
        return self._judged(trace)

    def _simulate(self, trace: _Trace, saved: Set[int], released: Set[tuple[int, int]]) -> None:
        """Run every slot."""
        model = self.model
        size, maker, workspace = model.size, model.maker, model.workspace_again
        op_inputs, op_outputs, again, free = model.inputs, model.outputs, model.again, model.free
        reads, births, birth_points, drops = trace.reads, trace.births, trace.birth_points, trace.drops
        kept, recomputed, level = trace.kept, trace.recomputed, trace.level
        start: dict[int, int] = {}
        available: set[int] = set()
        leaving: dict[int, list[int]] = {}
        for b, number in released:
            leaving.setdefault(number, []).append(b)
        for number, slot in enumerate(model.slots):
            begin = len(reads)
            trace.begins.append(begin)
            stack = [b for b in reversed(slot.reads) if b not in available]
            while stack:
                b = stack[-1]
                if b in available:
                    stack.pop()
                    continue
                i = maker[b]
                if b in saved or free[b] or not again[i]:
                    available.add(b)
                    kept.append(b)
                    stack.pop()
                    continue
                missing = [x for x in op_inputs[i] if x not in available]
                if missing:
                    missing.reverse()
                    stack += missing
                    continue
                stack.pop()
                spare = 0
                for x in op_outputs[i]:
                    if x in available or x in saved or free[x]:
                        # What is there already stays; the second copy dies at once.
                        spare += size[x]
                        continue
                    available.add(x)
                    start[x] = len(reads)
                    births.append(x)
                    birth_points.append(len(reads))
                recomputed.append(i)
                reads.append(op_inputs[i])
                level.append(slot.before + workspace[i] + spare)
            reads.append(slot.reads)
            reads.append(())
            level.append(slot.during)
            level.append(slot.gap)
            if number in leaving:
                ends: dict[int, int] = {}
                for point in range(begin, len(reads)):
                    for x in reads[point]:
                        ends[x] = point
                for x in sorted(leaving[number]):
                    if x in start and (x in ends or start[x] >= begin):
                        birth = start.pop(x)
                        available.discard(x)
                        drops.append((x, birth, max(ends.get(x, birth), birth), number))
        trace.begins.append(len(reads))

    def _judged(self, trace: _Trace) -> Evaluation:
        """Bytes, seconds and FLOPs of a complete trace."""
        model, size = self.model, self._size
        # Points: one for each operator run again, two for each slot (its operator; the gap after).
        count = len(trace.reads)
        flat, points = _flat(trace.reads)
        last = np.zeros(len(size), dtype=np.int64)
        last[flat] = points
        first = np.full(len(size), -1, dtype=np.int64)
        first[flat[::-1]] = points[::-1]
        kept = np.array(trace.kept, dtype=np.int64)
        kept = kept[~self._free[kept]] if len(kept) else kept
        change = np.zeros(count + 2, dtype=np.int64)
        entry = int(size[kept].sum())
        np.subtract.at(change, last[kept] + 1, size[kept])
        born = np.array(trace.births, dtype=np.int64)
        begins = np.array(trace.birth_points, dtype=np.int64)
        if len(born):
            ends = np.maximum(last[born], begins)
            if trace.drops:
                early = {(b, birth): end for b, birth, end, _ in trace.drops}
                for position, key in enumerate(zip(trace.births, trace.birth_points, strict=True)):
                    if key in early:
                        ends[position] = early[key]
            np.add.at(change, begins, size[born])
            np.subtract.at(change, ends + 1, size[born])
        held = model.output_bytes
        live = np.cumsum(change[:count]) + (entry + held) + np.array(trace.level, dtype=np.int64)
        opening = entry + held + model.opening
        everything = frozenset(kept.tolist())
        forward_live = self._forward(kept)
        return Evaluation(
            everything,
            frozenset((b, slot) for b, _, _, slot in trace.drops),
            int(forward_live.max()) if self._count else 0,
            max(opening, int(live.max()) if count else 0),
            entry + held,
            sum(map(model.seconds.__getitem__, trace.recomputed)),
            sum(map(model.flops.__getitem__, trace.recomputed)),
            live,
            forward_live,
            first,
            last,
            trace.recomputed,
            trace,
        )

    def _forward(self, saved: Array) -> Array:
        """Live bytes while each forward operator runs."""
        count = self._count
        death = self._last_read.copy()
        death[saved] = count
        death[self._free] = count
        size, change = self._size, self._allocated.copy()
        if self._only_saved.any():
            made = ~self._only_saved
            made[saved] = True
            size = size * made
            change[:] = 0
            np.add.at(change, self._maker, size)
        np.subtract.at(change, death + 1, size)
        return np.cumsum(change[:count]) + self._workspace


def _flat(reads: Sequence[tuple[int, ...]]) -> tuple[Array, Array]:
    """Every read as (storage, point), by point."""
    lengths = np.fromiter(map(len, reads), np.int64, len(reads))
    storages = np.fromiter(chain.from_iterable(reads), np.int64, int(lengths.sum()))
    return storages, np.repeat(np.arange(len(reads), dtype=np.int64), lengths)
