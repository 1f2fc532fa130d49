"""What a set of saved storages costs: peak of both halves, added time, order of the backward.

A storage that is not saved is made again right before the first slot that needs it, along with
whatever it needs itself, and then held until its last use. A *fleeting* storage is held from the
first slot on that reads it; made earlier, as a step towards another one, it goes right away and is
made once more later (recursive checkpointing: Griewank and Walther 2000).

Evaluations are incremental: what happens before the first slot that a change touches is taken over
from the evaluation that was changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["Evaluation", "Evaluator"]

Array = npt.NDArray[np.int64]


@dataclass
class _Trace:
    """The backward as it was simulated, so that another evaluation can go on from any slot of it.

    ``reads[p]``: storages read at point p. ``births``: storages made and the points where;
    ``drops``: (storage, birth, end) of fleeting ones; ``kept``: storages handed over, in the order in
    which they are needed. ``marks[k]``: lengths of these and of ``recomputed`` as slot k begins, and
    its first point. ``touched``: the first slot that has to do with a storage.
    """

    reads: list[tuple[int, ...]]
    births: list[int]
    birth_points: list[int]
    drops: list[tuple[int, int, int]]
    kept: list[int]
    recomputed: list[int]
    level: list[int]
    marks: list[tuple[int, int, int, int, int]]
    touched: dict[int, int]


@dataclass
class Evaluation:
    """``saved``: every storage handed over, those forced by operators that cannot run again
    included. ``fleeting``: those that are not held before a slot reads them. ``live`` holds bytes at
    each point of the backward, ``forward_live`` at each operator of the forward. ``first_use[b]`` is
    the point of the backward at which a storage is first read, -1 for never; ``recomputed`` the
    operators that run again, in order."""

    saved: frozenset[int]
    fleeting: frozenset[int]
    forward_peak: int
    backward_peak: int
    retained: int
    seconds: float
    flops: int
    live: Array
    forward_live: Array
    first_use: Array
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

    def waits(self) -> list[tuple[int, int, int]]:
        """(storage, point, point) where one that was made as a step towards another waits unread
        between the points until a later slot."""
        trace = self.trace
        # A storage that was dropped and made again waits, if at all, after its last birth.
        begin = dict(zip(trace.births, trace.birth_points, strict=True))
        for b, birth, _ in trace.drops:
            if begin.get(b) == birth:
                del begin[b]
        if not begin:
            return []
        count = len(trace.reads) + 1
        storages = np.fromiter(begin, np.int64, len(begin))
        births = np.fromiter(begin.values(), np.int64, len(begin))
        # The slot itself reads at the last point but one before the next slot begins.
        ends = np.array([mark[4] - 2 for mark in trace.marks[1:]], dtype=np.int64)
        slot = ends[np.searchsorted(ends, births)]
        flat, points = _flat(trace.reads)
        keys = np.sort(flat * count + points)
        at = np.searchsorted(keys, storages * count + slot, side="right")
        after = keys[np.minimum(at, len(keys) - 1)]
        before = keys[np.maximum(at - 1, 0)]
        later = np.where((at < len(keys)) & (after // count == storages), after % count, -1)
        earlier = np.where((at > 0) & (before // count == storages), before % count, births)
        waiting = (later >= 0) & (earlier != slot)
        return list(
            zip(
                storages[waiting].tolist(),
                np.maximum(earlier, births)[waiting].tolist(),
                later[waiting].tolist(),
                strict=True,
            )
        )


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
        self.evaluations = 0

    def __call__(
        self,
        saved: frozenset[int] | set[int],
        fleeting: frozenset[int] | set[int] = frozenset(),
        base: Evaluation | None = None,
    ) -> Evaluation:
        """Evaluate; ``base`` is an evaluation on the same model that differs little."""
        self.evaluations += 1
        trace = self._resumed(saved, fleeting, base)
        self._simulate(trace, saved, fleeting)
        return self._judged(trace, fleeting)

    def _resumed(
        self, saved: frozenset[int] | set[int], fleeting: frozenset[int] | set[int], base: Evaluation | None
    ) -> _Trace:
        """What of ``base`` holds for the new sets as well."""
        if base is None:
            return _Trace([], [], [], [], [], [], [], [], {})
        old = base.trace
        end = len(self.model.slots)
        changed = (saved ^ base.saved) | (fleeting ^ base.fleeting)
        slot = min((old.touched.get(b, end) for b in changed), default=end)
        births, drops, kept, again, point = old.marks[slot]
        return _Trace(
            old.reads[:point], old.births[:births], old.birth_points[:births], old.drops[:drops],
            old.kept[:kept], old.recomputed[:again], old.level[:point], old.marks[:slot],
            {b: k for b, k in old.touched.items() if k < slot},
        )  # fmt: skip

    def _simulate(
        self, trace: _Trace, saved: frozenset[int] | set[int], fleeting: frozenset[int] | set[int]
    ) -> None:
        """Run the slots that ``trace`` lacks."""
        model = self.model
        size, maker, workspace = model.size, model.maker, model.workspace_again
        op_inputs, op_outputs, again, free = model.inputs, model.outputs, model.again, model.free
        reads, births, birth_points, drops = trace.reads, trace.births, trace.birth_points, trace.drops
        kept, recomputed, level, marks, touched = (
            trace.kept, trace.recomputed, trace.level, trace.marks, trace.touched,
        )  # fmt: skip
        start = dict(zip(births, birth_points, strict=True))
        for b, birth, _ in drops:
            if start.get(b) == birth:
                del start[b]
        available = {*kept, *start}
        for number in range(len(marks), len(model.slots)):
            slot = model.slots[number]
            begin = len(reads)
            marks.append((len(births), len(drops), len(kept), len(recomputed), begin))
            made: list[int] = []
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
                    touched.setdefault(b, number)
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
                        if x not in available:
                            kept.append(x)
                            available.add(x)
                            touched.setdefault(x, number)
                        continue
                    available.add(x)
                    made.append(x)
                    births.append(x)
                    birth_points.append(len(reads))
                    touched.setdefault(x, number)
                recomputed.append(i)
                reads.append(op_inputs[i])
                level.append(slot.before + workspace[i] + spare)
            reads.append(slot.reads)
            reads.append(())
            level.append(slot.during)
            level.append(slot.gap)
            passing = [x for x in made if x in fleeting and x not in slot.reads] if fleeting else ()
            if passing:
                ends: dict[int, int] = {}
                for point in range(begin, len(reads) - 2):
                    for x in reads[point]:
                        ends[x] = point
                origin = dict(zip(births[-len(made) :], birth_points[-len(made) :], strict=True))
                for x in passing:
                    available.discard(x)
                    drops.append((x, origin[x], max(ends.get(x, -1), origin[x])))
        marks.append((len(births), len(drops), len(kept), len(recomputed), len(reads)))

    def _judged(self, trace: _Trace, fleeting: frozenset[int] | set[int]) -> Evaluation:
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
                early = {(b, birth): end for b, birth, end in trace.drops}
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
            frozenset(fleeting),
            int(forward_live.max()) if self._count else 0,
            max(opening, int(live.max()) if count else 0),
            entry + held,
            sum(map(model.seconds.__getitem__, trace.recomputed)),
            sum(map(model.flops.__getitem__, trace.recomputed)),
            live,
            forward_live,
            first,
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
