"""What may be given up next, and what it takes: bytes above a target removed for the price."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain

import numpy as np
import numpy.typing as npt

from graphopt_passes.insert_checkpoints.incremental import CELLS, Incremental

__all__ = ["NEGLIGIBLE", "Key", "Kind", "Move", "Moves"]

Array = npt.NDArray[np.int64]

NEGLIGIBLE = 1e-7
"""Seconds (or the share of FLOPs) below which prices do not count."""


class Kind(IntEnum):
    """GIVE_UP: make a storage again; what its chain makes ahead of time waits. APART: likewise, and
    make the chain for it alone. RELEASE: let go of one that waits for its next reader."""

    GIVE_UP = 0
    APART = 1
    RELEASE = 2


Key = tuple[int, Kind, int]


@dataclass(frozen=True)
class Move:
    """``gain``: bytes above the target that it removes; ``released``: what goes after which slot."""

    storage: int
    kind: Kind
    slot: int
    gain: int
    released: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> Key:
        return self.storage, self.kind, self.slot


class Moves:
    """Finds moves on the plan at hand. ``repeat``: whether a storage may be made again more than once.

    What it takes to make a storage again is worked out when it is first asked for, and again once something
    that it depends on has changed.
    """

    def __init__(self, plan: Incremental, repeat: bool) -> None:
        self._plan, self._repeat = plan, repeat
        model = plan.model
        self._size = np.array(model.size, dtype=np.int64)
        # New values of mutated inputs are read behind the last operator.
        self._after = np.minimum(np.array(model.last_read, dtype=np.int64) + 1, len(model.operators))
        self._again = np.array([model.again[i] for i in model.maker], dtype=bool)
        # What it takes to give a storage up, or to let go of it: the operator's own price until that of all
        # that has to run with it is known, then the price for each byte removed when last worked out.
        self._own = np.array([plan.prices[i] for i in model.maker]) + NEGLIGIBLE
        self._giving, self._letting = self._own.copy(), self._own.copy()
        self._chains: dict[tuple[int, int], _Chain] = {}
        self._readers: dict[int, set[tuple[int, int]]] = {}

    def best(self, target: int, refused: Set[Key]) -> Iterator[Move]:
        """Moves by falling rate.

        Only what may come next is priced in full, by what it took when it was last looked at.
        """
        plan, model = self._plan, self._plan.model
        self._forget()
        high = plan.live > target - model.output_bytes
        over = _counted(high * plan.weights)
        ahead = _counted(plan.forward_live > target)
        inside = _Inside(plan, np.flatnonzero(high[::CELLS]).tolist())
        saved = np.flatnonzero(plan.is_kept & self._again)
        # Above the target until it is first read, and in the forward after its last use there.
        uses = plan.first_use[saved]
        points = over[CELLS * uses] + inside.before(saved, uses) + ahead[-1] - ahead[self._after[saved]]
        gains = self._size[saved] * points
        saved, gains = saved[gains > 0], gains[gains > 0]
        waiting = np.zeros((0, 3), dtype=np.int64)
        if self._repeat and plan.waits:
            flat = list(chain.from_iterable(chain.from_iterable(plan.waits.values())))
            waiting = np.array(flat, dtype=np.int64).reshape(-1, 3)
        storages, begins, ends = waiting.T
        between = over[CELLS * ends] - over[begins]
        between += inside.after(storages, begins // CELLS) + inside.before(storages, ends)
        waiting, between = waiting[between > 0], between[between > 0]
        storages = waiting[:, 0]
        freed = self._size[storages] * between
        rates = np.concatenate((gains / self._giving[saved], freed / self._letting[storages]))
        # Entries: rate, number, move. What is not priced yet is still to come.
        heap: list[tuple[float, int, Move]] = []
        count = 0
        coming = _falling(rates)
        index = next(coming, -1)
        while heap or index >= 0:
            while index >= 0 and (not heap or -rates[index] <= heap[0][0]):
                if index < len(saved):
                    found = self._given_up(int(saved[index]), int(gains[index]), over)
                else:
                    row = index - len(saved)
                    b, cell, later = waiting[row].tolist()
                    found = self._let_go(b, cell // CELLS, later, int(freed[row]))
                for rate, move in found:
                    if move.key not in refused:
                        count += 1
                        heapq.heappush(heap, (-rate, count, move))
                index = next(coming, -1)
            if heap:
                yield heapq.heappop(heap)[2]

    def _forget(self) -> None:
        """Chains that depend on what has changed."""
        touched, readers, chains = self._plan.touched, self._readers, self._chains
        for x in touched:
            for key in readers.pop(x, ()):
                if chains.pop(key, None) is not None:
                    self._giving[key[0]] = self._letting[key[0]] = self._own[key[0]]
        touched.clear()

    def _chain(self, b: int, use: int) -> _Chain:
        key = (b, use)
        found = self._chains.get(key)
        if found is None:
            found, looked_at = _chain(self._plan, b, use)
            self._chains[key] = found
            for x in looked_at:
                self._readers.setdefault(x, set()).add(key)
        return found

    def _given_up(self, b: int, gain: int, over: Array) -> list[tuple[float, Move]]:
        size = self._plan.model.size
        needed = self._chain(b, self._plan.uses[b][0])
        waits = sum([size[x] * int(over[end] - over[begin]) for x, begin, end in needed.waits])
        found = []
        if gain > waits:
            move = Move(b, Kind.GIVE_UP, 0, gain - waits)
            found.append(((gain - waits) / (needed.shared + NEGLIGIBLE), move))
        if waits and self._repeat:
            move = Move(b, Kind.APART, 0, gain, needed.released)
            found.append((gain / (needed.alone + NEGLIGIBLE), move))
        self._giving[b] = gain / max((rate for rate, _ in found), default=NEGLIGIBLE)
        return found

    def _let_go(self, b: int, slot: int, later: int, gain: int) -> list[tuple[float, Move]]:
        needed = self._chain(b, later)
        self._letting[b] = needed.alone + NEGLIGIBLE
        released = ((b, slot), *needed.released)
        return [(gain / (needed.alone + NEGLIGIBLE), Move(b, Kind.RELEASE, slot, gain, released))]


def _falling(rates: npt.NDArray[np.float64]) -> Iterator[int]:
    """Positions by falling rate, equal ones in order; few are asked for, so few are sorted at first."""
    few = 64
    if len(rates) > 4 * few:
        limit = np.partition(rates, -few)[-few]
        first = np.flatnonzero(rates > limit)
        yield from first[np.argsort(-rates[first], kind="stable")].tolist()
        rest = np.flatnonzero(rates <= limit)
        yield from rest[np.argsort(-rates[rest], kind="stable")].tolist()
    else:
        yield from np.argsort(-rates, kind="stable").tolist()


class _Inside:
    """How many operators that run again within slots are above the target, around the reads of storages.

    ``slots``: those that are above it while operators run again; each operator there counts.
    """

    def __init__(self, plan: Incremental, slots: Sequence[int]) -> None:
        self._plan = plan
        self._marked = np.zeros(len(plan.live) // CELLS, dtype=bool)
        self._marked[slots] = True
        self._positions: dict[int, tuple[dict[int, int], dict[int, int], int]] = {}

    def before(self, storages: Array, slots: Array) -> Array:
        """Those before the first that reads each storage in its slot."""
        return self._count(storages, slots, lambda b, first, last, count: first.get(b, count))

    def after(self, storages: Array, slots: Array) -> Array:
        """Those after the last that reads or makes each storage in its slot."""
        return self._count(storages, slots, lambda b, first, last, count: max(count - 1 - last[b], 0))

    def _count(
        self,
        storages: Array,
        slots: Array,
        number: Callable[[int, dict[int, int], dict[int, int], int], int],
    ) -> Array:
        found = np.zeros(len(storages), dtype=np.int64)
        for k in np.flatnonzero(self._marked[slots]).tolist():
            slot = int(slots[k])
            if slot not in self._positions:
                self._positions[slot] = self._plan.positions(slot)
            found[k] = number(int(storages[k]), *self._positions[slot])
        return found


def _counted(
    marked: npt.NDArray[np.bool_] | Array,
) -> Array:
    """How many are marked before each position, and in all."""
    counts = np.zeros(len(marked) + 1, dtype=np.int64)
    np.cumsum(marked, out=counts[1:])
    return counts


@dataclass(frozen=True)
class _Chain:
    """What has to run so that a storage is there again in some slot.

    Some of what it takes the backward makes anyway, but later, or has made before. ``shared``: seconds
    added if that waits; ``waits``: (storage, cell, cell) for each that does. ``alone``: seconds if it is
    made once more instead; ``released``: (storage, slot) for each that goes in between.
    """

    shared: float
    alone: float
    waits: list[tuple[int, int, int]]
    released: tuple[tuple[int, int], ...]


def _chain(plan: Incremental, b: int, use: int) -> tuple[_Chain, set[int]]:
    """How ``b`` is made again in slot ``use`` from what the backward holds there, what is let go now and then
    left out; and the storages that this depends on."""
    model, held, uses, loose = plan.model, plan.held, plan.uses, plan.loose
    maker, prices, op_inputs, op_outputs = model.maker, plan.prices, model.inputs, model.outputs
    alone = shared = 0.0
    # Each operator with whether it has to run even where what there was waits.
    stack, seen = [(maker[b], True)], {maker[b]}
    waits: list[tuple[int, int, int]] = []
    released: list[tuple[int, int]] = []
    looked_at: set[int] = set()
    while stack:
        i, needed = stack.pop()
        early = past = False
        looked_at.update(op_outputs[i])
        looked_at.update(op_inputs[i])
        for x in op_outputs[i]:
            slots = uses[x]
            if x == b or not slots or held[x] or x in loose:
                continue
            if slots[0] > use:
                early = True
                released.append((x, use))
                if needed:
                    waits.append((x, CELLS * use + 1, CELLS * slots[0]))
            elif slots[-1] < use:
                past = True
                released.append((x, slots[-1]))
                if needed:
                    waits.append((x, CELLS * slots[-1] + 2, CELLS * use))
        alone += prices[i]
        needed = needed and not past
        if needed and not early:
            shared += prices[i]
        for x in op_inputs[i]:
            if held[x] or maker[x] in seen:
                continue
            slots = uses[x]
            if slots and slots[0] <= use <= slots[-1] and x not in loose:
                continue
            seen.add(maker[x])
            stack.append((maker[x], needed))
    return _Chain(shared, alone, waits, tuple(released)), looked_at
