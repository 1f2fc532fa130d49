"""What a set of saved storages costs: peak of both halves, added time, order of the backward.

A storage that is not saved is made again right before the first slot that needs it, along with
whatever it needs itself, and then held until its last use. A *fleeting* storage is held from the
first slot on that reads it; made earlier, as a step towards another one, it goes right away and is
made once more later (recursive checkpointing: Griewank and Walther 2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["Evaluation", "Evaluator"]


@dataclass
class Evaluation:
    """``saved``: every storage handed over, those forced by operators that cannot run again
    included. ``fleeting``: those that are not held before a slot reads them. ``live`` holds bytes at
    each point of the backward, ``forward_live`` at each operator of the forward. ``first_use`` gives
    the point of the backward at which a storage is first read, ``recomputed`` the operators that
    run again, in order. ``waits`` lists (storage, point, point) where a storage made as a step
    towards another one waits unread between the points."""

    saved: frozenset[int]
    fleeting: frozenset[int]
    forward_peak: int
    backward_peak: int
    retained: int
    seconds: float
    flops: int
    live: npt.NDArray[np.int64]
    forward_live: npt.NDArray[np.int64]
    first_use: dict[int, int]
    recomputed: list[int]
    waits: list[tuple[int, int, int]]

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak)

    def excess(self, target: int) -> int:
        """Bytes above ``target``, summed over all points of the step."""
        over = self.live - target
        ahead = self.forward_live - target
        return int(over[over > 0].sum()) + int(ahead[ahead > 0].sum())


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
        self.evaluations = 0

    def __call__(
        self, saved: frozenset[int] | set[int], fleeting: frozenset[int] | set[int] = frozenset()
    ) -> Evaluation:
        self.evaluations += 1
        model = self.model
        size, maker = model.size, model.maker
        op_inputs, op_outputs, again, free = model.inputs, model.outputs, model.again, model.free
        available: set[int] = set()
        start: dict[int, int] = {}
        spans: list[tuple[int, int, int]] = []
        waiting: dict[int, int] = {}
        waits: list[tuple[int, int, int]] = []
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        kept: set[int] = set()
        recomputed: list[int] = []
        level: list[int] = []
        point = 0

        for slot in model.slots:
            stack = [b for b in reversed(slot.reads) if b not in available]
            made: list[int] = []
            while stack:
                b = stack[-1]
                if b in available:
                    stack.pop()
                    continue
                i = maker[b]
                if b in saved or free[b] or not again[i]:
                    available.add(b)
                    kept.add(b)
                    stack.pop()
                    continue
                missing = [x for x in op_inputs[i] if x not in available]
                if missing:
                    stack.extend(reversed(missing))
                    continue
                stack.pop()
                recomputed.append(i)
                for x in op_inputs[i]:
                    last[x] = point
                    first.setdefault(x, point)
                    if x in waiting:
                        waits.append((x, waiting.pop(x), point))
                spare = 0
                for x in op_outputs[i]:
                    if x in available or x in saved or free[x]:
                        # What is there already stays; the second copy dies at once.
                        spare += size[x]
                        if x not in available:
                            kept.add(x)
                            available.add(x)
                        continue
                    available.add(x)
                    made.append(x)
                    start[x] = last[x] = point
                level.append(slot.before + model.workspace_again[i] + spare)
                point += 1
            for b in slot.reads:
                last[b] = point
                first.setdefault(b, point)
                if b in waiting:
                    waits.append((b, waiting.pop(b), point))
            level.append(slot.during)
            level.append(slot.gap)
            point += 2
            for x in made:
                if last[x] == point - 2:
                    continue
                if x in fleeting:
                    available.discard(x)
                    spans.append((x, start.pop(x), last[x]))
                else:
                    waiting[x] = last[x]
        # Points: one for each operator run again, two for each slot (its operator; the gap after).
        change = np.zeros(point + 2, dtype=np.int64)
        held = model.output_bytes
        entry = 0
        for b in kept:
            if free[b]:
                continue
            entry += size[b]
            change[last.get(b, 0) + 1] -= size[b]
        spans.extend((b, begin, last[b]) for b, begin in start.items())
        for b, begin, end in spans:
            change[begin] += size[b]
            change[end + 1] -= size[b]
        live = np.cumsum(change[:point]) + (entry + held) + np.array(level, dtype=np.int64)
        opening = entry + held + model.opening
        backward_peak = max(opening, int(live.max()) if point else 0)
        everything = frozenset(b for b in kept if not free[b])
        forward_live = self._forward(everything)
        return Evaluation(
            everything,
            frozenset(fleeting),
            int(forward_live.max()) if self._count else 0,
            backward_peak,
            entry + held,
            sum(model.seconds[i] for i in recomputed),
            sum(model.flops[i] for i in recomputed),
            live,
            forward_live,
            first,
            recomputed,
            waits,
        )

    def _forward(self, saved: frozenset[int]) -> npt.NDArray[np.int64]:
        """Live bytes while each forward operator runs."""
        count = self._count
        death = self._last_read.copy()
        if saved:
            death[list(saved)] = count
        death[self._free] = count
        change = np.zeros(count + 2, dtype=np.int64)
        size = self._size
        if self._only_saved.any():
            made = ~self._only_saved
            made[list(saved)] = True
            size = size * made
        np.add.at(change, self._maker, size)
        np.add.at(change, death + 1, -size)
        return np.cumsum(change[:count]) + self._workspace
