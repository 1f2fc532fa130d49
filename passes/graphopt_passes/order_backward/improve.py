"""Lowering the peak of an order: windows around it solved exactly, operators moved across it.

A window is a stretch of the order; among all orders of its operators the one of least peak, then of least
bytes summed, is found by dynamic programming over the sets of operators that ran (as MODeL and OLLA order
whole graphs by integer programs: Steiner et al. 2022). What lies outside a window stays as it is, so that its
own peak is all that changes. A move takes the readers of something that is held at the peak ahead of it, with
what they need; or its maker behind it, with what needs that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphopt_passes.order_backward.half import Half
from graphopt_passes.order_backward.listing import listed

__all__ = ["lowered"]

_WINDOW = 10
"""Operators in a window: two to this power sets at most."""

_WORK = 600_000
"""Operators looked at, over all moves."""

_HOT = 0.99
"""A window lies where this share of the peak is held."""

Order = list[int]


def lowered(half: Half, other: Half, limit: int, start: Sequence[int]) -> Order:
    """An order in which ``half`` holds less at most than in ``start``, or ``start``. ``other`` is the same
    operators with other bytes, of which at most ``limit`` may be held."""

    def key(order: Sequence[int]) -> tuple[int, int]:
        levels = half.levels(order)
        peak = max(levels, default=0)
        return peak, sum(level for level in levels if level > _HOT * peak)

    best, least = list(start), key(start)
    if least[0] <= half.least_peak:
        return best
    for order in listed(half):
        found = key(order)
        if found < least and other.peak(order) <= limit:
            best, least = order, found
    work = _WORK
    while work > 0 and least[0] > half.least_peak:
        before = least
        for order in _candidates(half, best):
            work -= half.count
            found = key(order)
            if found < least and other.peak(order) <= limit:
                best, least = order, found
                break
            if work <= 0:
                break
        if least == before:
            break
    return best


def _candidates(half: Half, order: Order) -> Iterator[Order]:
    levels = half.levels(order)
    peak = max(levels)
    hot = [k for k, level in enumerate(levels) if level >= _HOT * peak]
    seen = -1
    for k in hot:
        for begin in (k - _WINDOW // 2, k - 1, k - _WINDOW + 2):
            begin = max(0, min(begin, len(order) - _WINDOW))
            if begin > seen:
                seen = begin
                window = _solved(half, order, levels, begin, min(len(order), begin + _WINDOW))
                if window is not None:
                    yield window
    yield from _moves(half, order, levels.index(peak))


def _moves(half: Half, order: Order, peak: int) -> Iterator[Order]:
    """Orders in which something that is held at the place ``peak``, unread by it, is not."""
    place = [0] * half.count
    for k, i in enumerate(order):
        place[i] = k
    maker = {b: i for i, makes in enumerate(half.makes) for b in makes}
    held: list[tuple[int, int, int, int]] = []
    for b, readers in enumerate(half.readers):
        begin = place[maker[b]] if b in maker else -1
        if not half.size[b] or not readers or (b not in maker and b not in half.entry):
            continue
        end = max(place[i] for i in readers)
        if begin < peak <= end and peak not in (begin, end):
            held.append((half.size[b], b, begin, end))
    for _, b, begin, _ in sorted(held, reverse=True)[:12]:
        if b not in half.lasting:
            ahead: set[int] = {i for i in half.readers[b] if place[i] >= peak}
            stack = list(ahead)
            while stack:
                for j in half.before[stack.pop()]:
                    if place[j] >= peak and j not in ahead:
                        ahead.add(j)
                        stack.append(j)
            if order[peak] not in ahead:
                moved = sorted(ahead, key=place.__getitem__)
                yield [*order[:peak], *moved, *(i for i in order[peak:] if i not in ahead)]
        if b in maker:
            behind = {maker[b]}
            stack = [maker[b]]
            while stack:
                for j in half.after[stack.pop()]:
                    if begin < place[j] <= peak and j not in behind:
                        behind.add(j)
                        stack.append(j)
            if order[peak] not in behind:
                moved = sorted(behind, key=place.__getitem__)
                kept = [i for i in order[: peak + 1] if i not in behind]
                yield [*kept, *moved, *order[peak + 1 :]]


def _solved(half: Half, order: Order, levels: list[int], begin: int, end: int) -> Order | None:
    """``order`` with its operators from ``begin`` to ``end`` in the order of least peak; ``None`` where that
    is the present one."""
    window = order[begin:end]
    bit = {i: 1 << k for k, i in enumerate(window)}
    waits = [sum(bit[j] for j in half.before[i] if j in bit) for i in window]
    made = [sum(half.size[b] for b in half.makes[i]) for i in window]
    later = set(order[end:])
    # Sets of readers with whose last what they read dies.
    dies: dict[int, int] = {}
    for b in {b for i in window for b in (*half.reads[i], *half.makes[i])}:
        readers = half.readers[b]
        if b in half.lasting or any(i in later for i in readers):
            continue
        mask = sum(bit[i] for i in readers if i in bit)
        mask |= sum(bit[i] for i in window if b in half.makes[i])
        dies[mask] = dies.get(mask, 0) + half.size[b]
    base = levels[begin] - half.extra[window[0]] - made[0]
    states: dict[int, tuple[int, int, int]] = {0: (0, 0, base)}
    path: dict[int, tuple[int, int]] = {}
    for _ in window:
        following: dict[int, tuple[int, int, int]] = {}
        for done, (peak, total, live) in states.items():
            for k, i in enumerate(window):
                if done >> k & 1 or waits[k] & ~done:
                    continue
                now = done | 1 << k
                during = live + made[k] + half.extra[i]
                freed = sum(size for mask, size in dies.items() if mask >> k & 1 and mask & now == mask)
                found = (max(peak, during), total + during, live + made[k] - freed)
                if now not in following or found[:2] < following[now][:2]:
                    following[now] = found
                    path[now] = (done, k)
        states = following
    full = (1 << len(window)) - 1
    best: Order = []
    done = full
    while done:
        done, k = path[done]
        best.append(window[k])
    best.reverse()
    if best == window or states[full][:1] >= (max(levels[begin:end]),):
        return None
    return [*order[:begin], *best, *order[end:]]
