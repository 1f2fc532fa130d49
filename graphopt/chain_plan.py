"""Plan a chain of calls: a schedule for each call, and which rows of calls run again together.

A schedule says what one call keeps for its own backward. That leaves what calls hand to each other: the
inputs of a thousand blocks are a thousand values. So a row of calls of one kind may keep nothing but what
enters it, and run again when its backward comes (Chen et al. 2016); rows may lie within rows (Griewank
and Walther 2000). Which rows, and which schedules inside, is found by dynamic programming over the chain
with the room that is left as its state, as in rotor (Beaumont et al. 2020). Blocks of one kind share one
table, so a thousand of them cost little more than ten.

The table counts in slots of the room, rounded; ``chain_peak`` counts bytes, and it alone decides whether
a plan fits.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.candidate import Frontier, FrontierPoint
from graphopt.schedule import Schedule

__all__ = [
    "ChainPlan",
    "Link",
    "Rerun",
    "chain_choices",
    "chain_peak",
    "hull",
    "items",
    "least_chain",
    "plan_chain",
    "rerun_calls",
]

_SLOTS = 1024
"""Parts that the room is divided into, at least; more for long chains, of which each call takes little."""

_SLOTS_PER_CALL = 8

_VARIANTS = 2
"""Schedules for calls of one kind that are many: each is compiled on its own."""

_SHORT = 100
"""Calls of a chain up to which several sets of schedules are tried for each kind."""

_MANY = 3
"""Calls of one kind from which on the number of schedules is bounded."""

_CORRECTIONS = 6
"""How often a plan that rounding made too large is made again with less room."""

_LONGEST = 256
"""The longest row of calls that runs again together."""

_GOLDEN = 0.6180339887498949

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rerun:
    """Calls ``start`` to ``stop`` (excluded) keep nothing but what enters the first; when their backward
    comes they run forward once more, the rows ``inner`` again without keeping anything."""

    start: int
    stop: int
    inner: tuple[Rerun, ...] = ()

    def __str__(self) -> str:
        text = f"calls {self.start} to {self.stop - 1} run again"
        return text + (f" ({'; '.join(map(str, self.inner))})" if self.inner else "")


@dataclass(frozen=True)
class Link:
    """One call of a chain. Calls of one ``kind`` share a frontier.

    ``made``: (bytes, position of the last call that reads it) of each value that it hands on; a
    position past the end is the caller. ``forward_seconds``: predicted time of its forward.
    ``pinned``: why it must not run again, ``""`` where it may.
    """

    kind: int
    frontier: Frontier
    made: tuple[tuple[int, int], ...] = ()
    forward_seconds: float = 0.0
    pinned: str = ""

    @property
    def handed(self) -> int:
        return sum(size for size, _ in self.made)


@dataclass(frozen=True)
class ChainPlan:
    """A point for every call, the rows that run again, and the peak in bytes of the whole step above its
    base. ``seconds`` is what the schedules and the rows add."""

    points: tuple[FrontierPoint, ...]
    reruns: tuple[Rerun, ...]
    peak_bytes: int
    seconds: float


def chain_peak(
    points: Sequence[FrontierPoint], links: Sequence[Link] = (), reruns: Sequence[Rerun] = ()
) -> int:
    """Peak in bytes of a step, parameters and inputs left out. Without ``reruns`` the links do not matter.

    Going forward, what the calls so far retain is held, less what a later one spares of it; a row that
    runs again holds what it hands on alone, and what enters it. Going back, a call finds what those before
    it retain and the gradients of those after it; a row runs forward first, beside the gradients that have
    arrived for it. What a call moves to the host is there until the next call, or row, has run, and back
    before the backward of that begins.
    """
    after = [0] * (len(points) + 1)
    for k in range(len(points) - 1, -1, -1):
        after[k] = after[k + 1] + points[k].gradients

    def crossing(start: int, end: int) -> int:
        """Bytes that calls ``start`` to ``end`` (excluded) make for later ones."""
        return sum(size for k in range(start, end) for size, last in links[k].made if last >= end)

    def passing(start: int, stop: int) -> int:
        """The peak of running calls forward without keeping anything."""
        return max(crossing(start, k) + points[k].forward_peak for k in range(start, stop))

    def peak_of(
        start: int, stop: int, rows: Sequence[Rerun], held: int, arrived: int, *, inside: bool
    ) -> int:
        peak, level, moving = 0, held, 0
        levels: list[tuple[int | Rerun, int]] = []
        for item in items(start, stop, rows):
            # What the call before moves is on its way.
            there = level + moving
            levels.append((item, there))
            if isinstance(item, Rerun):
                peak = max(peak, there + arrived + passing(item.start, item.stop))
                level += crossing(item.start, item.stop)
                moving = 0
            else:
                peak = max(peak, there + arrived + points[item].forward_peak)
                moving = points[item].moved_bytes
                # What enters a row is held until the row has gone back, from where it is started.
                gone = 0 if inside and item == start else points[item].spared
                levels[-1] = item, there - gone
                level += points[item].retained - moving - gone
        for item, there in reversed(levels):
            if isinstance(item, Rerun):
                given = crossing(item.start, item.stop) + after[item.stop]
                peak = max(peak, peak_of(item.start, item.stop, item.inner, there, given, inside=True))
            else:
                peak = max(peak, there + points[item].backward_peak + after[item + 1])
        return peak

    return peak_of(0, len(points), reruns, 0, 0, inside=False) if points else 0


def items(start: int, stop: int, rows: Sequence[Rerun]) -> Iterator[int | Rerun]:
    """Calls and rows between two positions, in order."""
    position = start
    for row in rows:
        yield from range(position, row.start)
        yield row
        position = row.stop
    yield from range(position, stop)


def rerun_calls(rows: Sequence[Rerun]) -> Iterator[int]:
    """Every call that runs again because of its rows, once for each time."""
    for row in rows:
        yield from range(row.start, row.stop)
        yield from rerun_calls(row.inner)


def plan_chain(links: Sequence[Link], room: int | None, resolution: Sequence[float] = ()) -> ChainPlan | None:
    """The fastest plan found whose peak is at most ``room`` bytes, or ``None``.

    ``resolution``: seconds for each call below which predictions do not tell schedules apart: where the
    fastest fit, those close to them are taken for what they retain.
    """
    limit = max((link.frontier.host_bytes for link in links), default=0)
    found = _planned(links, room, resolution)
    while found is not None and sum(p.moved_bytes for p in found.points) > limit:
        # The table does not count what is moved: leave out what moves most until it is little enough.
        largest = max(p.moved_bytes for p in found.points)
        links = [_without_moves(link, largest) for link in links]
        found = _planned(links, room, resolution)
    return found


def _without_moves(link: Link, least: int) -> Link:
    """The link without the points that move ``least`` bytes or more."""
    points = tuple(p for p in link.frontier.points if p.moved_bytes < least)
    return replace(link, frontier=replace(link.frontier, points=points))


def _planned(links: Sequence[Link], room: int | None, resolution: Sequence[float]) -> ChainPlan | None:
    fastest = [_fastest(link.frontier, resolution[k] if resolution else 0.0) for k, link in enumerate(links)]
    plain = _plan(links, fastest, ())
    if room is None or plain.peak_bytes <= room:
        return plain
    if len(links) == 1:
        fitting = [p for p in links[0].frontier.points if p.peak_bytes <= room]
        return _plan(links, [min(fitting, key=lambda p: (p.seconds, p.peak_bytes))], ()) if fitting else None
    found = _within(links, room)
    if found is None:
        return None
    return _bounded(links, room, found)


def chain_choices(
    links: Sequence[Link], rooms: Sequence[int]
) -> Iterator[tuple[list[FrontierPoint], list[Rerun]]]:
    """What the table says for each of ``rooms`` bytes that it finds a plan for: a point for each call, rows.

    One table serves all of them: whether the plans fit is for the caller to see.
    """
    solved = _Table(links, max(rooms))
    fits = np.flatnonzero(np.isfinite(solved.ahead[0]))
    least = int(fits[0]) if len(fits) else solved.slots + 1
    for slots in sorted({int(room / solved.slot) for room in rooms}):
        if least <= slots <= solved.slots:
            yield solved.plan(slots)


def least_chain(links: Sequence[Link]) -> ChainPlan:
    """The plan of least peak that the table finds."""
    best = _plan(links, [min(k.frontier.points, key=lambda p: (p.retained, p.peak_bytes)) for k in links], ())
    room = best.peak_bytes
    while True:
        solved = _Table(links, room)
        fits = np.flatnonzero(np.isfinite(solved.ahead[0]))
        if not len(fits):
            return best
        low = int(fits[0])
        tried = _plan(links, *solved.plan(low))
        if tried.peak_bytes < best.peak_bytes:
            best = tried
        # Once more in finer slots, as long as the room shrinks by enough to matter.
        smaller = int((low + 1) * solved.slot)
        if smaller > 0.95 * room:
            return best
        room = smaller


def _within(links: Sequence[Link], room: int) -> ChainPlan | None:
    aim, best = room, None
    for _ in range(_CORRECTIONS):
        solved = _Table(links, aim)
        if not np.isfinite(solved.ahead[0][-1]):
            break
        tried = _plan(links, *solved.plan())
        if tried.peak_bytes <= room:
            best = tried
            break
        aim -= max(tried.peak_bytes - room, int(solved.slot))
        if aim <= 0:
            break
    if best is None:
        lowest = least_chain(links)
        best = lowest if lowest.peak_bytes <= room else None
    return best


def _bounded(links: Sequence[Link], room: int, plan: ChainPlan) -> ChainPlan:
    """A plan that uses ``_VARIANTS`` schedules at most for the many calls of one kind, or ``plan``."""
    for kind in dict.fromkeys(link.kind for link in links):
        counts = Counter(_code(p) for p, k in zip(plan.points, links, strict=True) if k.kind == kind)
        if len(counts) <= _VARIANTS or counts.total() <= _MANY:
            continue
        best: ChainPlan | None = None
        narrowed = links
        for codes in _variants(links, kind, counts):
            tried_links = [_with_codes(k, codes) if k.kind == kind else k for k in links]
            tried = _within(tried_links, room)
            if tried is not None and (best is None or tried.seconds < best.seconds):
                best, narrowed = tried, tried_links
        if best is not None:
            links, plan = narrowed, best
    return plan


def _variants(links: Sequence[Link], kind: int, counts: Counter[_Code]) -> list[frozenset[_Code]]:
    """Sets of schedules to try for a kind: those that a plan uses most, and, as a table takes time in long
    chains, in short ones pairs of what it uses and neighbours on the lower hull of seconds over bytes left,
    of which a sum is best made of two."""
    most = [code for code, _ in counts.most_common()]
    found = [frozenset(most[:_VARIANTS])]
    if len(links) <= _SHORT:
        found += map(frozenset, itertools.combinations(most[:4], 2))
        frontier = next(link.frontier for link in links if link.kind == kind)
        found += (frozenset(map(_code, pair)) for pair in itertools.pairwise(hull(frontier.points)))
    return list(dict.fromkeys(found))


def hull(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The lower convex hull of seconds over the room that points take, by rising room."""
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (_left(p), p.seconds)):
        if kept and point.seconds >= kept[-1].seconds:
            continue
        while len(kept) > 1:
            a, b = kept[-2:]
            across = (b.seconds - a.seconds) * (_left(point) - _left(a))
            if across < (point.seconds - a.seconds) * (_left(b) - _left(a)):
                break
            kept.pop()
        kept.append(point)
    return kept


