"""Passes of the joint level: rewrites are applied before schedules are chosen, or the report says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.candidate import Candidate, CostDelta, Frontier, FrontierPoint
from graphopt.capture.joint import save_everything
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt.schedule import Schedule
from graphopt.testing import check_pass
from tests.programs import proposing
from tests.steps import assert_close, assert_same, loss_of, run_step

aten = torch.ops.aten
X = (torch.randn(16, 8),)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU(), nn.Tanh())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


class Broken(Chain):
    """Two programs: the graph breaks in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body[:6](x)
        torch._dynamo.graph_break()
        return self.body[6:](x).square().mean()


def _clamp(name: str) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        old = edit.node(name)
        edit.replace(old, edit.call_before(old, aten.clamp_min.default, (old.args[0], 0), replaces=(old,)))

    return apply


def _relus(program: Program, ctx: PassContext) -> Iterable[Proposal]:
    for node in program.nodes(aten.relu):
        yield Candidate(node.name, "some-pass", (node.name,), CostDelta(), _clamp(node.name))


def _schedules(program: Program, ctx: PassContext) -> Iterable[Proposal]:
    point = FrontierPoint(save_everything(program), 1, 1, 1, 0, 0.0, label="mine")
    yield Frontier("some-pass", (point,))


def joint(propose: Callable[[Program, PassContext], Iterable[Proposal]], **settings: Any) -> Pass:
    return proposing(propose, level=Level.JOINT, **settings)


def optimized(
    *passes: Pass | str, model: type[nn.Module] = Chain, **options: Any
) -> tuple[graphopt.Optimized, nn.Module]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = model()
    options = {"emit": "eager", "inputs": X, **options}
    return graphopt.optimize(copy.deepcopy(plain), pipeline=[*passes], **options), plain


def _calls(fast: graphopt.Optimized, level: Level, target: Any) -> int:
    return sum(len(list(p.nodes(target))) for p in fast.programs if p.level is level)


def _records(fast: graphopt.Optimized) -> list[tuple[str, str, str]]:
    return [(record.id, record.status, record.reason) for record in fast.report.steps]


@pytest.mark.parametrize("model", [Chain, Broken])
@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_rewrites_are_applied_before_schedules_are_chosen(order: int, model: type[nn.Module]) -> None:
    passes = [joint(_relus), "insert-checkpoints"][::order]
    fast, plain = optimized(*passes, model=model, budget="95%", on_error="raise")
    assert (_calls(fast, Level.JOINT, aten.relu), _calls(fast, Level.JOINT, aten.clamp_min)) == (0, 4)
    assert _calls(fast, Level.LOWERED, aten.clamp_min) >= 4
    assert ("some-pass", "applied") in [record[:2] for record in _records(fast)]
    assert {choice.pass_id for choice in fast.plan.choices} == {"insert-checkpoints"}
    for seed in range(2):
        assert_same(run_step(fast, X, loss_of, seed=seed), run_step(plain, X, loss_of, seed=seed))


def test_a_rewritten_program_is_the_one_that_is_priced_and_replayed() -> None:
    fast, _ = optimized(joint(_relus), "insert-checkpoints", budget="95%")
    names = {node.name for p in fast.programs if p.level is Level.JOINT for node in p.nodes()}
    assert set(fast.plan.choices[0].schedule.forward) <= names
    again, _ = optimized(joint(_relus), "insert-checkpoints", plan=fast.plan)
    assert again.plan.choices[0].schedule == fast.plan.choices[0].schedule
    with pytest.raises(graphopt.StalePlanError):
        optimized("insert-checkpoints", plan=fast.plan)
    predicted, measured = fast.plan.predicted.peak_bytes, fast.measure(X, repeats=1).peak_bytes
    assert abs(predicted - measured) <= 64


def test_inference_programs_are_rewritten() -> None:
    with torch.no_grad():
        fast, plain = optimized(joint(_relus), on_error="raise")
        assert torch.equal(fast(*X), plain(*X))
    assert _calls(fast, Level.LOWERED, aten.clamp_min) == 4


