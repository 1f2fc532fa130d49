"""One option for each of many things, least value within bounds: a multiple-choice knapsack, its gap proven.

1. Lagrange multipliers of the bounds give a lower bound of every solution. With one bound they are found on
   the lower convex hull of each thing's options: going along the hulls in the order of their slopes is the
   linear relaxation, and rounding it down a solution (Sinha and Zoltners 1979). With two, the second
   multiplier is found by bisection around that.
2. An option whose reduced cost alone lifts the bound above the best solution known is in no better one.
3. What is left is solved by dynamic programming over (resources, value), dominated states and those whose
   bound is no better dropped (Pisinger 1995). Where more states are left than are kept, the least bound of
   those dropped is what is proven.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Solution", "hull_walk", "least"]

Option = tuple[float, ...]
"""Value, then what it takes of each resource."""

_STATES = (8192, 768)
"""States kept after each thing, with one bound and with two."""

_TOLERANCE = 1e-12
"""Share by which sums of the same numbers in another order may differ."""


@dataclass(frozen=True)
class Solution:
    """An option for each thing, by number; ``bound``: no solution has a value below it."""

    picked: tuple[int, ...]
    value: float
    bound: float
    resources: tuple[float, ...]

    @property
    def gap(self) -> float:
        """Share by which the value may be above the least; infinite where nothing above 0 is proven."""
        excess = max(0.0, self.value - self.bound)
        if excess <= _TOLERANCE * abs(self.value):
            return 0.0
        return excess / self.bound if self.bound > 0 else math.inf


def least(options: Sequence[Sequence[Option]], bounds: Sequence[float | None]) -> Solution | None:
    """The picks of least value whose sums of resources are within ``bounds`` (``None``: no bound).

    ``options[i]`` are those of thing i, one of which is picked, each a value and as many resources as there
    are bounds, at most two of which bound. ``None``: no picks are within (with two bounds: none was found).
    """
    kept = [k for k, bound in enumerate(bounds) if bound is not None]
    if len(kept) > 2:
        raise ValueError(f"{len(kept)} bounds: at most two are supported")
    limits = [float(bound) for bound in bounds if bound is not None]
    reduced = [[(o[0], *(o[1 + k] for k in kept)) for o in choices] for choices in options]
    places = [_undominated(choices) for choices in reduced]
    problem = [[choices[j] for j in place] for choices, place in zip(reduced, places, strict=True)]
    found = _Search(problem, limits).solve()
    if found is None:
        return None
    picked, bound = found
    numbers = tuple(place[j] for place, j in zip(places, picked, strict=True))
    chosen = [choices[j] for choices, j in zip(options, numbers, strict=True)]
    sums = tuple(sum(o[1 + k] for o in chosen) for k in range(len(bounds)))
    value = math.fsum(o[0] for o in chosen)
    return Solution(numbers, value, min(bound, value), sums)


def hull_walk(options: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[int, ...]]:
    """Picks along the lower convex hulls of (value, resource), least resource first, least value last.

    Each is of least value for what it takes.
    """
    picked = [min(range(len(c)), key=lambda j: (c[j][1], c[j][0])) for c in options]
    walk = [tuple(picked)]
    for _, thing, option in _upgrades(options):
        picked[thing] = option
        walk.append(tuple(picked))
    return walk


def _undominated(choices: Sequence[Option]) -> list[int]:
    """Numbers of the options that no other is as good as in everything; of equals the first."""
    found: list[int] = []
    for j in sorted(range(len(choices)), key=lambda j: (*choices[j][::-1], j)):
        if not any(all(a <= b for a, b in zip(choices[k], choices[j], strict=True)) for k in found):
            found.append(j)
    return sorted(
        j
        for j in found
        if not any(k != j and all(a <= b for a, b in zip(choices[k], choices[j], strict=True)) for k in found)
    )


def _hull(choices: Sequence[tuple[float, float]]) -> list[int]:
    """Options on the lower convex hull, least resource first, value falling."""
    hull: list[int] = []
    for j in sorted(range(len(choices)), key=lambda j: (choices[j][1], choices[j][0])):
        value, taken = choices[j]
        if hull and value >= choices[hull[-1]][0]:
            continue
        while len(hull) > 1:
            (v0, t0), (v1, t1) = choices[hull[-2]], choices[hull[-1]]
            if (v1 - v0) * (taken - t0) < (value - v0) * (t1 - t0):
                break
            hull.pop()
        hull.append(j)
    return hull


def _upgrades(options: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, int, int]]:
    """Steps along the hulls, (slope, thing, option), what gains most for what it takes first."""
    steps = []
    for thing, choices in enumerate(options):
        hull = _hull(choices)
        for a, b in itertools.pairwise(hull):
            slope = (choices[b][0] - choices[a][0]) / (choices[b][1] - choices[a][1])
            steps.append((slope, thing, b))
    # A hull's own slopes rise: sorting keeps the order of its steps.
    return sorted(steps, key=lambda step: step[0])


class _Search:
    """One problem: options without dominated ones, as many resources as limits."""

    def __init__(self, options: Sequence[Sequence[Option]], limits: Sequence[float]) -> None:
        self.options, self.limits = options, limits
        self.best: tuple[int, ...] | None = None
        self.value = math.inf
        self.bound = -math.inf
        self.multipliers = [0.0] * len(limits)

    def solve(self) -> tuple[tuple[int, ...], float] | None:
        """Picks, and a lower bound of all; ``None`` where none are within the limits."""
        for k, limit in enumerate(self.limits):
            if sum(min(o[1 + k] for o in choices) for choices in self.options) > limit:
                return None
        self._offer([min(range(len(c)), key=lambda j: c[j]) for c in self.options])
        if self.best is not None or not self.limits:
            assert self.best is not None
            return self.best, self.value
        self._relax()
        if self.best is None and len(self.limits) == 2:
            # Least of the second resource within the first: within both, if anything is.
            swapped = least([[(o[2], o[1]) for o in c] for c in self.options], [self.limits[0]])
            if swapped is not None:
                self._offer(swapped.picked)
        bound = self._refine()
        return None if self.best is None else (self.best, min(bound, self.value))

    def _offer(self, picked: Sequence[int]) -> bool:
        chosen = [choices[j] for choices, j in zip(self.options, picked, strict=True)]
        for k, limit in enumerate(self.limits):
            if sum(o[1 + k] for o in chosen) > limit:
                return False
        value = math.fsum(o[0] for o in chosen)
        if value < self.value:
            self.best, self.value = tuple(picked), value
        return True

    def _relax(self) -> None:
        """Multipliers of a good bound, and solutions met on the way."""
        if len(self.limits) == 1:
            self._walk(0.0)
            return
        low, high = 0.0, 1.0
        spread = [(max(o[0] for o in c) - min(o[0] for o in c)) for c in self.options]
        saved = [(max(o[2] for o in c) - min(o[2] for o in c)) for c in self.options]
        scale = max((v / s for v, s in zip(spread, saved, strict=True) if s > 0), default=0.0)
        if self._walk(0.0) <= self.limits[1] or scale == 0:
            return
        while self._walk(high * scale) > self.limits[1] and high < 1e9:
            low, high = high, 8 * high
        for _ in range(40):
            middle = (low + high) / 2
            if self._walk(middle * scale) > self.limits[1]:
                low = middle
            else:
                high = middle

    def _walk(self, second: float) -> float:
        """Solve the relaxation of the first limit, the second resource priced; what that takes of the
        second (0 without one)."""
        priced = [[(o[0] + (second * o[2] if second else 0.0), o[1]) for o in c] for c in self.options]
        picked = [min(range(len(c)), key=lambda j: (c[j][1], c[j][0])) for c in priced]
        room = self.limits[0] - sum(c[j][1] for c, j in zip(priced, picked, strict=True))
        first = 0.0
        stopped: set[int] = set()
        taken = list(picked)
        for slope, thing, option in _upgrades(priced):
            step = priced[thing][option][1] - priced[thing][taken[thing]][1]
            if step > room:
                if not first:
                    first = -slope
                    picked = list(taken)
                stopped.add(thing)
            if thing in stopped:
                continue
            room -= step
            taken[thing] = option
        if not first:
            picked = list(taken)
        self._offer(taken)
        multipliers = [first, second][: len(self.limits)]
        bound = self._dual(multipliers)
        if bound > self.bound:
            self.bound, self.multipliers = bound, multipliers
        if len(self.limits) < 2:
            return 0.0
        return sum(c[j][2] for c, j in zip(self.options, picked, strict=True))

    def _dual(self, multipliers: Sequence[float]) -> float:
        total = math.fsum(
            min(o[0] + sum(m * r for m, r in zip(multipliers, o[1:], strict=True)) for o in c)
            for c in self.options
        )
        return total - sum(m * limit for m, limit in zip(multipliers, self.limits, strict=True))

    def _refine(self) -> float:
        """Dynamic programming over what the bound leaves open; a lower bound of all solutions."""
        things = []
        bound, slack = self.bound, _TOLERANCE * (abs(self.value) if math.isfinite(self.value) else 0.0)
        for number, choices in enumerate(self.options):
            reduced = [
                o[0] + sum(m * r for m, r in zip(self.multipliers, o[1:], strict=True)) for o in choices
            ]
            lowest = min(reduced)
            open_ = [j for j, c in enumerate(reduced) if bound + (c - lowest) < self.value - slack]
            if not open_:
                open_ = [reduced.index(lowest)]
            things.append((number, open_, [reduced[j] - lowest for j in open_]))
        # Those that are hardest to tell apart last: states stay few for long.
        things.sort(key=lambda thing: (len(thing[1]) > 1, -sum(thing[2])))
        count = len(self.limits)
        rest = torch.zeros(len(things) + 1, count, dtype=torch.float64)
        for at in range(len(things) - 1, -1, -1):
            number, open_, _ = things[at]
            for k in range(count):
                rest[at, k] = rest[at + 1, k] + min(self.options[number][j][1 + k] for j in open_)
        limits = torch.tensor(self.limits, dtype=torch.float64)
        used = torch.zeros(1, count, dtype=torch.float64)
        excess, value = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        history: list[tuple[torch.Tensor, torch.Tensor]] = []
        dropped = math.inf
        for at, (number, open_, extra) in enumerate(things):
            own = torch.tensor([self.options[number][j] for j in open_], dtype=torch.float64)
            width = len(open_)
            used = (used[:, None] + own[None, :, 1:]).reshape(-1, count)
            excess = (excess[:, None] + torch.tensor(extra, dtype=torch.float64)[None]).reshape(-1)
            value = (value[:, None] + own[None, :, 0]).reshape(-1)
            alive = torch.nonzero(
                ((used + rest[at + 1]) <= limits).all(1) & (bound + excess < self.value - slack)
            ).view(-1)
            if not len(alive):
                # Nothing better than what is known, but for what was dropped.
                return min(dropped, self.value)
            alive = alive[_undominated_states(used[alive], value[alive])]
            most = _STATES[count - 1]
            if len(alive) > most:
                order = torch.argsort(excess[alive], stable=True)
                dropped = min(dropped, bound + float(excess[alive[order[most]]]))
                alive = alive[order[:most]]
            history.append((alive // width, alive % width))
            used, excess, value = used[alive], excess[alive], value[alive]
        state = int(torch.argmin(value))
        picked = [0] * len(things)
        for (number, open_, _), (parent, choice) in zip(reversed(things), reversed(history), strict=True):
            picked[number] = open_[int(choice[state])]
            state = int(parent[state])
        self._offer(picked)
        return min(dropped, self.value)


def _undominated_states(used: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Positions of states than which no other takes as little of everything at no higher value."""
    order = torch.argsort(value, stable=True)
    for k in range(used.shape[1] - 1, -1, -1):
        order = order[torch.argsort(used[order, k], stable=True)]
    value, used = value[order], used[order]
    before = torch.cat([value.new_full((1,), math.inf), torch.cummin(value, 0).values[:-1]])
    if used.shape[1] == 1:
        return order[value < before]
    # Equal in both resources: the first is the best. Beyond that, among as many as can be compared at once.
    same = torch.cat([value.new_zeros(1, dtype=torch.bool), (used[1:] == used[:-1]).all(1)])
    keep = torch.nonzero(~same).view(-1)
    if len(keep) <= 2048:
        v, u = value[keep], used[keep, 1]
        earlier = torch.ones(len(keep), len(keep), dtype=torch.bool).tril(-1)
        worse = ((v[None] <= v[:, None]) & (u[None] <= u[:, None]) & earlier).any(1)
        keep = keep[~worse]
    return order[keep]
