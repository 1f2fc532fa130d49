"""Pick one point from every program's frontier where what a choice takes depends on the others; bounds.

Where programs run once each, one after the other, ``graphopt.chain_plan`` picks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphopt.candidate import Frontier, FrontierPoint

__all__ = ["Combination", "combinations", "seconds_bound"]

_LEVELS = 32
"""Peaks between the least and the fastest combination at which fast ones are looked for."""


def seconds_bound(frontiers: Sequence[Frontier], budget_bytes: int | None, base_bytes: int = 0) -> float:
    """A proven lower bound on the seconds that recomputation adds to any plan within the budget.

    Programs only add to each other's memory, so each one's own bound holds with the rest free. 0 where no
    plan is within the budget, which a frontier says by an infinite bound.
    """
    if budget_bytes is None:
        return 0.0
    bound = sum(frontier.seconds_bound(budget_bytes - base_bytes) for frontier in frontiers)
    return bound if math.isfinite(bound) else 0.0


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