def test_check_pass_runs_a_pass_of_the_joint_level() -> None:
    checked = check_pass(joint(_relus), Chain(), X)
    assert [record.status for record in checked.records] == ["applied"]


def test_a_rewrite_that_breaks_the_program_is_undone() -> None:
    def narrow(edit: Edit) -> None:
        old = edit.node("mean")
        edit.replace(old, edit.call_after(old, aten.to.dtype, (old, torch.float64)))

    def propose(program: Program, ctx: PassContext) -> Iterable[Proposal]:
        yield Candidate("wide", "some-pass", ("mean",), CostDelta(), narrow)

    fast, plain = optimized(joint(propose), "insert-checkpoints")
    (record, _) = _records(fast)
    assert record[:2] == ("some-pass", "rolled-back")
    assert "output 0 ('to_dtype') was f32[] on cpu, is f64[] on cpu" in record[2]
    assert_same(run_step(fast, X, loss_of), run_step(plain, X, loss_of))


def test_a_lossy_pass_that_is_not_allowed_is_skipped() -> None:
    fast, _ = optimized(joint(_relus, exact=False))
    assert _records(fast) == [
        ("some-pass", "skipped", "changes results: runs with allow=('some-pass',)"),
    ]
    assert _calls(fast, Level.JOINT, aten.relu) == 4


def test_where_segments_are_compiled_rewrites_are_applied_to_each_kind() -> None:
    torch._dynamo.reset()
    fast, plain = optimized(joint(_relus), "insert-checkpoints", emit="inductor", on_error="raise")
    assert not [d for d in fast.report.declined if d.candidate == "relu"]
    assert (_calls(fast, Level.JOINT, aten.relu), _calls(fast, Level.JOINT, aten.clamp_min)) == (0, 4)
    assert_close(run_step(fast, X, loss_of), run_step(plain, X, loss_of))
    again, _ = optimized(joint(_relus), "insert-checkpoints", emit="inductor", plan=fast.plan)
    assert again.plan.choices == fast.plan.choices
    torch._dynamo.reset()
    with torch.no_grad():
        fast, plain = optimized(joint(_relus), emit="inductor", on_error="raise")
        assert torch.allclose(fast(*X), plain(*X))
    assert _calls(fast, Level.LOWERED, aten.relu) == 0 < _calls(fast, Level.LOWERED, aten.clamp_min)


def test_of_two_curves_the_last_is_used_and_the_other_reported() -> None:
    fast, _ = optimized("insert-checkpoints", joint(_schedules))
    assert [choice.label for choice in fast.plan.choices] == ["mine"]
    assert [(d.candidate, d.why) for d in fast.report.declined] == [
        (
            "schedules of insert-checkpoints",
            "a program has one curve of schedules: that of some-pass, the last, is used",
        )
    ]


def _empty(program: Program, ctx: PassContext) -> Iterable[Proposal]:
    yield Frontier("some-pass", ())


def _unknown(program: Program, ctx: PassContext) -> Iterable[Proposal]:
    point = FrontierPoint(Schedule(("nothing_here",)), 1, 1, 1, 0, 0.0, label="mine")
    yield Frontier("some-pass", (point,))


@pytest.mark.parametrize(
    ("propose", "message"),
    [
        (_empty, "propose() yielded a Frontier without points"),
        (_unknown, "schedule 'mine': program g0 has no node 'nothing_here'"),
        (lambda p, c: [7], "propose() yielded 7: expected a Candidate, Frontier, NearMiss or Declined"),
    ],
)
def test_nonsense_of_the_joint_level_is_refused(propose: Any, message: str) -> None:
    fast, plain = optimized(joint(propose))
    assert _records(fast) == [("some-pass", "rolled-back", message)]
    assert_same(run_step(fast, X, loss_of), run_step(plain, X, loss_of))
    with pytest.raises(PassError, match="some-pass: "):
        optimized(joint(propose), on_error="raise")


def test_a_pass_of_the_lowered_level_is_reported_as_not_run() -> None:
    fast, _ = optimized(proposing(_relus, level=Level.LOWERED))
    assert _records(fast) == [
        (
            "some-pass",
            "skipped",
            "lowered programs are not rewritten: passes run at the semantic and the joint level",
        )
    ]
