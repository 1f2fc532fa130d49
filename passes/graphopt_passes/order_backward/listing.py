"""Orders made in one go: list scheduling by what an operator frees, and searches of the graph.

Least peak memory first, breadth first and depth first are those of ``torch/_inductor/memory.py``; the first
is that of Oh et al. 2006 ("Buffer memory optimization for video codec application modeled in Simulink").
*Releases first* stays with the order given, but runs whatever leaves no more bytes behind than it
found as soon as it can: a weight's gradient when its operands can die.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from graphopt_passes.order_backward.half import Half

__all__ = ["listed"]

Order = list[int]


def listed(half: Half) -> Iterator[Order]:
    """Orders of the half's operators that respect what must come before what."""
    yield _scheduled(half, _releases_first)
    yield _scheduled(half, _least_peak_first)
    yield _breadth_first(half)
    yield _depth_first(half)


Key = Callable[[int, int, int, int], tuple[int, ...]]
"""Of an operator, the bytes that it adds while it runs and leaves behind, and the room below the peak so far:
the least goes next."""


def _releases_first(i: int, during: int, left: int, room: int) -> tuple[int, ...]:
    return (0 if left <= 0 and during <= room else 1, i)


def _least_peak_first(i: int, during: int, left: int, room: int) -> tuple[int, ...]:
    return (0, left, i) if during <= room else (1, during, i)


def _scheduled(half: Half, key: Key) -> Order:
    size, lasting = half.size, half.lasting
    unread = [len(found) for found in half.readers]
    freed = [0] * half.count
    for b, found in enumerate(half.readers):
        if len(found) == 1 and b not in lasting:
            freed[found[0]] += size[b]
    made = [sum(size[b] for b in makes) for makes in half.makes]
    dead = [sum(size[b] for b in makes if not half.readers[b] and b not in lasting) for makes in half.makes]
    missing = [len(earlier) for earlier in half.before]
    ready = {i for i in range(half.count) if not missing[i]}
    done = [False] * half.count
    live = most = half.opening
    order: Order = []
    while ready:
        room = most - live
        best = min(ready, key=lambda i: key(i, made[i] + half.extra[i], made[i] - freed[i] - dead[i], room))
        ready.remove(best)
        done[best] = True
        order.append(best)
        most = max(most, live + made[best] + half.extra[best])
        live += made[best] - freed[best] - dead[best]
        for b in half.reads[best]:
            unread[b] -= 1
            if unread[b] == 1 and b not in lasting:
                freed[next(i for i in half.readers[b] if not done[i])] += size[b]
        for later in half.after[best]:
            missing[later] -= 1
            if not missing[later]:
                ready.add(later)
    return order


def _breadth_first(half: Half) -> Order:
    """Operators whose inputs were made the longest ago go first."""
    missing = [len(earlier) for earlier in half.before]
    place: dict[int, int] = {}
    heap = [((), i) for i in range(half.count) if not missing[i]]
    waiting: list[tuple[tuple[int, ...], int]] = list(heap)
    heapq.heapify(waiting)
    order: Order = []
    while waiting:
        _, i = heapq.heappop(waiting)
        place[i] = len(order)
        order.append(i)
        for later in half.after[i]:
            missing[later] -= 1
            if not missing[later]:
                heapq.heappush(waiting, (tuple(sorted(place[j] for j in half.before[later])), later))
    return order


def _depth_first(half: Half) -> Order:
    """What is small, with what it needs, goes first."""
    weight = [
        sum(half.size[b] for b in (*half.reads[i], *half.makes[i])) + half.extra[i] for i in range(half.count)
    ]
    done = [False] * half.count
    order: Order = []
    for start in sorted(range(half.count), key=lambda i: (weight[i], i)):
        stack = [start]
        while stack:
            i = stack[-1]
            missing = [j for j in half.before[i] if not done[j]]
            if missing:
                stack.extend(sorted(missing, key=lambda j: (weight[j], j), reverse=True))
                continue
            stack.pop()
            if not done[i]:
                done[i] = True
                order.append(i)
    return order
