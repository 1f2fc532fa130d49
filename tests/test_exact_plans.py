"""Solvers of insert-checkpoints against every state of random steps; bounds that hold; plans that run."""

from __future__ import annotations

import builtins
import importlib.util
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from benchmarks.exhaustive import least_seconds as oracle
from benchmarks.exhaustive import random_step
from graphopt_passes.insert_checkpoints import InsertCheckpoints
from graphopt_passes.insert_checkpoints.bound import peak_floor, seconds_bound
from graphopt_passes.insert_checkpoints.evaluate import Evaluation, Evaluator
from graphopt_passes.insert_checkpoints.exact import chosen_solver, milp, plans, solve
from graphopt_passes.insert_checkpoints.exact.order import fits
from graphopt_passes.insert_checkpoints.exact.relaxation import least_seconds
from graphopt_passes.insert_checkpoints.exact.relaxed import two_stages
from graphopt_passes.insert_checkpoints.exact.stages import Stages
from graphopt_passes.insert_checkpoints.model import StepModel

SOLVERS = ["milp", pytest.param("cp-sat", marks=pytest.mark.skipif(
    importlib.util.find_spec("ortools") is None, reason="OR-Tools is not installed"))]  # fmt: skip


def peaks(model: StepModel) -> tuple[int, int]:
    """Of the plan that hands over all that it may, and of the one that hands over nothing."""
    evaluate = Evaluator(model)
    everything = frozenset(b for b, may in enumerate(model.savable) if may)
    return evaluate(everything).peak, evaluate(frozenset()).peak


