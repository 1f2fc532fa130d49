"""Work that is not done twice: passes and searches over what was seen before, forms of large programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import graphopt
import graphopt_passes.insert_checkpoints as insert_checkpoints
from graphopt import offered_schedules
from graphopt.api import dry_run
from graphopt.budget import Budget
from graphopt.candidate import Candidate, CostDelta, Frontier, FrontierPoint
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt_passes.insert_checkpoints import InsertCheckpoints
from tests.programs import context
from tests.test_alternatives import Plugin as Halving
from tests.test_alternatives import Wide, op_by_op
from tests.test_insert_checkpoints import Skipping, captured

aten = torch.ops.aten


@dataclass(frozen=True)
class Thrifty(Pass):
    """Predicts that twice a value is slower as a sum, and frees a megabyte: under a budget that pays."""

    name: ClassVar[str] = "thrifty"
    level: ClassVar[Level] = Level.JOINT

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        for node in program.nodes():
            if node.target is aten.mul.Tensor and node.args[1] == 2:
                delta = CostDelta(peak_bytes=-(2**20), seconds=1e-9)
                yield Candidate(f"sum@{node.name}", self.name, (node.name,), delta, _as_sum(node.name))


def _as_sum(name: str) -> Any:
    def apply(edit: Edit) -> None:
        old = edit.node(name)
        edit.replace(old, edit.call_before(old, aten.add.Tensor, (old.args[0], old.args[0])))

    return apply


class Plugin:
    graphopt_api = 1

    @graphopt.hookimpl
    def graphopt_passes(self) -> list[type[Pass]]:
        return [Thrifty]


class Twice(nn.Module):
    """One graph, or ``broken`` two."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.a, self.b, self.broken = nn.Linear(16, 64), nn.Linear(64, 16), broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x)) * 2
        if self.broken:
            print(end="")
        return torch.sin(self.b(torch.cos(h))).square().mean()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the joint programs that passes ran over, in order."""
    found: list[str] = []
    run = offered_schedules.run_joint_passes

    def counted(program: Program, *args: Any, **settings: Any) -> Any:
        found.append(program.name)
        return run(program, *args, **settings)

    monkeypatch.setattr(offered_schedules, "run_joint_passes", counted)
    return found


def optimized(broken: bool, pipeline: str, budget: str | None = None) -> graphopt.Optimized:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return graphopt.optimize(
        Twice(broken), (torch.randn(128, 16),), emit="eager", on_error="raise", plugins=(Plugin(),),
        pipeline=pipeline, budget=budget,
    )  # fmt: skip


def within(fast: graphopt.Optimized, budget: str) -> None:
    """Plan for another budget; what runs then keeps it and computes the same."""
    torch.manual_seed(1)
    x = torch.randn(128, 16)
    before = fast(x)
    fast._driver.session.plan_again(Budget.of(budget))
    assert fast.plan.budget is not None
    assert fast.measure((x,), repeats=1).peak_bytes <= fast.plan.budget
    torch.testing.assert_close(fast(x), before)


@pytest.mark.parametrize("broken", [False, True])
def test_a_whole_frontier_is_found_once(runs: list[str], broken: bool) -> None:
    fast = optimized(broken, "insert-checkpoints")
    assert runs == (["g0", "g1"] if broken else ["g0"])
    within(fast, "90%")
    seen = len(runs)
    assert seen == (4 if broken else 2)
    within(fast, "85%")
    # A program that has the budget for itself was searched around the first one alone.
    assert len(runs) == (seen if broken else seen + 1)


def test_where_a_budget_decides_passes_run_again(runs: list[str]) -> None:
    fast = optimized(True, "thrifty,insert-checkpoints")
    assert {r.status for r in fast.report.steps if r.id == "thrifty"} == {"no-op"}
    within(fast, "90%")
    assert "applied" in {r.status for r in fast.report.steps if r.id == "thrifty"}
    seen = len(runs)
    within(fast, "85%")
    assert len(runs) == seen


def asked(monkeypatch: pytest.MonkeyPatch, of: Any, share: float, **options: Any) -> tuple[int, int]:
    """Targets and effort that a search of a program is given."""
    program, cost = of
    found: list[tuple[int, int]] = []

    class Enough(Exception):
        pass

    def search(plan: Any, starts: Any, *, targets: int, effort: int, **settings: Any) -> None:
        found.append((targets, effort))
        raise Enough

    ctx = PassContext(cost, "train", "eager", effort=share)
    with monkeypatch.context() as patched, pytest.raises(Enough):
        patched.setattr(insert_checkpoints, "search", search)
        list(InsertCheckpoints(solver="none", **options).propose(program, ctx))
    return found[0]


def test_a_share_of_the_usual_work_is_of_large_programs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (captured(Skipping(8, depth), torch.randn(8, 8)) for depth in (4, 40))
    assert asked(monkeypatch, small, 0.25) == asked(monkeypatch, small, 1.0)
    monkeypatch.setattr(insert_checkpoints, "_SMALL", 50)
    usual, part = asked(monkeypatch, large, 1.0), asked(monkeypatch, large, 0.25)
    assert part[0] * part[1] / (usual[0] * usual[1]) == pytest.approx(0.25, rel=0.05)
    # What the caller asks for stays.
    assert asked(monkeypatch, large, 0.25, targets=9, effort=7) == (9, 7)


def test_the_report_says_where_less_was_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(fast: graphopt.Optimized) -> list[tuple[str, str]]:
        return [(d.candidate, d.why) for d in fast.report.declined if "further schedules" in d.candidate]

    def every_budget() -> graphopt.Optimized:
        torch._dynamo.reset()
        options = {"emit": "eager", "plugins": (Halving(),), "pipeline": "halve-product,insert-checkpoints"}
        return dry_run(Wide(), (torch.randn(512, 32),), options, every=True)

    assert said(every_budget()) == []
    monkeypatch.setattr(insert_checkpoints, "_SMALL", 1)
    ((form, why),) = said(every_budget())
    assert form.startswith("further schedules of g0+halve:")
    assert why == "a form of a large program: searched with 25% of the usual work"


def test_a_context_asks_for_the_usual_work() -> None:
    assert context().effort == 1.0


def test_a_frontier_is_whole_however_little_was_looked_at(runs: list[str]) -> None:
    """What a step was planned with stays; what the frontier shows is what every budget gives."""
    tight, roomy, free = (op_by_op(budget=budget) for budget in ("50%", "16GiB", None))
    torch.manual_seed(0)
    torch._dynamo.reset()
    whole = graphopt.pareto(
        Wide(), (torch.randn(512, 32),), emit="eager", plugins=(Halving(),),
        pipeline="halve-product,insert-checkpoints",
    ).points  # fmt: skip
    for fast in (tight, roomy, free):
        plan, report, ran = fast.plan, str(fast.report), fast._driver.session.current[0].run
        shown = fast.frontier()
        assert [(p.peak_bytes, p.seconds) for p in shown] == [(p.peak_bytes, p.seconds) for p in whole]
        assert fast.plan is plan and str(fast.report) == report
        assert fast._driver.session.current[0].run is ran
    # As it is the step keeps the larger budget: nothing was searched.
    (whole_program,) = (c.forms[""] for c in roomy._driver.session.current)
    assert whole_program.partly and len(whole_program.frontier.points) == 1


def test_several_graphs_have_whole_frontiers_on_demand() -> None:
    free, bounded = optimized(True, "insert-checkpoints"), optimized(True, "insert-checkpoints", budget="85%")
    shown = [(p.peak_bytes, p.seconds) for p in free.frontier()]
    assert shown == [(p.peak_bytes, p.seconds) for p in bounded.frontier()]
    assert len(shown) > 1
    x = torch.randn(128, 16)
    torch.testing.assert_close(free(x), bounded(x))


def test_around_one_peak_less_is_searched_and_what_fits_is_as_fast() -> None:
    program, cost = captured(Skipping(8, 30), torch.randn(8, 8))
    asked_for = PassContext(cost, "train", "eager")
    step = InsertCheckpoints(solver="none")

    def frontier(ctx: PassContext) -> tuple[FrontierPoint, ...]:
        (found,) = (item for item in step.propose(program, ctx) if isinstance(item, Frontier))
        return found.points

    whole = frontier(asked_for)
    low, high = whole[0].peak_bytes, max(point.peak_bytes for point in whole)
    assert low < high
    for share in (0.25, 0.5, 0.75):
        room = int(low + share * (high - low))
        near = frontier(replace(asked_for, room_bytes=room))
        best, found = (min(p.seconds for p in points if p.peak_bytes <= room) for points in (whole, near))
        assert found <= 1.05 * best
    # Where nothing fits the least is told, and as it is the program is not searched.
    least = frontier(replace(asked_for, room_bytes=low - 1))
    assert [(p.peak_bytes, p.seconds) for p in least] == [(p.peak_bytes, p.seconds) for p in whole]
    assert len(frontier(replace(asked_for, bounded=False))) == 1
