"""The order of a graph's kernels in which least memory is alive at once.

Inductor orders its kernels too, but counts the output of a kernel beside the input that it is
written over. Where such a pair is the largest thing in the graph every order looks alike to it, and
what comes after the pair stays as it happens to stand. Fusing also takes kernels out of the program's
order, in which a planner may have put the slices of a region one after another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt._torch import KernelBuffer, KernelLaunch

__all__ = ["least_memory_order", "peak_of"]

_STEPS = 24_000
"""How many partial orders may be extended: the beam is as wide as that allows."""

_WIDEST = 48


@dataclass(frozen=True)
class _Prefix:
    """Launches done so far, in order; ``peak`` bytes at most, ``live`` bytes now."""

    order: tuple[int, ...]
    done: int
    ready: frozenset[int]
    peak: int
    live: int


def least_memory_order(launches: Sequence[KernelLaunch], buffers: Sequence[KernelBuffer]) -> list[int]:
    """Positions of ``launches`` in an order of low peak: the given one (which must respect ``waits``), the
    program's or one found by beam search, the first of them with the lowest peak."""
    books = _Books(launches, buffers)
    orders = [
        list(range(len(launches))),
        _in_place(books, [launch.place for launch in launches]),
        _beam(books, max(1, min(_WIDEST, _STEPS // max(1, 4 * len(launches))))),
    ]
    return min(orders, key=lambda order: peak_of(launches, buffers, order))


def peak_of(launches: Sequence[KernelLaunch], buffers: Sequence[KernelBuffer], order: Sequence[int]) -> int:
    """Bytes alive at most when ``launches`` run in ``order``, above what is there before."""
    books, done, live, peak = _Books(launches, buffers), 0, 0, 0
    for index in order:
        needed, live = books.step(index, done, live)
        peak, done = max(peak, needed), done | 1 << index
    return peak


class _Books:
    """Who makes and reads what, as bit sets."""

    def __init__(self, launches: Sequence[KernelLaunch], buffers: Sequence[KernelBuffer]) -> None:
        self.waits = [sum(1 << w for w in launch.waits) for launch in launches]
        self.followers: list[list[int]] = [[] for _ in launches]
        for index, launch in enumerate(launches):
            for before in launch.waits:
                self.followers[before].append(index)
        self.made: list[list[tuple[int, KernelBuffer]]] = [[] for _ in launches]
        self.read: list[list[tuple[int, int, bool]]] = [[] for _ in launches]
        for buffer in buffers:
            makers = sum(1 << maker for maker in buffer.makers)
            for maker in buffer.makers:
                self.made[maker].append((makers, buffer))
            if not buffer.returned:
                readers = sum(1 << r for r in buffer.readers)
                for reader in buffer.readers:
                    others = readers & ~(1 << reader)
                    self.read[reader].append((others, buffer.bytes, reader in buffer.overwriters))

    def step(self, index: int, done: int, live: int) -> tuple[int, int]:
        """Bytes alive during a launch and after it."""
        freed = [(size, reusable) for others, size, reusable in self.read[index] if not others & ~done]
        reusable = [size for size, may_be_overwritten in freed if may_be_overwritten]
        needed, after = live, live - sum(size for size, _ in freed)
        for makers, buffer in self.made[index]:
            if makers & done:
                continue
            if buffer.bytes in reusable and len(buffer.makers) == 1:
                reusable.remove(buffer.bytes)
            else:
                needed += buffer.bytes
            if buffer.readers or buffer.returned:
                after += buffer.bytes
        return needed, after


def _in_place(books: _Books, places: Sequence[int]) -> list[int]:
    """The launches by ``places``, each after those that it waits for."""
    ready = [(places[index], index) for index, waits in enumerate(books.waits) if not waits]
    heapq.heapify(ready)
    order, done = list[int](), 0
    while ready:
        _, index = heapq.heappop(ready)
        order.append(index)
        done |= 1 << index
        for follower in books.followers[index]:
            if not books.waits[follower] & ~done:
                heapq.heappush(ready, (places[follower], follower))
    return order


def _beam(books: _Books, width: int) -> list[int]:
    first = frozenset(index for index, waits in enumerate(books.waits) if not waits)
    beam = [_Prefix((), 0, first, 0, 0)]
    for _ in books.waits:
        best: dict[int, _Prefix] = {}
        for prefix in beam:
            for index in sorted(prefix.ready):
                longer = _extended(books, prefix, index)
                rival = best.get(longer.done)
                if rival is None or (longer.peak, longer.order) < (rival.peak, rival.order):
                    best[longer.done] = longer
        beam = sorted(best.values(), key=lambda p: (p.peak, p.live, p.order))[:width]
    return list(beam[0].order)


def _extended(books: _Books, prefix: _Prefix, index: int) -> _Prefix:
    needed, live = books.step(index, prefix.done, prefix.live)
    done = prefix.done | 1 << index
    opened = {f for f in books.followers[index] if not books.waits[f] & ~done}
    return _Prefix(
        (*prefix.order, index),
        done,
        (prefix.ready - {index}) | opened,
        max(prefix.peak, needed),
        live,
    )
