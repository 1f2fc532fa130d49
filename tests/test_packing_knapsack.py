"""The multiple-choice knapsack: against every choice, against a solver, and how long it takes."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence

import pytest

from graphopt.packing.knapsack import Option, hull_walk, least

Problem = list[list[Option]]


def drawn(seed: int, things: int, choices: int, *, alike: bool = False) -> Problem:
    """Weights of a few sizes, each with schemes of falling error."""
    dice = random.Random(seed)
    found = []
    for _ in range(things):
        size = dice.choice([64, 128, 256]) if alike else dice.randint(50, 500)
        harm = dice.lognormvariate(0, 1)
        row: list[Option] = []
        for _ in range(choices):
            bits = dice.choice([2, 3, 4, 8, 16]) if alike else dice.uniform(2, 16)
            row.append((harm * 4**-bits * dice.uniform(0.5, 2), int(size * bits), size * dice.uniform(1, 3)))
        found.append(row)
    return found


def room(problem: Problem, resource: int, share: float) -> float:
    """A bound ``share`` of the way from the least that the problem can take to the most."""
    low = sum(min(o[resource] for o in c) for c in problem)
    high = sum(max(o[resource] for o in c) for c in problem)
    return low + share * (high - low)


def best_of_all(problem: Problem, bounds: Sequence[float | None]) -> float | None:
    values = []
    for picked in itertools.product(*problem):
        fits = all(b is None or sum(o[1 + k] for o in picked) <= b for k, b in enumerate(bounds))
        if fits:
            values.append(math.fsum(o[0] for o in picked))
    return min(values, default=None)


@pytest.mark.parametrize("two", [False, True], ids=["bytes", "bytes-and-seconds"])
@pytest.mark.parametrize("alike", [False, True], ids=["drawn", "alike"])
def test_small_problems_are_solved_as_by_trying_everything(two: bool, alike: bool) -> None:
    solved = 0
    for seed in range(60):
        problem = drawn(seed, 1 + seed % 6, 1 + seed % 4, alike=alike)
        share = (seed % 10) / 9
        bounds = (room(problem, 1, share), room(problem, 2, 1 - share / 2) if two else None)
        found, best = least(problem, bounds), best_of_all(problem, bounds)
        assert (found is None) == (best is None), seed
        if found is None or best is None:
            continue
        solved += 1
        assert found.value == pytest.approx(best, rel=1e-9), seed
        assert found.bound <= best * (1 + 1e-9)
        assert all(b is None or taken <= b for taken, b in zip(found.resources, bounds, strict=True))
        picked = [choices[j] for choices, j in zip(problem, found.picked, strict=True)]
        assert found.value == pytest.approx(math.fsum(o[0] for o in picked))
    assert solved > 30


@pytest.mark.parametrize("two", [False, True], ids=["bytes", "bytes-and-seconds"])
def test_larger_problems_are_within_five_percent_of_a_solver(two: bool) -> None:
    np = pytest.importorskip("numpy")
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(8):
        problem = drawn(100 + seed, 40, 8, alike=bool(seed % 2))
        bounds = (room(problem, 1, 0.15 + 0.08 * seed), room(problem, 2, 0.5) if two else None)
        flat = [o for choices in problem for o in choices]
        owners = np.array([i for i, choices in enumerate(problem) for _ in choices])
        rows = [(owners == i).astype(float) for i in range(len(problem))]
        low, high = [1.0] * len(rows), [1.0] * len(rows)
        for k, bound in enumerate(bounds):
            if bound is not None:
                rows.append(np.array([o[1 + k] for o in flat]))
                low.append(-np.inf)
                high.append(bound)
        solved = optimize.milp(
            np.array([o[0] for o in flat]),
            constraints=optimize.LinearConstraint(np.array(rows), low, high),
            integrality=np.ones(len(flat)),
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": 1e-6, "time_limit": 10},
        )
        found = least(problem, bounds)
        assert solved.success == (found is not None), seed
        if found is not None:
            assert found.value <= solved.fun * 1.05, seed
            assert found.bound <= solved.fun * (1 + 1e-5), seed


@pytest.mark.parametrize("two", [False, True], ids=["bytes", "bytes-and-seconds"])
def test_five_hundred_weights_of_eight_schemes_take_less_than_a_second(two: bool) -> None:
    problem = drawn(7, 500, 8)
    bounds = (room(problem, 1, 0.3), room(problem, 2, 0.6) if two else None)
    start = time.process_time()
    found = least(problem, bounds)
    taken = time.process_time() - start
    assert found is not None and found.gap < 0.05
    assert taken < 1.0


def test_no_picks_no_bounds_and_nothing_to_pick() -> None:
    problem: Problem = [[(1.0, 10.0), (3.0, 4.0)], [(2.0, 10.0), (5.0, 5.0)]]
    assert least(problem, (8.9,)) is None
    tight = least(problem, (9.0,))
    assert tight is not None and tight.picked == (1, 1) and tight.gap == 0.0
    free = least(problem, (None,))
    assert free is not None and free.picked == (0, 0) and free.bound == free.value == 3.0
    assert (empty := least([], (5.0,))) is not None and empty.picked == () and empty.value == 0.0
    with pytest.raises(ValueError, match="3 bounds: at most two are supported"):
        least([[(1.0, 1.0, 1.0, 1.0)]], (1.0, 1.0, 1.0))


def test_the_walk_along_hulls_takes_what_gains_most_first() -> None:
    options = [[(0.0, 16.0), (1.0, 8.0), (9.0, 4.0)], [(0.0, 16.0), (8.0, 8.0)], [(0.0, 3.0), (1.0, 5.0)]]
    walk = hull_walk(options)
    assert walk == [(2, 1, 0), (1, 1, 0), (1, 0, 0), (0, 0, 0)]
