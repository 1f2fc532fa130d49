"""Choosing among frontiers: against every combination, on random small ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.candidate import Frontier, FrontierPoint
from graphopt.chain_plan import Link, chain_peak, least_chain, plan_chain
from graphopt.planner import combinations, seconds_bound
from graphopt.schedule import Schedule


def point(forward: int, backward: int, retained: int, gradients: int, seconds: float) -> FrontierPoint:
    name = f"{forward}/{backward}/{retained}/{gradients}/{seconds}"
    return FrontierPoint(Schedule((name,)), forward, max(backward, retained), retained, gradients, seconds)


def simulated_peak(points: list[FrontierPoint]) -> int:
    """The step played out in order, as the docstring of ``chain_peak`` tells it."""
    held, peak = [], 0
    for p in points:
        peak = max(peak, sum(held) + p.forward_peak)
        held.append(p.retained)
    gradients = 0
    for p in reversed(points):
        held.pop()
        peak = max(peak, sum(held) + p.backward_peak + gradients)
        gradients += p.gradients
    return peak


def links(*frontiers: Frontier) -> list[Link]:
    return [Link(id(frontier), frontier, pinned="alone") for frontier in frontiers]


numbers = st.integers(0, 20)
points = st.builds(point, numbers, numbers, numbers, st.integers(0, 5), st.integers(0, 9).map(float))
frontiers = st.lists(st.lists(points, min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.lists(points, min_size=1, max_size=5))
def test_the_peak_of_a_step_is_that_of_playing_it_out(chosen: list[FrontierPoint]) -> None:
    assert chain_peak(chosen) == simulated_peak(chosen)


@given(frontiers, st.integers(0, 80))
@settings(max_examples=200)
def test_what_is_chosen_fits_and_refusal_is_rare(choices: list[list[FrontierPoint]], budget: int) -> None:
    group = [Frontier("test", tuple(sorted(c, key=lambda p: p.peak_bytes))) for c in choices]
    found = plan_chain(links(*group), budget)
    fitting = [c for c in itertools.product(*choices) if simulated_peak(list(c)) <= budget]
    if found is not None:
        assert simulated_peak(list(found.points)) == found.peak_bytes <= budget
        assert fitting
    if len(group) == 1:
        assert (found is None) == (not fitting)
        if found is not None:
            assert found.seconds == min(c[0].seconds for c in fitting)


@given(frontiers, st.lists(st.integers(1, 3), min_size=3, max_size=3))
@settings(max_examples=200)
def test_combinations_are_judged_whole_and_none_beats_another(
    choices: list[list[FrontierPoint]], calls: list[int]
) -> None:
    group = [Frontier("test", tuple(c)) for c in choices]
    counts = calls[: len(group)]

    def peak(chosen: Sequence[FrontierPoint]) -> int:
        return simulated_peak([p for p, count in zip(chosen, counts, strict=True) for _ in range(count)])

    front = combinations(group, counts, peak)
    for found in front:
        assert found.peak_bytes == peak(found.points)
        assert found.seconds == sum(c * p.seconds for c, p in zip(counts, found.points, strict=True))
    assert all(a.peak_bytes < b.peak_bytes and a.seconds > b.seconds for a, b in pairwise(front))
    assert front[-1].seconds == sum(
        count * min(p.seconds for p in c) for count, c in zip(counts, choices, strict=True)
    )
    if len(group) == 1:
        assert front[0].peak_bytes == min(peak([p]) for p in choices[0])


def test_without_a_budget_the_fastest_is_taken_and_near_ties_go_to_less_memory() -> None:
    near, fast = point(5, 5, 1, 0, 1.05), point(50, 50, 40, 0, 1.0)
    (link,) = links(Frontier("test", (near, fast)))
    assert plan_chain([link], None).points == (fast,)
    assert plan_chain([link], None, resolution=[0.1]).points == (near,)


def test_programs_that_share_a_frontier_are_split_where_that_pays() -> None:
    small, large = point(4, 8, 1, 0, 10.0), point(8, 8, 8, 0, 0.0)
    shared = Frontier("test", (small, large))
    found = plan_chain(links(shared, shared, shared), 18)
    assert found is not None
    assert found.peak_bytes <= 18
    assert sorted(p.seconds for p in found.points) == [0.0, 0.0, 10.0]


def test_one_program_is_chosen_to_the_byte() -> None:
    frontier = Frontier("test", (point(4, 4, 1, 0, 1.0), point(8, 8, 8, 0, 0.0)))
    assert plan_chain(links(frontier), 8).points == (frontier.points[1],)
    assert plan_chain(links(frontier), 7).points == (frontier.points[0],)
    assert plan_chain(links(frontier), 3) is None
    assert least_chain(links(frontier)).peak_bytes == 4


def test_bounds_of_programs_add_up() -> None:
    frontiers_ = [Frontier("test", (point(1, 1, 1, 0, 0.0),), 0, lambda room: float(room)) for _ in range(2)]
    assert seconds_bound(frontiers_, 15, 5) == 20.0
    assert seconds_bound(frontiers_, None) == 0.0


def test_a_budget_that_nothing_meets_has_no_bound() -> None:
    frontiers_ = [Frontier("test", (point(1, 1, 1, 0, 0.0),), 1, lambda room: math.inf if room < 1 else 2.0)]
    assert seconds_bound(frontiers_, 1) == 2.0
    assert seconds_bound(frontiers_, 0) == 0.0
