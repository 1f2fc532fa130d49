"""Policies: what they are asked, what stands when one fails, and who is said to have chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import InputsError, Plan, PluginError, PolicyQuestion, Selection, UnknownNameError
from graphopt.plugins import PolicySpec, hookimpl

Choose = Callable[[PolicyQuestion], Any]


class Deciding:
    """An inline plugin with one policy."""

    graphopt_api = 1

    def __init__(self, choose: Choose) -> None:
        self.choose = choose

    @hookimpl
    def graphopt_policies(self) -> list[PolicySpec]:
        return [PolicySpec("mine", self.choose, "as the test says")]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


MODEL, X = Model(), torch.ones(64, 16)


def planned(choose: Choose, **options: Any) -> Plan:
    return graphopt.plan(MODEL, (X,), emit="eager", policy="mine", plugins=(Deciding(choose),), **options)


def leanest(question: PolicyQuestion) -> Selection:
    return Selection(tuple(min(f.points, key=lambda p: p.peak_bytes) for f in question.frontiers))


def test_what_a_policy_picks_is_what_runs() -> None:
    usual = graphopt.plan(MODEL, (X,), emit="eager")
    plan = planned(leanest)
    assert plan.policy == "mine" and "chosen by policy mine" in str(plan)
    assert plan.predicted.peak_bytes < usual.predicted.peak_bytes
    points = graphopt.pareto(MODEL, (X,), emit="eager").points
    assert plan.predicted.peak_bytes == min(point.peak_bytes for point in points)
    fast = graphopt.optimize(
        MODEL, (X,), emit="eager", policy="mine", plugins=(Deciding(leanest),), on_error="raise"
    )
    assert fast.plan.choices == plan.choices
    wanted = list(MODEL.parameters())
    for a, b in zip(torch.autograd.grad(fast(X), wanted), torch.autograd.grad(MODEL(X), wanted), strict=True):
        assert torch.equal(a, b)


def test_what_it_is_asked() -> None:
    asked: list[PolicyQuestion] = []
    usual = graphopt.plan(MODEL, (X,), emit="eager", budget="80%")
    plan = planned(asked.append, budget="80%")
    (question,) = asked
    assert question.calls == (1,) and len(question.frontiers) == 1
    assert question.step_seconds == pytest.approx(usual.baseline.seconds)
    assert question.room is not None and question.peak(question.default) <= question.room
    assert question.seconds(question.default) == question.default.points[0].seconds
    with pytest.raises(ValueError, match="a selection has 1 points here, got 0"):
        question.peak(Selection(()))
    # It had no wish: the plan is the planner's.
    assert replace(plan, seconds_to_plan=0.0, policy="") == replace(usual, seconds_to_plan=0.0)
    assert planned(lambda question: None).choices == graphopt.plan(MODEL, (X,), emit="eager").choices


def raising(error: BaseException) -> Choose:
    def choose(question: PolicyQuestion) -> Selection:
        raise error

    return choose


def altered(question: PolicyQuestion) -> Selection:
    return Selection(tuple(replace(p, backward_peak=1, forward_peak=1) for p in question.default.points))


def fastest(question: PolicyQuestion) -> Selection:
    return Selection(tuple(min(f.points, key=lambda p: p.seconds) for f in question.frontiers))


EXPECTED = "policy 'mine': expected a tuple of 1 points, one for each program"


@pytest.mark.parametrize(
    ("choose", "reason"),
    [
        (raising(ZeroDivisionError("by nothing")), "policy 'mine' raised ZeroDivisionError: by nothing"),
        (raising(SystemExit(3)), "policy 'mine' raised SystemExit: 3"),
        (lambda q: 7, "policy 'mine': expected a Selection or None, got 7"),
        (lambda q: Selection(()), f"{EXPECTED}, got 0"),
        (lambda q: Selection(None), f"{EXPECTED}, got None"),  # type: ignore[arg-type]
        (altered, "policy 'mine': point 0 is not one of the"),
        (
            lambda q: Selection(q.default.points, (3,)),  # type: ignore[arg-type]
            "policy 'mine': its reruns are not among those of the planner's choice: only those are known",
        ),
        (fastest, "policy 'mine': its choice takes"),
    ],
    ids=["raises", "exits", "number", "none", "no points", "altered", "reruns", "too much"],
)
def test_one_that_fails_is_named_and_the_planner_s_choice_stands(choose: Choose, reason: str) -> None:
    usual = graphopt.plan(MODEL, (X,), emit="eager", budget="80%")
    options: dict[str, Any] = {
        "emit": "eager", "budget": "80%", "policy": "mine", "plugins": (Deciding(choose),),
    }  # fmt: skip
    fast = graphopt.optimize(MODEL, (X,), **options)
    assert fast.plan.choices == usual.choices and fast.plan.policy == ""
    (said,) = [text for text in fast.report.diagnostics if "policy" in text]
    assert said.startswith(f"plugin 'Deciding' of inline: {reason}")
    assert said.endswith(": the planner's choice is used")
    with pytest.raises(PluginError, match=re.escape(f"plugin 'Deciding' of inline: {reason}")):
        graphopt.optimize(MODEL, (X,), on_error="raise", **options)


def test_rows_that_run_again_and_host_memory_are_checked() -> None:
    from graphopt.chain_plan import Rerun
    from graphopt.policy import ask_policy

    row = Rerun(0, 1)
    point = graphopt.FrontierPoint(graphopt.Schedule(("a",)), 1, 1, 1, 0, 0.0)
    moving = replace(point, moved_bytes=8, label="moves")
    frontier = graphopt.Frontier("test", (point, moving), host_bytes=4)
    default = Selection((point,), (row,))
    question = PolicyQuestion((frontier,), (1,), 1.0, None, None, default, lambda selection: 1)  # type: ignore[arg-type]

    def ask(answer: Selection) -> Selection:
        return ask_policy(PolicySpec("mine", lambda question: answer), question)

    assert ask(Selection((point,), (row,))) == default
    assert ask(Selection((point,))).reruns == ()
    with pytest.raises(PluginError, match="it names a row of its reruns twice"):
        ask(Selection((point,), (row, row)))
    with pytest.raises(PluginError, match="it moves 8 B to the host's memory, where 4 B may be used"):
        ask(Selection((moving,)))


def test_its_name_its_plugin_s_and_no_other() -> None:
    plugin = Deciding(leanest)
    plan = graphopt.plan(MODEL, (X,), emit="eager", policy="Deciding/mine", plugins=(plugin,))
    assert plan.policy == "mine"
    for name in ("mein", "other/mine"):
        with pytest.raises(UnknownNameError, match=f"unknown policy '{name}'; did you mean 'mine'"):
            graphopt.plan(MODEL, (X,), emit="eager", policy=name, plugins=(plugin,))


def test_a_stored_plan_says_who_chose_and_older_ones_load(tmp_path: Any) -> None:
    plan = planned(leanest)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.policy == "mine"
    again = graphopt.optimize(MODEL, (X,), emit="eager", plan=loaded)
    assert again.plan.policy == "mine" and again.plan.choices == plan.choices
    data = plan.to_json()
    del data["policy"]
    assert Plan.from_json(data).policy == ""
    with pytest.raises(InputsError, match="plan= replays what was chosen: policy= would choose again"):
        graphopt.optimize(MODEL, (X,), emit="eager", plan=plan, policy="mine", plugins=(Deciding(leanest),))
    with pytest.raises(InputsError, match=r"pareto\(\) takes no policy=: it shows what every budget gives"):
        graphopt.pareto(MODEL, (X,), emit="eager", policy="mine", plugins=(Deciding(leanest),))


class Broken(Model):
    """Two graphs with a break in between."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return super().forward(x)


