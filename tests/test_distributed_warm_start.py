"""Ranks take over what earlier processes made all together, or none of them does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from graphopt.agreement import Agreement, Offer
from tests.distributed_cases import kept_apart, kept_by_budget, started, told
from tests.ranks import Pair
from tests.test_distributed_agreement import _ranks, _together

TAKEN = "warm start: plan and code are those of an earlier process"
ANEW = "warm start: planned and compiled anew, as "
LATER = (
    f"{ANEW}it holds collectives, and ranks ask each other about their first program alone; "
    "kept for later ones"
)
EMIT = ["eager", "inductor"]


def warm_notes(notes: list[str]) -> list[str]:
    return [note for note in notes if note.startswith("warm start")]


@pytest.fixture(scope="module", params=EMIT)
def filled(
    request: pytest.FixtureRequest, pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, list[str]]:
    """Where both ranks kept their steps, what is emitted, and the plan of each rank."""
    folder, emit = tmp_path_factory.mktemp("ranks"), request.param
    found = pair(started, folder, emit, None)
    for notes, _, worst in found:
        assert warm_notes(notes) == [f"{ANEW}none was kept; kept for later ones"] * 3
        assert max(worst) < 1e-12
    return folder, emit, [plan for _, plan, _ in found]


@pytest.mark.parametrize("cold", [0, 1])
def test_ranks_that_start_warm_beside_one_that_starts_cold_plan_anew(
    pair: Pair, filled: tuple[Path, str, list[str]], cold: int
) -> None:
    folder, emit, plans = filled
    for rank, (notes, plan, worst) in enumerate(pair(started, folder, emit, cold)):
        first, *later = warm_notes(notes)
        if rank == cold:
            assert first == f"{ANEW}none was kept; kept for later ones"
            assert later == [f"{ANEW}none was kept; kept for later ones"] * 2
        else:
            assert first == f"{ANEW}rank {cold} takes nothing over: none was kept; kept for later ones"
            # One rank alone would be asked whether it planned the same.
            assert later == [LATER] * 2
        assert plan == plans[rank]
        assert f"ranks 0-1 run the same programs and plan [{plan}]" in notes
        assert max(worst) < 1e-12


def test_ranks_that_kept_the_same_take_it_over(pair: Pair, filled: tuple[Path, str, list[str]]) -> None:
    folder, emit, plans = filled
    for rank, (notes, plan, worst) in enumerate(pair(started, folder, emit, None)):
        assert warm_notes(notes) == [TAKEN, LATER, LATER]
        assert plan == plans[rank]
        assert f"ranks 0-1 run the same programs and plan [{plan}]" in notes
        assert max(worst) < 1e-12


def test_ranks_that_are_not_asked_take_over_no_collectives(
    pair: Pair, filled: tuple[Path, str, list[str]]
) -> None:
    folder, emit, _ = filled
    for notes in pair(told, folder, emit, [{"process_group": "off"}] * 2):
        assert warm_notes(notes) == [
            f"{ANEW}it holds collectives, and ranks are not asked what they take over; kept for later ones"
        ]


def test_a_rank_that_keeps_nothing_has_all_plan_anew(
    pair: Pair, filled: tuple[Path, str, list[str]]
) -> None:
    folder, emit, _ = filled
    without, beside = pair(told, folder, emit, [{"cache": False}, {}])
    assert not warm_notes(without)
    assert warm_notes(beside) == [
        f"{ANEW}rank 0 takes nothing over: it neither reads nor keeps what was made; kept for later ones"
    ]


@pytest.mark.parametrize("emit", EMIT)
def test_programs_that_differ_are_refused_whoever_kept_them(pair: Pair, emit: str, tmp_path: Path) -> None:
    for found in pair(kept_apart, tmp_path, emit):
        for refused in found:
            assert refused.startswith(
                "UnevenRanksError: ranks 0 and 1 captured different programs: graph of g0"
            )
            assert "ranks have to run the same model on inputs of the same shapes" in refused


@pytest.mark.parametrize("emit", EMIT)
def test_plans_that_were_kept_under_other_budgets_are_none_of_all_ranks(
    pair: Pair, emit: str, tmp_path: Path
) -> None:
    found = pair(kept_by_budget, tmp_path, emit)
    for refused, notes, plan, kept in found:
        assert refused.startswith("UnevenRanksError: budgets differ, and so do the plans: rank 1 has Budget(")
        assert "give all of ranks 0-1 the budget of rank 1" in refused
        assert warm_notes(notes) == [f"{ANEW}the plan that ranks 0 and 1 kept differ; kept for later ones"]
        assert plan == kept


OFFER = Offer("plan", ("program",), False)


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (OFFER, OFFER, ["", ""]),
        (OFFER, "none was kept", ["rank 1 takes nothing over: none was kept", "none was kept"]),
        (OFFER, Offer("other", ("program",), False), ["the plan that ranks 0 and 1 kept differ"] * 2),
        (OFFER, Offer("plan", ("other",), False), ["the programs that ranks 0 and 1 kept differ"] * 2),
    ],
)
def test_what_ranks_take_over(one: Offer | str, other: Offer | str, why: list[str]) -> None:
    agreements = [Agreement(ranks, {}, "", str) for ranks in _ranks(2)]
    offers = zip(agreements, (one, other), strict=True)
    assert _together(*(partial(agreement.take_over, offer) for agreement, offer in offers)) == why
    # Nothing is asked a second time.
    assert agreements[0].take_over(OFFER) == "ranks agree on one program of a capture alone"
    assert agreements[0].take_over("none was kept") == "none was kept"


def test_a_rank_that_captures_nothing_keeps_none_waiting() -> None:
    one, other = (Agreement(ranks, {}, "", str) for ranks in _ranks(2))
    said: list[str] = []

    def fails() -> None:
        raise ValueError("nothing here can be captured")

    found = _together(
        lambda: one.capture(lambda: said.append(one.take_over(OFFER))), lambda: other.capture(fails)
    )
    assert said == ["rank 1 takes nothing over: it captured no whole model"]
    assert str(found[0]).startswith("capture failed on rank 1: ValueError: nothing here can be captured")
    assert isinstance(found[1], ValueError)