def _with_codes(link: Link, codes: Collection[_Code]) -> Link:
    points = tuple(p for p in link.frontier.points if _code(p) in codes)
    return replace(link, frontier=replace(link.frontier, points=points))


_Code: TypeAlias = tuple[str, Schedule]


def _code(point: FrontierPoint) -> _Code:
    """What is compiled for a point: moving values takes no code of its own."""
    return point.alternative, point.schedule


def _plan(links: Sequence[Link], points: Sequence[FrontierPoint], reruns: Sequence[Rerun]) -> ChainPlan:
    seconds = sum(point.seconds for point in points)
    seconds += sum(links[k].forward_seconds for k in rerun_calls(reruns))
    return ChainPlan(tuple(points), tuple(reruns), chain_peak(points, links, reruns), seconds)


def _fastest(frontier: Frontier, resolution: float) -> FrontierPoint:
    limit = min(point.seconds for point in frontier.points) + resolution
    close = [point for point in frontier.points if point.seconds <= limit]
    if resolution:
        return min(close, key=lambda p: (p.moved_bytes, p.retained, p.peak_bytes, p.seconds))
    return min(close, key=lambda p: (p.moved_bytes, p.peak_bytes))


def _left(point: FrontierPoint) -> int:
    """Bytes by which a call leaves less room for those after it."""
    return point.retained - point.moved_bytes - point.spared


