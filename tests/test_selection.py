"""Passes over a program: what is chosen, what is declined and why, and passes that misbehave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import graphopt
from graphopt.candidate import Candidate, CostDelta, Declined, Frontier, NearMiss, Reason
from graphopt.dump.text import program_text
from graphopt.edit import Edit
from graphopt.errors import PassError, VerificationError
from graphopt.program import Program
from graphopt.report import PassRecord
from graphopt.rewriting import Rewriting, run_passes
from graphopt.selection import choose
from tests.programs import context, host, proposing, semantic

aten = torch.ops.aten


@pytest.fixture
def program() -> Program:
    return semantic(lambda x, w: (x @ w).cos().sin(), torch.randn(4, 8), torch.randn(8, 8))


def _double(edit: Edit) -> None:
    old = edit.node("cos")
    edit.replace(old, edit.call_before(old, aten.sin.default, old.args))


def candidate(name: str = "swap", **settings: object) -> Candidate:
    made = Candidate(name, "some-pass", ("cos",), CostDelta(seconds=-1e-6), _double)
    return replace(made, **settings)  # type: ignore[arg-type]


def run(program: Program, *proposals: object, on_error: str = "rollback", **settings: object) -> Rewriting:
    step = proposing(lambda p, c: list(proposals), **settings)  # type: ignore[arg-type]
    return run_passes(program, [step], context(), host(), on_error=on_error)


def chosen(*candidates: Candidate, budgeted: bool = False, allow: tuple[str, ...] = (), **settings: object):
    step = proposing(lambda p, c: (), **settings)
    taken, declined = choose(step, candidates, context(allow=allow), budgeted=budgeted)
    return [c.id for c in taken], {d.candidate: d.why for d in declined}


def test_an_applied_candidate_is_recorded_and_in_the_program(program: Program) -> None:
    near = NearMiss("swap", "sin", 2, 3, Reason("no", ("sin",)))
    own = Declined("other", "not today")
    done = run(program, candidate(), near, own)
    (record,) = done.records
    assert (record.id, record.status) == ("some-pass", "applied")
    assert record.reason == "1 of 1 candidates, saves 1.00 us (predicted)"
    assert record.seconds > 0
    assert (done.near_misses, done.declined) == ((near,), (own,))
    assert [node.name for node in program.nodes()] == ["matmul", "sin_default", "sin"]
    inputs = [torch.randn(n.meta["val"].shape) for n in program.graph.nodes if n.op == "placeholder"]
    assert program.gm(*inputs)[0].shape == (4, 8)


def test_better_of_two_that_conflict() -> None:
    a = candidate("a", delta=CostDelta(seconds=-1e-6))
    b = candidate("b", delta=CostDelta(seconds=-2e-6))
    other = candidate("other", nodes=("sin",), conflicts=("b",), delta=CostDelta(seconds=-1e-7))
    assert chosen(a, b, other) == (
        ["b"],
        {
            "a": "conflicts with b, which gains as much or more",
            "other": "conflicts with b, which gains as much or more",
        },
    )
    # Of equals the earlier one, and what does not conflict keeps its order.
    free = candidate("free", nodes=("sin",), delta=CostDelta(seconds=-3e-6))
    assert chosen(a, replace(a, id="twin"), free)[0] == ["a", "free"]


@pytest.mark.parametrize(
    ("change", "settings", "why"),
    [
        ({"delta": CostDelta()}, {}, ""),
        ({"delta": CostDelta(seconds=1e-3)}, {}, "no predicted gain: changes the step by 1.00 ms"),
        ({"delta": CostDelta(seconds=1e-3)}, {"mandatory": True}, ""),
        ({"exactness": "reassociated"}, {}, ""),
        (
            {"exactness": "reassociated", "delta": CostDelta()},
            {"mandatory": True},
            "no predicted gain: changes the step by 0 s",
        ),
        (
            {"exactness": "lossy", "metric": "SQNR"},
            {"exact": False},
            "lossy in SQNR: runs with allow=('some-pass',)",
        ),
    ],
)
def test_what_is_worth_choosing(change: dict, settings: dict, why: str) -> None:
    taken, declined = chosen(candidate(**change), **settings)
    assert (taken, declined) == (([], {"swap": why}) if why else (["swap"], {}))


def test_lossy_candidates_of_an_allowed_pass() -> None:
    lossy = candidate(exactness="lossy", metric="SQNR")
    assert chosen(lossy, allow=("some-pass",), exact=False)[0] == ["swap"]


def test_lossy_candidates_of_an_exact_pass_go_by_the_pass_that_allows_them(program: Program) -> None:
    lossy = candidate(exactness="lossy", metric="SQNR", allowed_by="another")
    assert chosen(lossy) == ([], {"swap": "lossy in SQNR: runs with allow=('another',)"})
    assert chosen(lossy, allow=("some-pass",))[0] == []
    assert chosen(lossy, allow=("another",))[0] == ["swap"]
    (record,) = run(program, lossy).records
    assert (record.status, record.reason) == ("no-op", "0 of 1 candidates chosen")


def test_bytes_count_under_a_budget_only() -> None:
    rate = context().cost.device.copy_bytes_per_second
    smaller = candidate(delta=CostDelta(peak_bytes=-int(rate), seconds=0.5))
    assert chosen(smaller, budgeted=True)[0] == ["swap"]
    assert chosen(smaller)[1]["swap"] == "no predicted gain: changes the step by 500 ms"
    larger = candidate(delta=CostDelta(static_bytes=int(rate), seconds=-0.5))
    assert "no predicted gain: changes the step by -500 ms and " in chosen(larger, budgeted=True)[1]["swap"]


def test_a_lossy_pass_that_is_not_allowed_is_skipped(program: Program) -> None:
    (record,) = run(program, candidate(), exact=False).records
    assert (record.status, record.reason) == ("skipped", "changes results: runs with allow=('some-pass',)")
    (record,) = run(program, candidate(), exact=False, inexact="rounds").records
    assert record.reason == "rounds: runs with allow=('some-pass',)"


def test_a_program_that_was_not_traced_is_left_alone(program: Program) -> None:
    del next(program.nodes(aten.cos)).meta["val"]
    (record,) = run(program, candidate()).records
    assert record.status == "skipped"
    assert record.reason.startswith("the program was not traced: program g0 @ semantic: node 'cos'")


@pytest.mark.parametrize(
    ("proposals", "status", "reason"),
    [
        ((), "no-op", "nothing to rewrite"),
        ((NearMiss("r", "cos", 1, 1, Reason("no")),), "no-op", "nothing to rewrite; 1 near miss"),
        ((candidate(delta=CostDelta(seconds=1.0)),), "no-op", "0 of 1 candidates chosen"),
        ((candidate(apply=lambda e: None),), "no-op", "1 of 1 candidates chosen, none changed the program"),
    ],
)
def test_passes_that_do_nothing_say_so(program: Program, proposals, status: str, reason: str) -> None:
    before = program_text(program)
    (record,) = run(program, *proposals).records
    assert (record.status, record.reason) == (status, reason)
    assert program_text(program) == before


# --- passes that misbehave --------------------------------------------------------------------


def _narrow(edit: Edit) -> None:
    old = edit.node("sin")
    edit.replace(old, edit.call_after(old, aten.to.dtype, (old, torch.float64)))


def _break(edit: Edit) -> None:
    edit.node("sin").args = (edit.call_after("sin", aten.cos.default, (edit.node("sin"),)),)


def _raise(edit: Edit) -> None:
    _double(edit)
    raise ZeroDivisionError("division by zero")


NONSENSE = [
    (
        (candidate(apply=_raise),),
        PassError,
        "some-pass: candidate 'swap': apply() raised ZeroDivisionError: division",
    ),
    (
        (candidate(apply=_narrow),),
        VerificationError,
        "output 0 ('to_dtype') was f32[4,8] on cpu, is f64[4,8] on cpu",
    ),
    ((candidate(apply=_break),), VerificationError, "nodes read each other in a circle"),
    ((7,), PassError, "some-pass: propose() yielded 7: expected a Candidate, Frontier, NearMiss or Declined"),
    (
        (Frontier("some-pass", ()),),
        PassError,
        "yielded a Frontier at the semantic level: schedules are of joint",
    ),
    ((candidate(nodes=("coss",)),), PassError, "program g0 has no node 'coss'; did you mean 'cos'?"),
    ((candidate(nodes=()),), PassError, "candidate 'swap': it names no nodes"),
    ((candidate(), candidate()), PassError, "candidate 'swap': another candidate has the same id"),
    ((candidate(pass_id="you"),), PassError, "it says that it is of pass 'you'"),
    (
        (candidate(exactness="precise"),),
        PassError,
        "exactness is 'precise': expected one of 'exact', 'reassociated',",
    ),
    ((candidate(apply=3),), PassError, "apply is 3: expected a function of the edit"),
    ((candidate(delta=None),), PassError, "delta is None: expected a CostDelta"),
    (
        (candidate(delta=CostDelta(seconds=float("nan"))),),
        PassError,
        "delta is not finite: seconds=nan, error=0.0",
    ),
    ((candidate(delta=CostDelta(error=0.1)),), PassError, "it is exact, but predicts an error of 0.1"),
    (
        (candidate(exactness="lossy", metric="x"),),
        PassError,
        "it is lossy, but the pass says that it is exact",
    ),
]


@pytest.mark.parametrize(("proposals", "error", "message"), NONSENSE, ids=[m[:40] for _, _, m in NONSENSE])
def test_misbehaving_passes_are_rolled_back_or_raise(
    program: Program, proposals, error, message: str
) -> None:
    before = program_text(program), [node.name for node in program.graph.nodes]
    (record,) = run(program, *proposals).records
    assert record.status == "rolled-back" and message.removeprefix("some-pass: ") in record.reason
    with pytest.raises(error) as caught:
        run(program, *proposals, on_error="raise")
    assert message in str(caught.value)
    assert (program_text(program), [node.name for node in program.graph.nodes]) == before


def test_gains_that_are_made_of_symbolic_sizes_are_those_of_the_sizes_while_tracing(program: Program) -> None:
    exported = torch.export.export(
        nn.Identity(), (torch.randn(6, 2),), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
    )
    x = next(node for node in exported.graph.nodes if node.op == "placeholder").meta["val"]
    rows = x.shape[0]
    assert isinstance(rows, torch.SymInt)
    delta = CostDelta(peak_bytes=-rows * 4, seconds=-rows * 1e-6)
    (record,) = run(program, candidate(delta=delta)).records
    assert record.reason == "1 of 1 candidates, saves 6.00 us (predicted)"
    assert not x.fake_mode.shape_env.guards, "nothing is fixed by looking at it"


def _raises_late(program: Program, ctx: object):
    yield candidate()
    raise RuntimeError("lost")


def _edits(program: Program, ctx: object):
    program.graph.call_function(aten.sin.default, (next(program.nodes()),))
    return [candidate()]


@pytest.mark.parametrize(
    ("propose", "message"),
    [
        (_raises_late, "propose() raised RuntimeError: lost"),
        (_edits, "propose() changed the program: only apply() may"),
        (lambda p, c: None, "propose() returned None: expected an iterable of proposals"),
    ],
)
def test_propose_that_misbehaves(program: Program, propose, message: str) -> None:
    before = program_text(program)
    (record,) = run_passes(program, [proposing(propose)], context(), host()).records
    assert (record.status, record.reason) == ("rolled-back", message)
    assert program_text(program) == before


def test_the_next_pass_runs_after_one_that_failed(program: Program) -> None:
    failing = proposing(lambda p, c: [candidate(apply=_raise)])
    working = proposing(lambda p, c: [candidate()])
    done = run_passes(program, [failing, working], context(), host())
    assert [record.status for record in done.records] == ["rolled-back", "applied"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.drop(self.linear(x)) + 0).sum()


def test_optimize_applies_reports_and_stores_what_was_not_done() -> None:
    torch._dynamo.reset()
    raising = proposing(lambda p, c: 1 / 0)
    declining = proposing(
        lambda p, c: [replace(candidate("slow", delta=CostDelta(seconds=1.0)), pass_id="b", nodes=("add",))],
        name="b",
    )
    model, x = Net(), torch.randn(4, 8)
    pipeline = graphopt.Pipeline((raising, declining, *_default()))
    optimized = graphopt.optimize(model, (x,), pipeline=pipeline, emit="eager", verify="numeric")
    report = optimized.report
    statuses = {record.id: record.status for record in report.steps}
    assert statuses["some-pass"] == "rolled-back" and statuses["normalize"] == "applied"
    assert not list(optimized.programs[0].nodes(aten.dropout))
    text = str(report)
    assert "not done" in text
    assert "1 x drop-neutral (add): adding 0 turns -0.0 into 0.0" in text
    assert "1 x (slow): no predicted gain: changes the step by 1.00 s" in text
    assert "drop-neutral" in report._repr_html_()
    assert graphopt.Report.from_json(report.to_json()) == report


def _default():
    return graphopt.Pipeline.of("default", host()).passes


def test_optimize_raises_on_request() -> None:
    torch._dynamo.reset()
    pipeline = graphopt.Pipeline((proposing(lambda p, c: 1 / 0),))
    with pytest.raises(
        PassError, match="some-pass: propose\\(\\) raised ZeroDivisionError: division by zero"
    ):
        graphopt.optimize(Net(), (torch.randn(4, 8),), pipeline=pipeline, emit="eager", on_error="raise")


def test_observers_hear_of_semantic_passes(program: Program) -> None:
    heard: list[tuple[str, str]] = []

    class Watching:
        graphopt_api = 1

        @graphopt.hookimpl
        def graphopt_after_pass(self, step, record: PassRecord) -> None:
            heard.append((step.name, record.status))

    watched = graphopt.plugins.PluginHost((Watching(),))
    run_passes(program, [proposing(lambda p, c: [candidate()])], context(), watched)
    assert heard == [("some-pass", "applied")]
