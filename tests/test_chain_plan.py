"""Plans for chains: the peak against one that is played out, the table against every plan."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.candidate import Frontier, FrontierPoint
from graphopt.chain_plan import Link, Rerun, chain_peak, hull, least_chain, plan_chain
from graphopt.schedule import Schedule


def point(forward: int, extra: int, retained: int, seconds: float, gradients: int = 0) -> FrontierPoint:
    """``extra``: what the backward takes above what was retained."""
    name = f"{forward}/{extra}/{retained}/{gradients}/{seconds}"
    ahead = max(forward, retained)
    return FrontierPoint(Schedule((name,)), ahead, retained + extra, retained, gradients, seconds)


def chain(count: int, frontier: Frontier, handed: int, seconds: float = 1.0) -> list[Link]:
    """Each call hands one value to the next; the last hands it to the caller."""
    return [Link(0, frontier, ((handed, k + 1),), seconds) for k in range(count)]


class Played:
    """A step played out call by call. What a call retains includes what it hands on."""

    def __init__(self, points: Sequence[FrontierPoint], links: Sequence[Link]) -> None:
        self.points, self.links, self.peak, self.gradients = points, links, 0, 0

    def run(
        self, start: int, stop: int, rows: Sequence[Rerun], held: int, arrived: int, inside: bool = False
    ) -> None:
        entered: list[tuple[int, Rerun | None, int]] = []
        position = start
        while position < stop:
            row = next((row for row in rows if row.start == position), None)
            end = row.stop if row else position + 1
            gone = 0 if row or (inside and position == start) else self.points[position].spared
            entered.append((position, row, held - gone))
            for k in range(position, end):
                p = self.points[k]
                passing = self.links[k - 1].handed if row and k > position else 0
                self.peak = max(self.peak, held + arrived + passing + p.forward_peak)
            held += self.links[end - 1].handed if row else self.points[position].retained - gone
            position = end
        for position, row, before in reversed(entered):
            if row:
                arriving = self.links[row.stop - 1].handed + self.gradients
                self.run(row.start, row.stop, row.inner, before, arriving, inside=True)
            else:
                self.peak = max(self.peak, before + self.points[position].backward_peak + self.gradients)
                self.gradients += self.points[position].gradients


def played(points: Sequence[FrontierPoint], links: Sequence[Link], rows: Sequence[Rerun]) -> int:
    step = Played(points, links)
    step.run(0, len(points), rows, 0, 0)
    return step.peak


def rows_of(start: int, stop: int, depth: int = 2) -> Iterator[tuple[Rerun, ...]]:
    """Every way to let rows of calls run again."""
    if start == stop:
        yield ()
        return
    yield from rows_of(start + 1, stop, depth)
    if depth:
        for end in range(start + 1, stop + 1):
            for inner in rows_of(start, end, depth - 1):
                if inner and inner[0].start == start and inner[0].stop == end:
                    continue
                for rest in rows_of(end, stop, depth):
                    yield (Rerun(start, end, inner), *rest)


sizes = st.integers(0, 12)
points = st.builds(point, sizes, sizes, st.integers(3, 15), st.integers(0, 9).map(float), st.integers(0, 2))


@given(st.lists(points, min_size=1, max_size=4), st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_the_peak_is_that_of_playing_the_step_out(choices: list[FrontierPoint], handed: int, random) -> None:
    links = chain(5, Frontier("test", tuple(choices)), handed)
    taken = [random.choice(choices) for _ in links]
    taken = [taken[0], *(replace(p, spared=random.choice((0, handed))) for p in taken[1:])]
    rows = random.choice(list(rows_of(0, 5)))
    assert chain_peak(taken, links, rows) == played(taken, links, rows)


def cost(points: Sequence[FrontierPoint], links: Sequence[Link], rows: Sequence[Rerun]) -> float:
    def again(rows: Sequence[Rerun]) -> float:
        own = sum(links[k].forward_seconds for r in rows for k in range(r.start, r.stop))
        return own + sum(again(r.inner) for r in rows)

    return sum(p.seconds for p in points) + again(rows)


@given(st.lists(points, min_size=1, max_size=2), st.integers(0, 3), st.integers(5, 60))
@settings(max_examples=100, deadline=None)
def test_the_table_finds_what_every_plan_looked_at_has_best(
    choices: list[FrontierPoint], handed: int, room: int
) -> None:
    # Nested as deep as three calls allow: nothing that the table may choose is left out.
    every_way = list(rows_of(0, 3, depth=3))
    links = chain(3, Frontier("test", tuple(choices)), handed)
    found = plan_chain(links, room)
    every = [
        cost(taken, links, rows)
        for taken in itertools.product(choices, repeat=3)
        for rows in every_way
        if played(taken, links, rows) <= room
    ]
    if found is None:
        # Rounding may cost a plan that fits to the last byte.
        slack = [p for t in itertools.product(choices, repeat=3) for r in every_way
                 if (p := played(t, links, r)) <= room - 3]  # fmt: skip
        assert not slack
        return
    assert played(found.points, links, found.reruns) == found.peak_bytes <= room
    assert found.seconds == pytest.approx(cost(found.points, links, found.reruns))
    tight = [
        cost(taken, links, rows)
        for taken in itertools.product(choices, repeat=3)
        for rows in every_way
        if played(taken, links, rows) <= room - 3
    ]
    assert found.seconds >= min(every) - 1e-9
    assert not tight or found.seconds <= min(tight) + 1e-9


BLOCK = Frontier("test", (point(40, 60, 30, 0.0), point(40, 75, 20, 0.1), point(40, 90, 10, 0.8)))


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_long_chains_come_down_to_a_few_blocks_and_use_their_room(count: int) -> None:
    links = chain(count, BLOCK, 10)
    begun = time.perf_counter()
    least = least_chain(links)
    assert least.peak_bytes <= 170
    fastest = None
    for share in (0.9, 0.5, 0.25):
        room = int(30 * count * share)
        found = plan_chain(links, max(room, 200))
        assert found is not None and found.peak_bytes <= max(room, 200)
        assert found.peak_bytes == played(found.points, links, found.reruns)
        assert fastest is None or found.seconds >= fastest
        fastest = found.seconds
        # Checkpoints at every square root of the chain: one more forward, and the rows' own values.
    root = round(count**0.5)
    by_hand = tuple(Rerun(k, min(k + root, count)) for k in range(0, count, root))
    taken = [BLOCK.points[0]] * count
    peak = chain_peak(taken, links, by_hand)
    mine = plan_chain(links, peak)
    assert mine is not None
    assert mine.seconds <= cost(taken, links, by_hand)
    assert time.perf_counter() - begun < 60


def test_calls_that_are_pinned_never_run_again() -> None:
    links = [Link(0, BLOCK, ((10, k + 1),), 1.0, "it writes") for k in range(20)]
    found = plan_chain(links, 20 * 10 + 100)
    assert found is not None and found.reruns == ()
    assert least_chain(links).reruns == ()
    assert plan_chain(links, 150) is None
    assert least_chain(chain(20, BLOCK, 10)).peak_bytes <= 150


def test_few_schedules_are_used_for_many_calls() -> None:
    many = Frontier("test", tuple(point(40, 60 + k, 30 - k, k * k / 10) for k in range(20)))
    for room in (500, 700, 900):
        found = plan_chain(chain(40, many, 10), room)
        assert found is not None
        assert len(set(found.points)) <= 2


def moving(base: FrontierPoint, moved: int, seconds: float) -> FrontierPoint:
    return replace(base, moved_bytes=moved, offloaded=("x",), seconds=base.seconds + seconds)


def test_what_is_moved_leaves_room_and_stays_beside_the_next_call() -> None:
    stays = point(40, 60, 30, 0.0)
    away = moving(stays, 20, 0.01)
    again = point(40, 80, 10, 1.0)
    links = chain(20, Frontier("test", (stays, away, again), host_bytes=10**6), 0)
    # Each call finds 10 of every one before it, and 20 more of the last.
    assert chain_peak([away] * 20, links) == 19 * 10 + 20 + 90
    assert chain_peak([away, stays], links) == 10 + 20 + 90
    assert chain_peak([stays, away], links) == 30 + 90
    plan = plan_chain(links, 310)
    assert plan is not None and plan.peak_bytes <= 310
    assert plan.seconds < 1.0
    assert plan_chain(links, None).points == (stays,) * 20


def test_the_host_holds_no_more_than_it_may() -> None:
    stays, again = point(40, 60, 30, 0.0), point(40, 60, 10, 1.0)
    offered = (stays, moving(stays, 20, 0.01), moving(stays, 10, 0.005), again)
    for host in (0, 100, 200, 300, 10**6):
        links = chain(20, Frontier("test", offered, host_bytes=host), 0)
        plan = plan_chain(links, 320)
        assert plan is not None and plan.peak_bytes <= 320
        assert sum(p.moved_bytes for p in plan.points) <= host


def test_a_call_may_move_more_than_it_keeps() -> None:
    given = moving(point(40, 60, 5, 0.0), 20, 0.01)
    links = chain(6, Frontier("test", (given,), host_bytes=10**6), 0)
    plan = plan_chain(links, 200)
    assert plan is not None and plan.peak_bytes == chain_peak([given] * 6, links) <= 200


@given(st.lists(points, min_size=1, max_size=12))
@settings(max_examples=100)
def test_sums_are_best_made_of_neighbours_on_the_hull(choices: list[FrontierPoint]) -> None:
    kept = hull(choices)
    assert {p.retained for p in kept[:1]} <= {min(p.retained for p in choices)}
    assert min(p.seconds for p in choices) == kept[-1].seconds
    for point in choices:
        # Nothing lies below the line between two neighbours.
        for a, b in itertools.pairwise(kept):
            if a.retained <= point.retained <= b.retained:
                across = a.seconds * (b.retained - point.retained) + b.seconds * (point.retained - a.retained)
                assert point.seconds * (b.retained - a.retained) >= across


def test_of_many_calls_the_pair_of_schedules_is_taken_that_is_best_together() -> None:
    """What a plan uses most need not be what two schedules do best."""
    curve = Frontier(
        "test",
        (
            point(10, 5, 1, 90.0),
            point(10, 5, 4, 40.0),
            point(10, 5, 6, 25.0),
            point(12, 5, 12, 0.0),
        ),
    )
    links = chain(10, curve, 1, seconds=1000.0)
    plan = plan_chain(links, 60)
    assert plan is not None and plan.peak_bytes <= 60
    assert len({p.schedule for p in plan.points}) <= 2
    pairs = [
        found
        for pair in itertools.combinations(curve.points, 2)
        if (found := plan_chain([replace(k, frontier=replace(curve, points=pair)) for k in links], 60))
    ]
    assert plan.seconds == min(found.seconds for found in pairs)
