"""A plan that is changed in small steps, its cost kept up to date: a storage given up or saved, a release
added or taken away.

Only the slots that a change reaches are simulated again, and bytes are changed only where a storage is
held for longer or shorter than before. Where the slots begin and how long they are does not matter:
within a slot positions are counted from its start. ``evaluate.Evaluator``, written apart, is the measure:
both give the same bytes, seconds and order.

The most held is an array of three cells for each slot: while operators run again, while the slot's own
operator runs, until the next slot. A storage adds its size to a range of cells, so that a change is a
few additions to contiguous memory and the peak one maximum (microseconds for thousands of slots). Only of
the first cell the inside matters: what is made or dies there.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["CELLS", "Incremental", "Snapshot"]

Array = npt.NDArray[np.int64]

CELLS = 3
"""Cells of each slot."""

_UNIT = 2.0**-60
"""Prices and seconds are summed as whole numbers of this: sums then do not depend on the order of changes."""


@dataclass(frozen=True)
class Snapshot:
    """One plan and what it costs.

    ``saved``: every storage handed over; ``released``: (storage, slot) for each that is let go after a
    slot; ``again``: how many operators run again, with their price, predicted seconds and FLOPs.
    """

    saved: frozenset[int]
    released: frozenset[tuple[int, int]]
    forward_peak: int
    backward_peak: int
    retained: int
    price: float
    seconds: float
    flops: int
    again: int

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak)


@dataclass(frozen=True)
class _Slot:
    """How one slot runs: ``operators`` that run again, ``born``: position at which each storage is made,
    ``last``: position of the last read (or the making) of each, ``level``: bytes held by others while each
    of them runs, ``spare``: storages of which a second copy is made."""

    operators: tuple[int, ...]
    born: dict[int, int]
    last: dict[int, int]
    level: tuple[int, ...]
    spare: tuple[int, ...]


@dataclass
class _Log:
    """What one change replaced, to take it back."""

    slots: dict[int, _Slot] = field(default_factory=dict)
    uses: dict[int, tuple[list[int], list[int], list[int], bool]] = field(default_factory=dict)
    spares: dict[int, list[int]] = field(default_factory=dict)
    leaving: dict[int, frozenset[int]] = field(default_factory=dict)
    kept: dict[int, bool] = field(default_factory=dict)
    inner: dict[int, int] = field(default_factory=dict)
    live: list[tuple[int, int, int]] = field(default_factory=list)
    entry: int = 0


_EMPTY = _Slot((), {}, {}, (), ())
_NONE: frozenset[int] = frozenset()


class Incremental:
    """The plan at hand. ``change`` changes it; ``undo`` takes changes back, down to a ``mark``; ``settle``
    forgets how.

    ``uses[b]``: slots in which storage b is read or made again, ascending; ``births[b]``: those in which it
    is made again; ``drops[b]``: those after which it is let go. ``held[b]``: whether it is there without
    being made again. ``kept``: what the forward hands over, ``is_kept[b]`` likewise. ``first_use[b]``: the
    first of ``uses``, -1 for none. ``waits[b]``: (b, cell, slot) from which up to which one that was made
    again is held unread. ``live``: the most held in each cell, graph outputs left out, and
    ``forward_live[i]`` while operator i of the forward runs, in bytes. ``weights``: how many operators a
    cell stands for. ``runs[i]``: how often operator i runs again. ``loose[b]``: after how many slots b is
    let go. ``touched``: storages of which any of this has changed, until whoever reads it clears it.

    ``prices``: what counts of each operator that runs again, by default its predicted seconds.
    """

    def __init__(self, model: StepModel, prices: Sequence[float] | None = None) -> None:
        self.model = model
        self.prices = model.seconds if prices is None else prices
        count, slots = len(model.size), len(model.slots)
        self._forced = [model.free[b] or not model.again[model.maker[b]] for b in range(count)]
        self._reads = [slot.reads for slot in model.slots]
        self._read_by = [frozenset(slot.reads) for slot in model.slots]
        self._prices = [round(price / _UNIT) for price in self.prices]
        self._seconds = [round(seconds / _UNIT) for seconds in model.seconds]
        self._only_saved = model.only_saved
        self.held = list(self._forced)
        self.uses: list[list[int]] = [[] for _ in range(count)]
        self.births: list[list[int]] = [[] for _ in range(count)]
        self.drops: list[list[int]] = [[] for _ in range(count)]
        self._spares: dict[int, list[int]] = {}
        self.leaving: dict[int, frozenset[int]] = {}
        self.kept: set[int] = set()
        self.is_kept = np.zeros(count, dtype=bool)
        self.first_use: Array = np.full(count, -1, dtype=np.int64)
        self.waits: dict[int, list[tuple[int, int, int]]] = {}
        self._slots = [_EMPTY] * slots
        levels = [level for slot in model.slots for level in (0, slot.during, slot.gap)]
        self.live: Array = np.array(levels, dtype=np.int64)
        self._inner = [0] * slots
        self.runs: Array = np.zeros(len(model.operators), dtype=np.int64)
        self.loose: dict[int, int] = {}
        self.touched: set[int] = set()
        self.weights: Array = np.ones(CELLS * slots, dtype=np.int64)
        self.forward_live = self._forward()
        self._entry = self._price = self._time = self._flops = self._again = 0
        self._log = _Log()
        self._logs: list[_Log] = []
        self.changes = 0
        self._run(range(slots))

    def _forward(self) -> Array:
        """Bytes while each operator of the forward runs, nothing handed over."""
        model = self.model
        count = len(model.operators)
        change = np.zeros(count + 2, dtype=np.int64)
        for b, size in enumerate(model.size):
            if not model.only_saved[b] or model.free[b]:
                change[model.maker[b]] += size
                change[(count if model.free[b] else model.last_read[b]) + 1] -= size
        live: Array = np.cumsum(change[:count]) + np.array(model.workspace, dtype=np.int64)
        return live

    @property
    def forward_peak(self) -> int:
        return int(self.forward_live.max()) if len(self.forward_live) else 0

    @property
    def backward_peak(self) -> int:
        opening = self._entry + self.model.opening
        return self.model.output_bytes + max(opening, int(self.live.max()) if len(self.live) else 0)

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak)

    @property
    def retained(self) -> int:
        """Bytes handed over from the forward."""
        return self._entry + self.model.output_bytes

    @property
    def price(self) -> float:
        """Of all that runs again."""
        return self._price * _UNIT

    @property
    def released(self) -> frozenset[tuple[int, int]]:
        return frozenset((b, slot) for slot, found in self.leaving.items() for b in found)

    def positions(self, slot: int) -> tuple[dict[int, int], dict[int, int], int]:
        """Positions of the first and the last operator that runs again in a slot and reads a storage, and how
        many operators do; the last may be the slot's own, or the one that makes the storage."""
        record = self._slots[slot]
        first: dict[int, int] = {}
        for position, i in enumerate(record.operators):
            for b in self.model.inputs[i]:
                first.setdefault(b, position)
        return first, record.last, len(record.operators)

    def recomputed(self) -> list[int]:
        """The operators that run again, in order."""
        return [i for slot in self._slots for i in slot.operators]

    def excess(self, target: int) -> int:
        """Bytes above ``target``, summed over the cells of the backward and the operators of the forward."""
        over = self.live - (target - self.model.output_bytes)
        ahead = self.forward_live - target
        return int(np.maximum(over, 0, out=over) @ self.weights) + int(np.maximum(ahead, 0, out=ahead).sum())

    def snapshot(self) -> Snapshot:
        return Snapshot(
            frozenset(self.kept),
            self.released,
            self.forward_peak,
            self.backward_peak,
            self.retained,
            self.price,
            self._time * _UNIT,
            self._flops,
            self._again,
        )

    def load(self, saved: Set[int], released: Set[tuple[int, int]] = frozenset()) -> None:
        """Become another plan."""
        present = self.released
        self.change(
            give=[b for b, held in enumerate(self.held) if held and b not in saved],
            save=[b for b in saved if b not in self.kept],
            release=released - present,
            hold=present - released,
        )

    def change(
        self,
        *,
        give: Iterable[int] = (),
        save: Iterable[int] = (),
        release: Iterable[tuple[int, int]] = (),
        hold: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Storages no longer, or from now on, handed over; releases (storage, slot) added and removed.

        What has no effect (a storage that nothing reads, a release of what is not there) is left out.
        """
        self.changes += 1
        self._log = _Log(entry=self._entry)
        self._logs.append(self._log)
        first: set[int] = set()
        for b in give:
            if self._forced[b] or not self.held[b]:
                continue
            self._touch(b)
            self.held[b] = False
            first.update(self.uses[b][:1])
            first.update(self._spares.get(b, ())[:1])
        for b in save:
            if self.held[b]:
                continue
            self._touch(b)
            self.held[b] = True
            first.update(self.births[b])
            first.update(self.drops[b])
        for b, slot in release:
            self._leave(slot, self.leaving.get(slot, _NONE) | {b})
            first.add(slot)
        for b, slot in hold:
            self._leave(slot, self.leaving.get(slot, _NONE) - {b})
            first.add(slot)
        self._run(first)

    def mark(self) -> int:
        """What ``undo`` takes to come back to the present plan."""
        return len(self._logs)

    def settle(self) -> None:
        """Let marks go: the changes up to here stay."""
        self._logs.clear()

    def undo(self, mark: int) -> None:
        """Take back every change since ``mark``."""
        while len(self._logs) > mark:
            self._take_back(self._logs.pop())

    def _take_back(self, log: _Log) -> None:
        self.touched.update(log.uses)
        for slot, record in log.slots.items():
            self._count(self._slots[slot].operators, -1)
            self._count(record.operators, 1)
            self._slots[slot] = record
            self.weights[CELLS * slot] = max(len(record.operators), 1)
        for b, (uses, births, drops, held) in log.uses.items():
            self.uses[b], self.births[b], self.drops[b], self.held[b] = uses, births, drops, held
            self._index(b)
        self._spares.update(log.spares)
        for slot, found in log.leaving.items():
            self._leave_at(slot, found)
        for b, kept in log.kept.items():
            self._keep(b, kept)
        live = self.live
        for begin, end, size in log.live:
            live[begin:end] -= size
        for slot, inner in log.inner.items():
            live[CELLS * slot] += inner - self._inner[slot]
            self._inner[slot] = inner
        self._entry = log.entry

    def _leave(self, slot: int, found: frozenset[int]) -> None:
        self._log.leaving.setdefault(slot, self.leaving.get(slot, _NONE))
        self._leave_at(slot, found)

    def _leave_at(self, slot: int, found: frozenset[int]) -> None:
        loose, old = self.loose, self.leaving.get(slot, _NONE)
        for b in found ^ old:
            loose[b] = loose.get(b, 0) + (1 if b in found else -1)
            if not loose[b]:
                del loose[b]
            self.touched.add(b)
        if found:
            self.leaving[slot] = found
        else:
            self.leaving.pop(slot, None)

    def _touch(self, b: int) -> None:
        """Note how long a storage is held, before that changes."""
        if b not in self._log.uses:
            self.touched.add(b)
            self._log.uses[b] = self.uses[b], self.births[b], self.drops[b], self.held[b]
            self.uses[b], self.births[b], self.drops[b] = (
                self.uses[b][:], self.births[b][:], self.drops[b][:],
            )  # fmt: skip

    def _run(self, first: Iterable[int]) -> None:
        """Simulate slots again, and those after them that notice; then count bytes."""
        queue = sorted(first)
        waiting = set(queue)
        dirty: set[int] = set()
        while queue:
            slot = heapq.heappop(queue)
            for later in self._replace(slot, self._simulated(slot), dirty):
                if later not in waiting:
                    waiting.add(later)
                    heapq.heappush(queue, later)
        self._recount(dirty)

    def _simulated(self, number: int) -> _Slot:
        """Slot ``number`` with what is there as it begins."""
        reads = self._reads[number]
        held, births, drops = self.held, self.births, self.drops
        missing = [
            b
            for b in reads
            if not held[b]
            and (
                not (made := births[b])
                or made[0] >= number
                or (
                    (gone := drops[b])
                    and gone[0] < number
                    and bisect_left(made, number) <= bisect_left(gone, number)
                )
            )
        ]
        slot = self.model.slots[number]
        if not missing:
            return _Slot((), {}, dict.fromkeys(reads, 0), (), ())
        model = self.model
        maker, op_inputs, op_outputs, size = model.maker, model.inputs, model.outputs, model.size
        workspace, before = model.workspace_again, slot.before
        operators: list[int] = []
        born: dict[int, int] = {}
        last: dict[int, int] = {}
        level: list[int] = []
        spare: list[int] = []
        missing.reverse()
        stack = missing
        while stack:
            b = stack[-1]
            if b in born:
                stack.pop()
                continue
            i = maker[b]
            inputs = op_inputs[i]
            more = [
                x
                for x in inputs
                if not held[x]
                and x not in born
                and (
                    not (made := births[x])
                    or made[0] >= number
                    or (
                        (gone := drops[x])
                        and gone[0] < number
                        and bisect_left(made, number) <= bisect_left(gone, number)
                    )
                )
            ]
            if more:
                more.reverse()
                stack += more
                continue
            stack.pop()
            position = len(operators)
            extra = 0
            for x in inputs:
                last[x] = position
            for x in op_outputs[i]:
                if x in born or held[x] or self._there(x, number):
                    # What is there already stays; the second copy dies at once.
                    extra += size[x]
                    spare.append(x)
                else:
                    born[x] = last[x] = position
            operators.append(i)
            level.append(before + workspace[i] + extra)
        position = len(operators)
        for x in reads:
            last[x] = position
        return _Slot(tuple(operators), born, last, tuple(level), tuple(spare))

    def _there(self, b: int, slot: int) -> bool:
        """Whether a storage that is made again is there as a slot begins."""
        return bisect_left(self.births[b], slot) > bisect_left(self.drops[b], slot)

    def _replace(self, slot: int, new: _Slot, dirty: set[int]) -> list[int]:
        """Let a slot run as ``new``; the next slots that notice."""
        old = self._slots[slot]
        leaving = self.leaving.get(slot)
        if new == old and leaving is None and slot not in self._log.leaving:
            return []
        dirty.add(slot)
        self._log.slots[slot] = old
        self._slots[slot] = new
        self.weights[CELLS * slot] = max(len(new.operators), 1)
        if new.operators != old.operators:
            self._count(old.operators, -1)
            self._count(new.operators, 1)
        if new.spare != old.spare:
            for x in {*old.spare, *new.spare}:
                self._log.spares.setdefault(x, self._spares.get(x, [])[:])
                found = self._spares.setdefault(x, [])
                if x in old.spare:
                    found.remove(slot)
                if x in new.spare:
                    insort(found, slot)
        # Whatever is no longer, or now, there as the slot ends changes the next slot that needs it.
        touch, uses, held = self._touch, self.uses, self.held
        absent = [x for x in old.last if x not in new.last]
        for x in absent:
            touch(x)
            uses[x].remove(slot)
        for x in new.last:
            if x not in old.last:
                touch(x)
                insort(uses[x], slot)
        notice = [x for x in new.born if x not in old.last]
        for x in old.born.keys() ^ new.born.keys():
            touch(x)
            if x in new.born:
                insort(self.births[x], slot)
            else:
                self.births[x].remove(slot)
        gone = _NONE
        if leaving is not None:
            # Released is what was made again and had to do with this slot.
            gone = frozenset(x for x in leaving if not held[x] and x in new.last)
            if gone != leaving:
                self._leave(slot, gone)
        drops = self.drops
        if leaving is not None or slot in self._log.leaving or absent:
            for x in {x for x in (*old.last, *new.last) if (slot in drops[x]) != (x in gone)}:
                touch(x)
                if x in gone:
                    insort(drops[x], slot)
                else:
                    drops[x].remove(slot)
                notice.append(x)
        there = self._there
        notice += [x for x in (*absent, *old.spare) if not held[x] and not there(x, slot + 1)]
        return [later for x in notice for later in self._next(x, slot)]

    def _count(self, operators: tuple[int, ...], sign: int) -> None:
        if operators:
            self.runs[list(operators)] += sign
            self._price += sign * sum(map(self._prices.__getitem__, operators))
            self._time += sign * sum(map(self._seconds.__getitem__, operators))
            self._flops += sign * sum(map(self.model.flops.__getitem__, operators))
            self._again += sign * len(operators)

    def _next(self, b: int, slot: int) -> list[int]:
        """The first slot after ``slot`` that reads or makes a storage, and the first that makes a copy."""
        found = []
        for slots in (self.uses[b], self._spares.get(b, ())):
            at = bisect_right(slots, slot)
            if at < len(slots):
                found.append(slots[at])
        return found

    def _recount(self, dirty: set[int]) -> None:
        """Bring bytes up to date with what the log says was touched."""
        log, size, free = self._log, self.model.size, self.model.free
        live, ranges = self.live, log.live
        for b, (uses, births, drops, held) in log.uses.items():
            if free[b]:
                self._index(b)
                continue
            now_uses, now_births, now_drops = self.uses[b], self.births[b], self.drops[b]
            if self.held[b] != (b in self.kept) or not now_uses:
                self._set_kept(b, self.held[b] and bool(now_uses))
                if not now_uses and not self._forced[b] and not self._spares.get(b):
                    self.held[b] = False
            self._index(b)
            old = self._spans(b, uses, births, drops, held)
            new = self._spans(b, now_uses, now_births, now_drops, self.held[b])
            if old == new:
                continue
            amount = size[b]
            if len(old) == len(new) == 1:
                (begin, end), (now_begin, now_end) = old[0], new[0]
                pieces = [(now_begin, begin, amount), (end, now_end, amount)]
            else:
                pieces = [(*span, -amount) for span in old] + [(*span, amount) for span in new]
            for begin, end, signed in pieces:
                if begin > end:
                    begin, end, signed = end, begin, -signed
                if begin < end:
                    live[begin:end] += signed
                    ranges.append((begin, end, signed))
            dirty.update([end // CELLS for _, end in old], [end // CELLS for _, end in new])
        inner = self._inner
        for slot in dirty:
            now = self._most(slot)
            if now != inner[slot]:
                log.inner.setdefault(slot, inner[slot])
                live[CELLS * slot] += now - inner[slot]
                inner[slot] = now

    def _spans(
        self, b: int, uses: list[int], births: list[int], drops: list[int], held: bool
    ) -> list[tuple[int, int]]:
        """(cell, cell) from which up to which, the last left out, a storage is held throughout.

        Made or last read by an operator that runs again, it is not held in all of that cell: one that is
        made is not counted in it, one that dies there is.
        """
        if not uses:
            return []
        read_by, last = self._read_by, uses[-1]
        end = CELLS * last + (2 if b in read_by[last] else 1)
        if held:
            return [(0, end)]
        if not drops:
            return [(CELLS * births[0] + 1, end)]
        ends = [CELLS * slot + (2 if b in read_by[slot] else 1) for slot in drops]
        return [(CELLS * slot + 1, stop) for slot, stop in zip(births, [*ends, end], strict=False)]

    def _index(self, b: int) -> None:
        """Bring what is kept beside ``uses`` up to date."""
        uses, births = self.uses[b], self.births[b]
        self.first_use[b] = uses[0] if uses else -1
        if births and uses[-1] > uses[0]:
            drops = self.drops[b]
            self.waits[b] = [
                (b, CELLS * slot + (2 if b in self._read_by[slot] else 1), later)
                for slot, later in pairwise(uses)
                if slot not in drops and slot >= births[0]
            ]
        else:
            self.waits.pop(b, None)

    def _set_kept(self, b: int, kept: bool) -> None:
        if kept != (b in self.kept):
            self._log.kept.setdefault(b, not kept)
            self._entry += self.model.size[b] if kept else -self.model.size[b]
            self._keep(b, kept)

    def _keep(self, b: int, kept: bool) -> None:
        if kept == (b in self.kept):
            return
        model = self.model
        amount = model.size[b] if kept else -model.size[b]
        begin = model.maker[b] if model.only_saved[b] else model.last_read[b] + 1
        self.forward_live[begin:] += amount
        self.is_kept[b] = kept
        if kept:
            self.kept.add(b)
        else:
            self.kept.discard(b)

    def _most(self, number: int) -> int:
        """The most held while operators run again in a slot, above what is there as it begins."""
        slot = self._slots[number]
        if not slot.operators:
            return 0
        size, free, uses, drops = self.model.size, self.model.free, self.uses, self.drops
        reads, level = self._read_by[number], slot.level
        change = [0] * (len(level) + 1)
        for x, position in slot.born.items():
            change[position] += size[x]
        for x, position in slot.last.items():
            if x not in reads and not free[x] and (uses[x][-1] == number or number in drops[x]):
                change[position + 1] -= size[x]
        most = held = 0
        for amount, others in zip(change, level, strict=False):
            held += amount
            if held + others > most:
                most = held + others
        return most
