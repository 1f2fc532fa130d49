"""Ranks that do not agree are refused, all of them, and none waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphopt
from graphopt import InputsError, UnevenRanksError
from graphopt.agreement import Agreement
from graphopt.cost import Cost
from graphopt.plans import Choice, Plan
from graphopt.ranks import Ranks, ranks_of, ranks_text
from graphopt.schedule import Schedule
from tests.distributed_cases import adopted, budgets, uneven
from tests.ranks import Pair


def _together(*acts: Callable[[], Any]) -> list[Any]:
    """What each of ``acts``, run in threads, returns or raises."""
    found: list[Any] = [None] * len(acts)

    def run(number: int) -> None:
        try:
            found[number] = acts[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _ranks(count: int, seconds: float = 5.0) -> list[Ranks]:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=seconds))
    return [Ranks(tuple(range(count)), rank, store) for rank in range(count)]


def test_what_ranks_tell_is_told_to_all_again_and_again() -> None:
    ranks = _ranks(3)
    for number in range(4):
        said = _together(*(partial(r.exchange, "a number", [r.rank, number]) for r in ranks))
        assert said == [{0: [0, number], 1: [1, number], 2: [2, number]}] * 3


def test_a_rank_that_does_not_answer_is_named_in_time() -> None:
    one, _, two = _ranks(3, seconds=0.2)
    for error in _together(lambda: one.exchange("its plan", 1), lambda: two.exchange("its plan", 1)):
        assert isinstance(error, UnevenRanksError)
        assert error.message == "rank 1 did not tell its plan within 0.2 s"
        assert error.hint == "all of ranks 0-2 have to optimize the same model, in the same order"


def test_ranks_that_are_at_different_points_are_refused() -> None:
    one, two = _ranks(2)
    errors = _together(lambda: one.exchange("its plan", 1), lambda: two.exchange("its inputs", 1))
    assert [error.message for error in errors] == [
        "rank 1 tells its inputs where rank 0 tells its plan",
        "rank 0 tells its plan where rank 1 tells its inputs",
    ]


def test_ranks_as_text() -> None:
    assert ranks_text([1]) == "rank 1"
    assert ranks_text([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_what_is_no_process_group_is_refused() -> None:
    model = nn.Linear(4, 4)
    assert ranks_of(model, "auto") is None and ranks_of(model, "off") is None
    expected = "process_group is 'all': expected a torch.distributed process group"
    with pytest.raises(InputsError, match=expected):
        graphopt.optimize(model, process_group="all")


def test_uneven_ranks_are_refused_on_every_rank(pair: Pair) -> None:
    shapes, passes, failing = zip(*pair(uneven), strict=True)
    assert shapes[0] == shapes[1] and passes[0] == passes[1]
    assert shapes[0].startswith(
        "UnevenRanksError: ranks are uneven in inputs: rank 0 has float64[64, 32] on cpu, "
        "rank 1 has float64[48, 32] on cpu\n  hint: give all of ranks 0-1 the same; "
    )
    assert passes[0].startswith(
        "UnevenRanksError: ranks are uneven in passes: rank 0 has insert-checkpoints, rank 1 has normalize, "
    )
    assert failing[0].startswith(
        "UnevenRanksError: capture failed on rank 1: BudgetError: no plan fits 1.00 KiB"
    )
    assert failing[1].startswith("BudgetError: no plan fits 1.00 KiB")


def test_budgets_that_give_different_plans_are_refused(pair: Pair) -> None:
    for (refused,), notes in pair(budgets):
        assert refused.startswith("UnevenRanksError: budgets differ, and so do the plans: rank 1 has Budget(")
        assert "give all of ranks 0-1 the budget of rank 1" in refused
        assert "ranks 0-1 run the same programs and plan" in notes


@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_of_plans_that_differ_the_tightest_is_taken_by_all(pair: Pair, whole: bool) -> None:
    found = pair(adopted, whole)
    assert len({digest for _, digest in found}) == 1
    for said, _ in found:
        assert said.difference == 0.0 and said.recomputed
        assert "the plan is that of rank 1: those that ranks made themselves differed" in said.notes


def test_one_process_decides_alone() -> None:
    inputs = (torch.ones(2, 4),)
    fast = graphopt.optimize(nn.Linear(4, 4), inputs, emit="eager", pipeline="insert-checkpoints")
    assert not [note for note in fast.report.diagnostics if "rank" in note]


class Chooses:
    """A session that has planned, and what a plan would take on its rank: ``peaks`` by the plan's seconds."""

    def __init__(self, plan: Plan, peaks: dict[float, int]) -> None:
        self.current: list[Any] = []
        self.peaks = peaks
        self.adopt(plan)

    def adopt(self, plan: Plan) -> None:
        seconds = plan.predicted.seconds
        self.plan = replace(plan, predicted=replace(plan.predicted, peak_bytes=self.peaks[seconds]))


def settled(budget: int, *peaks: tuple[int, int]) -> tuple[list[Any], list[Chooses], list[list[str]]]:
    """Two ranks that planned differently, each what takes it less; ``peaks`` of both plans by rank."""
    cost = Cost(peak_bytes=0, weight_bytes=0, seconds=1.0)
    choice = Choice("g0", "f" * 16, "checks", "few", Schedule((), (), ()), 0.0)
    first = Plan(budget, "cpu", "eager", cost, cost, 0.0, 0.0, (choice,))
    told = replace(choice, alternative="other")
    other = replace(first, predicted=replace(cost, seconds=2.0), choices=(told,))
    sessions = [Chooses(first if one <= two else other, {1.0: one, 2.0: two}) for one, two in peaks]
    notes: list[list[str]] = [[], []]
    agreements = [
        Agreement(ranks, {}, f"Budget({budget})", said.append, dict.fromkeys((0, 1), f"Budget({budget})"))
        for ranks, said in zip(_ranks(2), notes, strict=True)
    ]
    acts: list[Any] = [partial(a.settle, s, s.adopt) for a, s in zip(agreements, sessions, strict=True)]
    found = _together(*acts)
    return found, sessions, notes


def test_of_plans_that_differ_one_that_fits_everywhere_is_taken() -> None:
    # The plan of rank 1, which takes least there, is beyond the budget of rank 0.
    found, sessions, notes = settled(100, (104, 100), (98, 99))
    assert found == [None, None]
    assert [s.plan.predicted.seconds for s in sessions] == [2.0, 2.0]
    assert notes == [["the plan is that of rank 0: those that ranks made themselves differed"]] * 2


def test_where_no_plan_fits_everywhere_each_rank_says_what_is_missing() -> None:
    found, _, _ = settled(100, (104, 100), (98, 103))
    for error in found:
        assert isinstance(error, UnevenRanksError)
        assert str(error).startswith(
            "the plan of rank 0 takes 103 bytes on rank 1, which has a budget of 100 bytes, and no other "
            "rank's fits everywhere"
        )
        assert "ask for budget=103 or more" in str(error)