def test_programs_of_several_graphs_are_asked_for_together() -> None:
    torch._dynamo.reset()
    asked: list[PolicyQuestion] = []

    def choose(question: PolicyQuestion) -> Selection:
        asked.append(question)
        return leanest(question)

    model = Broken()
    usual = graphopt.optimize(model, (X,), emit="eager")
    torch._dynamo.reset()
    fast = graphopt.optimize(
        model, (X,), emit="eager", policy="mine", plugins=(Deciding(choose),), on_error="raise"
    )
    assert len(asked[-1].frontiers) == len(fast.plan.choices) == 2
    assert fast.plan.policy == "mine"
    assert fast.plan.predicted.peak_bytes < usual.plan.predicted.peak_bytes
    torch.testing.assert_close(fast(X), model(X))


@pytest.mark.slow
def test_compiled_blocks_run_what_the_policy_picks() -> None:
    torch._dynamo.reset()
    usual = graphopt.optimize(MODEL, (X,), emit="inductor", cache=False)
    torch._dynamo.reset()
    fast = graphopt.optimize(
        MODEL, (X,), emit="inductor", policy="mine", plugins=(Deciding(leanest),), on_error="raise"
    )
    assert fast.plan.policy == "mine"
    assert fast.plan.predicted.peak_bytes <= usual.plan.predicted.peak_bytes
    torch.testing.assert_close(fast(X), MODEL(X))
