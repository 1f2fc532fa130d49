"""Which schedule each program of a step runs: the fastest that fit the budget together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from graphopt.budget import format_bytes
from graphopt.candidate import FrontierPoint
from graphopt.captured import Captured
from graphopt.chain_plan import ChainPlan, least_chain, plan_chain
from graphopt.collection import uncollected
from graphopt.cost import CostModel
from graphopt.disallowed import advice_on_disallowed
from graphopt.errors import BudgetError
from graphopt.offered_schedules import baseline_point, follows_plan
from graphopt.planner import seconds_bound
from graphopt.plans import Choice, Plan, Recomputed, SavedValue
from graphopt.policy import Selection, decide
from graphopt.program import Program, layer_of
from graphopt.replay import plain_call
from graphopt.step_cost import baseline_of, cost_of, node_bytes

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["choose_schedules", "infeasible", "record_plan", "replayed_point", "take"]

_RESOLUTION = 0.01
"""Predicted times of fused code that differ by less than this share are taken as equal."""


@uncollected()
def choose_schedules(session: Session, group: Sequence[Captured], *, tentative: bool = False) -> None:
    """Choose a point for each of ``group``. ``tentative``: the least where nothing seems to fit."""
    start = time.perf_counter()
    base = session.static_bytes or 0
    baseline = baseline_of(session, group)
    budget = session.budget.resolve(baseline.peak_bytes)
    if session.replay is not None:
        forms = {choice.program: choice.alternative for choice in session.replay.choices}
        for captured in group:
            captured.become(forms.get(captured.name, ""))
        session.replay.check({c.name: c.joint.fingerprint for c in group if c.joint is not None})
        for captured in group:
            choice = session.replay.choice(captured.name)
            captured.point = _followed(session, captured, choice)
        session.reruns = session.replay.reruns
    else:
        resolution = [_RESOLUTION * c.reference_seconds for c in group] if session.emitter.fuses else ()
        chosen: Sequence[FrontierPoint] | None
        if observed := session.observed(group):
            room = None if budget is None else budget - session.base_bytes
            chosen = observed.choose(room, sum(resolution))
            if chosen is not None:
                chosen = decide(session, group, Selection(tuple(chosen)), room).points
            elif tentative:
                chosen = list(observed.front[0].points)
        else:
            links = session.links(group)
            room = None if budget is None else budget - base
            plan = plan_chain(links, room, resolution)
            if plan is not None:
                chosen = take(session, group, plan, room).points
            elif tentative:
                plan = least_chain(links)
                chosen, session.reruns = plan.points, plan.reruns
            else:
                chosen, session.reruns = None, ()
        if chosen is None:
            assert budget is not None
            raise infeasible(session, group, budget)
        for captured, point in zip(group, chosen, strict=True):
            captured.run_at(point)
    session.planning_seconds += time.perf_counter() - start
    record_plan(session, group)


def take(session: Session, group: Sequence[Captured], plan: ChainPlan, room: int | None) -> Selection:
    """What ``plan``, which fits ``room``, comes to: itself, or what the policy picks in its place."""
    picked = decide(session, group, Selection(plan.points, plan.reruns), room)
    session.reruns = picked.reruns
    return picked


def record_plan(session: Session, group: Sequence[Captured]) -> None:
    """Write down the present choice as ``plan``."""
    start = time.perf_counter()
    base = session.static_bytes or 0
    frontiers = [c.frontier for c in group if c.frontier is not None]
    baseline = baseline_of(session, group)
    budget = session.budget.resolve(baseline.peak_bytes)
    predicted = cost_of(session, group, [c.point for c in group if c.point is not None], session.reruns)
    bound = _unavoidable(session, group)
    if session.observed(group) is None:
        bound += seconds_bound(frontiers, budget, base)
    if follows_plan(session):
        assert session.replay is not None
        # Of forms that were not looked at it is known what they take at the least, all together.
        bound = min(bound, session.replay.lower_bound)
    searched = sum(record.seconds for record in session.records)
    choices = tuple(_choices(session.cost, group))
    session.planning_seconds += time.perf_counter() - start
    session.plan = Plan(
        budget,
        session.cost.device.name,
        session.emitter.name,
        session.dense_baseline or baseline,
        predicted,
        bound,
        session.planning_seconds + searched,
        choices,
        session.reruns,
        session.quantization,
        session.chosen_by if session.replay is None else session.replay.policy,
    )


def _unavoidable(session: Session, group: Sequence[Captured]) -> float:
    """Seconds that every schedule takes. Op by op each operator runs at least once; fused, those that
    are calls of libraries do, while what is fused may cost less than apart."""
    if not session.emitter.fuses:
        observed = session.observed(group)
        calls = observed.calls if observed else [1] * len(group)
        least = [min(form.reference_seconds for form in (c.forms.values() or (c,))) for c in group]
        return sum(count * seconds for count, seconds in zip(calls, least, strict=True))
    # Calls of one kind are one program.
    known: dict[int, float] = {}
    return sum(
        min(_library_seconds(session, form.joint, known) for form in (c.forms.values() or (c,)))
        for c in group
        if c.joint is not None
    )


def _library_seconds(session: Session, joint: Program | None, known: dict[int, float]) -> float:
    if joint is None:
        return 0.0
    if id(joint) not in known:
        prices = [session.cost.node(node) for node in joint.nodes()]
        known[id(joint)] = sum(price.seconds for price in prices if price.flops)
    return known[id(joint)]


def infeasible(session: Session, group: Sequence[Captured], budget: int) -> BudgetError:
    if observed := session.observed(session.current):
        lowest = session.base_bytes + observed.front[0].peak_bytes
    else:
        lowest = (session.static_bytes or 0) + least_chain(session.links(group)).peak_bytes
    failed = {r.id: r.reason for r in session.records if r.status in ("rolled-back", "failed")}
    advice = [f"ask for budget={lowest} or more", *_disallowed(session, lowest - budget)]
    advice += [f"pass {name} failed: {reason}" for name, reason in failed.items()]
    return BudgetError(
        f"no plan fits {format_bytes(budget)}: the least that fits is {format_bytes(lowest)} "
        f"({lowest} bytes), of which {format_bytes(session.static_bytes or 0)} are parameters, "
        "buffers and inputs",
        least_bytes=lowest,
        budget_bytes=budget,
        hint="; ".join(advice),
    )


def _disallowed(session: Session, missing_bytes: int) -> list[str]:
    """What to say of passes that would free what is missing, were they allowed."""
    mode = "train" if any(c.mode == "train" for c in session.current) else "infer"
    ctx = session.context(mode)
    programs = [p for c in session.current for p in (c.semantic, c.joint) if p is not None]
    return advice_on_disallowed(programs, session.passes, ctx, missing_bytes)


def _choices(cost: CostModel, group: Sequence[Captured]) -> Iterator[Choice]:
    """What each of ``group`` runs; of calls of one kind at one point that is told once."""
    told: dict[tuple[Any, ...], Choice] = {}
    for captured in group:
        assert captured.point is not None and captured.frontier is not None
        point = captured.point
        key = (
            id(captured.joint), id(captured.schedule), captured.frontier.pass_id,
            point.label, point.alternative, point.seconds, point.offloaded,
        )  # fmt: skip
        if key not in told:
            told[key] = _choice(cost, captured)
        yield replace(told[key], program=captured.name)


def _choice(cost: CostModel, captured: Captured) -> Choice:
    assert captured.joint is not None and captured.point is not None and captured.frontier is not None
    nodes = {node.name: node for node in captured.joint.graph.nodes}
    recomputed = tuple(
        Recomputed(name, layer_of(node), _op(node), made, cost.node(node).seconds)
        for name in captured.schedule.recomputed
        if (node := nodes[name]).op == "call_function" and (made := cost.node(node).bytes_written)
    )
    saved = tuple(
        SavedValue(n, layer_of(nodes[n]), _op(nodes[n]), node_bytes(nodes[n]))
        for n in captured.schedule.saved
    )
    return Choice(
        captured.name,
        captured.joint.fingerprint,
        captured.frontier.pass_id,
        captured.point.label,
        captured.schedule,
        captured.point.seconds,
        recomputed,
        saved,
        captured.point.alternative,
        tuple(
            SavedValue(name, layer_of(nodes[name]), _op(nodes[name]), node_bytes(nodes[name]))
            for name in captured.point.offloaded
        ),
    )


def _followed(session: Session, captured: Captured, choice: Choice) -> FrontierPoint:
    """What a plan that is replayed chose for ``captured``, as its frontier has it where it is small enough to
    be looked through: there it is known what the calls around it keep."""
    point = replayed_point(session, captured, choice)
    if captured.frontier is None or not follows_plan(session):
        return point
    same = choice.schedule, choice.alternative, point.offloaded
    known = (p for p in captured.frontier.points if (p.schedule, p.alternative, p.offloaded) == same)
    return next((replace(p, seconds=choice.seconds, label=choice.label) for p in known), point)


def replayed_point(session: Session, captured: Captured, choice: Choice) -> FrontierPoint:
    """What a plan that is replayed chose for ``captured``, in the form that it is of."""
    assert captured.joint is not None
    point = baseline_point(session, captured.joint, choice.schedule)
    return FrontierPoint(
        choice.schedule,
        point.forward_peak,
        point.backward_peak,
        point.retained,
        point.gradients,
        choice.seconds,
        label=choice.label,
        alternative=choice.alternative,
        offloaded=tuple(value.node for value in choice.offloaded),
        moved_bytes=sum(value.bytes for value in choice.offloaded),
    )


def _op(node: fx.Node) -> str:
    return str(plain_call(node)[0])