def _row_lengths(longest: int) -> list[int]:
    """Lengths of rows to try: every small one, then in steps of about a quarter."""
    lengths, length = [], 1
    while length < min(longest, _LONGEST):
        lengths.append(length)
        length = max(length + 1, length * 5 // 4)
    return [*lengths, longest] if 0 < longest <= _LONGEST else lengths


@dataclass
class _Kind:
    """Calls of one kind: peaks in slots, what is held in bytes. ``rows[n]``: seconds added by going back
    over n calls once they ran forward again, by room; ``picks[n]``: the choice behind each."""

    points: tuple[FrontierPoint, ...]
    forward: list[int]
    backward: list[int]
    handed: int
    gradients: int
    again: float
    rows: list[Array] = field(default_factory=list)
    picks: list[npt.NDArray[np.int16]] = field(default_factory=list)


class _Table:
    """Least added seconds from every position of the chain on, for every number of slots left.

    A choice is a schedule (its number) or a row: the number of schedules and then its place among
    ``_row_lengths``.
    """

    def __init__(self, links: Sequence[Link], room: int) -> None:
        self.links = links
        self.slots = min(max(_SLOTS, _SLOTS_PER_CALL * len(links)), 16 * _SLOTS)
        self.slot = max(room, 1) / self.slots
        self.runs = _runs(links)
        longest: dict[int, int] = {}
        for start, stop in self.runs:
            kind = links[start].kind
            longest[kind] = max(longest.get(kind, 0), stop - start)
        self.kinds: dict[int, _Kind] = {}
        for link in links:
            if link.kind not in self.kinds:
                self.kinds[link.kind] = self._kind(link)
                self._fill(self.kinds[link.kind], longest[link.kind], bool(link.pinned))
        self._chain()

    def _up(self, size: int) -> int:
        return math.ceil(size / self.slot - 1e-6)

    def _at(self, size: int, position: int) -> int:
        """Slots of ``size`` bytes, rounded up or down by the position so that sums come out right.

        Sizes of a few slots that are all rounded alike are wrong by the same share; multiples of the
        golden ratio spread their remainders evenly (Weyl's sequence).
        """
        # A call may move more than it retains: what it was given. The room that this makes is left out.
        return int(max(size, 0) / self.slot + position * _GOLDEN % 1.0)

    def _kind(self, link: Link) -> _Kind:
        points = link.frontier.points
        return _Kind(
            points,
            # Beside a call that moves values the one before it is taken to move as much.
            [self._up(p.forward_peak + p.moved_bytes) for p in points],
            [self._up(p.backward_peak + p.moved_bytes) for p in points],
            link.handed,
            max((p.gradients for p in points), default=0),
            link.forward_seconds,
        )

    def _fill(self, kind: _Kind, longest: int, pinned: bool) -> None:
        """``rows`` of a kind: what going back over n of its calls adds once they ran forward again."""
        kind.rows.append(np.zeros(self.slots + 1))
        kind.picks.append(np.zeros(self.slots + 1, dtype=np.int16))
        if pinned:
            return
        padded = [_padded(kind.rows[0])]
        arrived = self._up(kind.handed)
        for n in range(1, min(longest, _LONGEST) + 1):
            best = _Least(self.slots)
            for k, point in enumerate(kind.points):
                if point.moved_bytes:
                    continue
                waiting = self._up((n - 1) * kind.gradients)
                floor = max(kind.forward[k] + arrived, kind.backward[k] + waiting)
                best.offer(point.seconds + _shifted(padded[n - 1], self._at(point.retained, n)), floor, k)
            floor = min(kind.forward) + 2 * arrived
            for number, g in enumerate(_row_lengths(n)[:-1]):
                rest = _shifted(padded[n - g], self._at(kind.handed, n))
                inside = _shifted(padded[g], self._up((n - g) * kind.gradients))
                best.offer(g * kind.again + rest + inside, floor, len(kind.points) + number)
            kind.picks.append(best.picks)
            kind.rows.append(best.values)
            padded.append(_padded(best.values))

    def _chain(self) -> None:
        count = len(self.links)
        self.ahead: list[Array] = [np.empty(0)] * (count + 1)
        self.chosen: list[npt.NDArray[np.int16]] = [np.empty(0, dtype=np.int16)] * count
        self.ahead[count] = np.zeros(self.slots + 1)
        padded: list[Array] = [np.empty(0)] * (count + 1)
        padded[count] = _padded(self.ahead[count])
        after = [0] * (count + 1)
        for k in range(count - 1, -1, -1):
            after[k] = after[k + 1] + max(p.gradients for p in self.links[k].frontier.points)
        for start, stop in reversed(self.runs):
            kind = self.kinds[self.links[start].kind]
            rows = [_padded(row) for row in kind.rows]
            for k in range(stop - 1, start - 1, -1):
                best = _Least(self.slots)
                gone = self._up(after[k + 1])
                for p, point in enumerate(kind.points):
                    floor = max(kind.forward[p], kind.backward[p] + gone)
                    best.offer(
                        point.seconds
                        + _shifted(padded[k + 1], self._at(_left(point), k)),
                        floor,
                        p,
                    )
                if len(rows) > 1:
                    floor = min(kind.forward) + self._up(kind.handed)
                    for number, g in enumerate(_row_lengths(stop - k)):
                        rest = _shifted(padded[k + g], self._at(kind.handed, k))
                        inside = _shifted(rows[g], self._up(after[k + g]))
                        best.offer(g * kind.again + rest + inside, floor, len(kind.points) + number)
                self.chosen[k] = best.picks
                self.ahead[k] = best.values
                padded[k] = _padded(best.values)

    def plan(self, slots: int | None = None) -> tuple[list[FrontierPoint], list[Rerun]]:
        """The choices behind ``ahead[0][slots]``, by default with the whole room."""
        points: list[FrontierPoint] = []
        reruns: list[Rerun] = []
        left = self.slots if slots is None else slots
        after = [0] * (len(self.links) + 1)
        for k in range(len(self.links) - 1, -1, -1):
            after[k] = after[k + 1] + max(p.gradients for p in self.links[k].frontier.points)
        for start, stop in self.runs:
            kind = self.kinds[self.links[start].kind]
            while len(points) < stop:
                k = len(points)
                pick = int(self.chosen[k][left])
                if pick < len(kind.points):
                    points.append(kind.points[pick])
                    left -= self._at(_left(kind.points[pick]), k)
                    continue
                g = _row_lengths(stop - k)[pick - len(kind.points)]
                inner_points, inner = self._row(kind, g, left - self._up(after[k + g]), k)
                points += inner_points
                reruns.append(Rerun(k, k + g, tuple(inner)))
                left -= self._at(kind.handed, k)
        return points, reruns

    def _row(self, kind: _Kind, n: int, left: int, at: int) -> tuple[list[FrontierPoint], list[Rerun]]:
        points: list[FrontierPoint] = []
        reruns: list[Rerun] = []
        while n:
            pick = int(kind.picks[n][left])
            if pick < len(kind.points):
                points.append(kind.points[pick])
                left -= self._at(kind.points[pick].retained, n)
                n -= 1
                continue
            g = _row_lengths(n)[pick - len(kind.points)]
            begin = at + len(points)
            inner_points, inner = self._row(kind, g, left - self._up((n - g) * kind.gradients), begin)
            points += inner_points
            reruns.append(Rerun(begin, begin + g, tuple(inner)))
            left -= self._at(kind.handed, n)
            n -= g
        return points, reruns


def _runs(links: Sequence[Link]) -> list[tuple[int, int]]:
    """Maximal rows of neighbouring calls of one kind."""
    runs: list[tuple[int, int]] = []
    for k, link in enumerate(links):
        if runs and links[runs[-1][0]].kind == link.kind:
            runs[-1] = (runs[-1][0], k + 1)
        else:
            runs.append((k, k + 1))
    return runs


def _padded(values: Array) -> Array:
    """``values`` after as many infinities: reading it from further left means less room."""
    return np.concatenate((np.full(len(values), np.inf), values))


def _shifted(padded: Array, slots: int) -> Array:
    """Values with ``slots`` fewer."""
    count = len(padded) // 2
    slots = min(slots, count)
    return padded[count - slots : 2 * count - slots]


class _Least:
    """The least of several options at every number of slots, and which it is."""

    def __init__(self, slots: int) -> None:
        self.values = np.full(slots + 1, np.inf)
        self.picks = np.zeros(slots + 1, dtype=np.int16)

    def offer(self, values: Array, floor: int, pick: int) -> None:
        """``values`` from ``floor`` slots on."""
        floor = max(0, floor)
        better = values[floor:] < self.values[floor:]
        self.values[floor:][better] = values[floor:][better]
        self.picks[floor:][better] = pick