def cases(count: int, size: int) -> list[tuple[StepModel, int]]:
    """Random steps with targets at which recomputation is needed and possible."""
    found = []
    for seed in range(10_000):
        model = random_step(seed, 3 + seed % (size - 2), 3 + seed // 3 % (size - 2))
        top, bare = peaks(model)
        low = min(top, bare) * 9 // 10
        target = low + (top - low) * (seed % 7) // 7
        if 0 < oracle(model, target) < math.inf:
            found.append((model, target))
            if len(found) == count:
                return found
    raise AssertionError("too few random steps need recomputation")


@pytest.fixture(scope="module")
def small() -> list[tuple[StepModel, int]]:
    return cases(40, 7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_optimum_is_that_of_going_through_every_state(
    small: list[tuple[StepModel, int]], solver: str
) -> None:
    reached = 0
    for model, target in small:
        best = oracle(model, target)
        solved = solve(Evaluator(model), target, solver, 30.0)
        assert solved.least == pytest.approx(best, rel=1e-5)
        assert solved.bound <= best * (1 + 1e-9)
        assert solved.bound >= best * (1 - 1e-5)
        if solved.plan is not None:
            assert solved.plan.peak <= target
            assert solved.plan.seconds >= best * (1 - 1e-9)
            reached += solved.plan.seconds <= best * (1 + 1e-9)
    # The rest asks for an order, or for letting go of what was handed over, that the evaluator has not.
    assert reached > len(small) * 2 // 3


def test_a_target_that_nothing_meets_is_proven_to_be_one() -> None:
    model = random_step(5, 6, 6)
    target = peak_floor(model) - 1
    assert oracle(model, target) == math.inf
    solved = solve(Evaluator(model), target, "milp", 10.0)
    assert (solved.plan, solved.bound, solved.least) == (None, math.inf, None)
    assert seconds_bound(model)(target) == math.inf


@given(st.integers(0, 10**6), st.integers(3, 8), st.integers(1, 8), st.floats(0, 1), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_bounds_hold_however_slots_are_taken_together(
    seed: int, operators: int, slots: int, part: float, length: int
) -> None:
    model = random_step(seed, operators, slots)
    top, bare = peaks(model)
    target = int(min(top, bare) * 0.8 + (top - min(top, bare) * 0.8) * part)
    best = oracle(model, target) * (1 + 1e-9) + 1e-12
    coarse = Stages(model, target, range(0, slots, length))
    assert least_seconds(coarse, 10.0) <= best
    assert milp.solve(coarse, 10.0).bound <= best
    assert milp.solve(two_stages(model, target), 10.0).bound <= best
    fine = Stages(model, target, range(slots))
    for k in range(slots):
        fine.inside(k)
    assert milp.solve(fine, 10.0).bound <= best
    assert seconds_bound(model)(target) <= best
    if best < math.inf:
        assert peak_floor(model) <= target


@given(st.integers(0, 10**6), st.integers(3, 12), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_bounds_hold_for_what_the_evaluator_runs(
    seed: int, operators: int, slots: int, data: st.DataObject
) -> None:
    model = random_step(seed, operators, slots)
    may = [b for b, savable in enumerate(model.savable) if savable]
    item = Evaluator(model)(frozenset(data.draw(st.lists(st.sampled_from(may)))) if may else frozenset())
    assert seconds_bound(model)(item.peak) <= item.seconds * (1 + 1e-9) + 1e-12
    assert peak_floor(model) <= item.peak


def test_nothing_is_made_again_for_a_backward_that_reads_nothing() -> None:
    model = random_step(0, 3, 0)
    top, _ = peaks(model)
    for solver in ("milp", "cp-sat"):
        solved = solve(Evaluator(model), top, solver, 5.0)
        assert (solved.bound, solved.least) == (0, 0)
    assert seconds_bound(model)(top) == 0
    assert seconds_bound(model)(0) == math.inf


def test_rows_left_out_only_weaken_a_bound() -> None:
    model = random_step(3, 12, 12)
    top, bare = peaks(model)
    target = (top + min(top, bare)) // 2
    every = least_seconds(Stages(model, target, [0]), 10.0)
    some = least_seconds(Stages(model, target, [0], frozenset({2, 5}), frozenset({3})), 10.0)
    assert 0 <= some <= every <= oracle(model, target) * (1 + 1e-9)
    assert every > 0


def test_an_order_is_found_where_only_the_other_one_does_not_fit() -> None:
    """Two operators from nothing: the large one first leaves room for the small one's scratch memory."""
    model = random_step(0, 2, 1)
    model.size[:] = [100, 10]
    model.maker[:], model.inputs[:], model.outputs[:] = [0, 1], [(), ()], [(0,), (1,)]
    model.workspace_again[:] = [50, 0]
    slot = model.slots[0]
    own = model.output_bytes + slot.before
    assert fits(model, 0, frozenset(), {0, 1}, frozenset({0, 1}), own + 150) is True
    assert fits(model, 0, frozenset({1}), {0}, frozenset({0, 1}), own + 150) is False
    assert fits(model, 0, frozenset({1}), {0}, frozenset({0, 1}), own + 160) is True


def test_plans_take_no_longer_than_they_may_and_are_true() -> None:
    model = random_step(11, 14, 14)
    evaluate = Evaluator(model)
    top, bare = peaks(model)
    found = plans(evaluate, min(top, bare), max(top, bare), "milp", 5.0)
    assert found
    for item in found:
        again: Evaluation = evaluate(item.saved, item.released)
        assert (again.peak, again.seconds) == (item.peak, item.seconds)
    assert plans(evaluate, min(top, bare), top, "milp", 0.0) == []
    assert plans(evaluate, min(top, bare), top, "", 5.0) == []


def test_time_that_runs_out_leaves_what_was_known() -> None:
    model = random_step(11, 14, 14)
    evaluate = Evaluator(model)
    known = evaluate(frozenset())
    assert known.seconds > 0
    solved = solve(evaluate, known.peak, "milp", 0.0, known)
    assert (solved.plan, solved.bound, solved.least) == (known, 0.0, None)


def test_solvers_are_named() -> None:
    assert chosen_solver("auto") == "milp"
    assert chosen_solver("none") == ""
    with pytest.raises(graphopt.PassError) as refused:
        InsertCheckpoints(solver="mlip")
    assert str(refused.value) == (
        "insert-checkpoints: solver='mlip': expected one of 'auto', 'milp', 'cp-sat', 'none'\n"
        "  hint: did you mean 'milp'?"
    )
    with pytest.raises(graphopt.PassError, match="solver_seconds=-1: expected a number, 0 or more"):
        InsertCheckpoints(solver_seconds=-1)


def test_a_solver_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "ortools" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(graphopt.PassError) as refused:
        InsertCheckpoints(solver="cp-sat")
    assert str(refused.value) == (
        "insert-checkpoints: solver='cp-sat' needs OR-Tools, which is not installed\n"
        "  hint: pip install 'graphopt[exact]', or take solver='milp'"
    )
    assert InsertCheckpoints().solver == "auto"


def test_ortools_is_not_imported_without_being_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(name: str, *rest: Any, **named: Any) -> Any:
        assert not name.startswith("ortools")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", guarded)
    model = random_step(11, 8, 8)
    top, _ = peaks(model)
    assert solve(Evaluator(model), top, chosen_solver("auto"), 5.0).bound >= 0
