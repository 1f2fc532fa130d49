"""Pick one point from every program's frontier so that the whole step fits the budget.

Programs run forward in order, then backward in reverse. While one runs forward, the values
retained by those before it are held; while it runs backward, those and the gradients of the
programs after it. Programs that share a frontier (blocks of one kind) are chosen together: one
point up to some block, another from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from graphopt.candidate import Frontier, FrontierPoint

__all__ = ["Combination", "choose", "combinations", "least", "least_peak", "seconds_bound", "step_peak"]

_LEVELS = 32
"""Peaks between the least and the fastest combination at which fast ones are looked for."""


def step_peak(points: Sequence[FrontierPoint], base_bytes: int = 0) -> int:
    """Peak in bytes of a step whose programs run the given points, in call order."""
    retained = peak = 0
    after = sum(point.gradients for point in points)
    for point in points:
        after -= point.gradients
        peak = max(peak, retained + point.forward_peak, retained + point.backward_peak + after)
        retained += point.retained
    return base_bytes + peak


def choose(
    frontiers: Sequence[Frontier],
    budget_bytes: int | None,
    base_bytes: int = 0,
    *,
    resolution: Sequence[float] = (),
) -> list[FrontierPoint] | None:
    """The fastest combination found that fits, or ``None`` if none does.

    ``resolution``: seconds for each program below which predictions do not tell points apart;
    where the fastest combination fits, points that close to it are taken for what they retain.

    One program: the fastest point that fits. Several: from the fastest and from the least
    combination, one group of programs after another is set to what is best with the rest as it
    is, until nothing improves; the better end wins.
    """
    room = None if budget_bytes is None else budget_bytes - base_bytes
    fastest = [_fastest(f, resolution[k] if resolution else 0.0) for k, f in enumerate(frontiers)]
    if room is None or step_peak(fastest) <= room:
        return fastest
    if len(frontiers) == 1:
        fitting = [p for p in frontiers[0].points if p.peak_bytes <= room]
        return [min(fitting, key=lambda p: (p.seconds, p.peak_bytes))] if fitting else None
    ends = [_descend(start, frontiers, room) for start in (fastest, least(frontiers))]
    fitting_ends = [end for end in ends if step_peak(end) <= room]
    return min(fitting_ends, key=_seconds) if fitting_ends else None


def least(frontiers: Sequence[Frontier]) -> list[FrontierPoint]:
    """The combination of least peak that setting group after group finds."""
    chosen = [min(f.points, key=lambda p: (p.retained, p.peak_bytes)) for f in frontiers]
    other = [min(f.points, key=lambda p: (p.peak_bytes, p.retained)) for f in frontiers]
    return min((_descend(start, frontiers, 0) for start in (chosen, other)), key=step_peak)


def _fastest(frontier: Frontier, resolution: float) -> FrontierPoint:
    limit = min(point.seconds for point in frontier.points) + resolution
    close = [point for point in frontier.points if point.seconds <= limit]
    if resolution:
        return min(close, key=lambda p: (p.retained, p.peak_bytes, p.seconds))
    return min(close, key=lambda p: p.peak_bytes)


def _descend(start: list[FrontierPoint], frontiers: Sequence[Frontier], room: int) -> list[FrontierPoint]:
    """Set one group after another to its best, first towards fitting, then towards speed."""
    chosen, score = start, (max(0, step_peak(start) - room), _seconds(start))
    improved = True
    while improved:
        improved = False
        for members in _groups(frontiers):
            for trial in _settings(chosen, members, frontiers[members[0]].points):
                found = (max(0, step_peak(trial) - room), _seconds(trial))
                if found < score:
                    chosen, score, improved = trial, found, True
    return chosen


def _groups(frontiers: Sequence[Frontier]) -> list[list[int]]:
    """Positions of the programs that share a frontier, in call order."""
    groups: dict[int, list[int]] = {}
    for index, frontier in enumerate(frontiers):
        groups.setdefault(id(frontier), []).append(index)
    return list(groups.values())


def _settings(
    chosen: Sequence[FrontierPoint], members: Sequence[int], points: Sequence[FrontierPoint]
) -> Iterator[list[FrontierPoint]]:
    """``chosen`` with one point for the first members of a group and another for the rest."""
    for first in points:
        for second in points if len(members) > 1 else (first,):
            for border in range(1, len(members)) if first is not second else (len(members),):
                trial = list(chosen)
                for order, index in enumerate(members):
                    trial[index] = first if order < border else second
                yield trial


def _seconds(points: Sequence[FrontierPoint]) -> float:
    return sum(point.seconds for point in points)


def least_peak(frontiers: Sequence[Frontier], base_bytes: int = 0) -> int:
    """The least peak in bytes of a whole step that the frontiers reach."""
    return step_peak(least(frontiers), base_bytes)


def seconds_bound(frontiers: Sequence[Frontier], budget_bytes: int | None, base_bytes: int = 0) -> float:
    """A proven lower bound on the seconds that recomputation adds to any plan within the budget.

    Programs only add to each other's memory, so each one's own bound holds with the rest free.
    """
    if budget_bytes is None:
        return 0.0
    return sum(frontier.seconds_bound(budget_bytes - base_bytes) for frontier in frontiers)


@dataclass(frozen=True)
class Combination:
    """One point for each program, the peak in bytes of the whole step, the seconds that it adds."""

    points: tuple[FrontierPoint, ...]
    peak_bytes: int
    seconds: float


def combinations(
    frontiers: Sequence[Frontier], calls: Sequence[int], peak: Callable[[Sequence[FrontierPoint]], int]
) -> tuple[Combination, ...]:
    """Combinations of which none is worse than another in peak and in seconds, least peak first.

    For programs that share values, or run several times (``calls``): what one choice takes depends on
    the others, so that every combination is judged by ``peak`` of it whole. What is picked from the
    result for one budget never takes more than what is picked for a larger one.
    """
    known: dict[tuple[int, ...], Combination] = {}

    def look(picked: tuple[int, ...]) -> Combination:
        found = known.get(picked)
        if found is None:
            points = tuple(f.points[k] for f, k in zip(frontiers, picked, strict=True))
            seconds = sum(count * point.seconds for count, point in zip(calls, points, strict=True))
            found = known[picked] = Combination(points, peak(points), seconds)
        return found

    def descend(picked: tuple[int, ...], room: int) -> tuple[int, ...]:
        """Set one program after another to its best, first towards fitting, then towards speed."""

        def score(trial: tuple[int, ...]) -> tuple[int, float, int]:
            found = look(trial)
            return max(0, found.peak_bytes - room), found.seconds, found.peak_bytes

        improved = True
        while improved:
            improved = False
            for place, frontier in enumerate(frontiers):
                trials = [(*picked[:place], k, *picked[place + 1 :]) for k in range(len(frontier.points))]
                best = min(trials, key=score)
                if score(best) < score(picked):
                    picked, improved = best, True
        return picked

    fastest = tuple(min(range(len(f.points)), key=lambda k: f.points[k].seconds) for f in frontiers)
    leanest = tuple(min(range(len(f.points)), key=lambda k: f.points[k].retained) for f in frontiers)
    ends = [descend(start, 0) for start in (fastest, leanest)]
    lowest = min(look(end).peak_bytes for end in ends)
    top = look(descend(fastest, look(fastest).peak_bytes)).peak_bytes
    for level in range(1, _LEVELS):
        room = lowest + (top - lowest) * level // _LEVELS
        ends = [descend(end, room) for end in (*ends, fastest)][-2:]
    front: list[Combination] = []
    for found in sorted(known.values(), key=lambda c: (c.peak_bytes, c.seconds)):
        if not front or found.seconds < front[-1].seconds:
            front.append(found)
    return tuple(front)
