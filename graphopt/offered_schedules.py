"""What a captured program could run: the curve of schedules that passes of the joint level offer."""

from __future__ import annotations

import time
from collections.abc import Hashable, Set
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.fx as fx

from graphopt import _torch
from graphopt.alternatives import (
    FORM_EFFORT,
    joined,
    joint_alternatives,
    united,
)
from graphopt.candidate import Declined, Frontier, FrontierPoint
from graphopt.capture.joint import drop_unread_statistics, inference_program, joint_program, save_everything
from graphopt.capture.own_gradients import own_gradients
from graphopt.capture.true_layouts import settle_layouts
from graphopt.captured import Captured
from graphopt.collection import uncollected
from graphopt.emit.fused_point import fused_point
from graphopt.order import must_happen
from graphopt.passes import PassContext
from graphopt.plans import Choice
from graphopt.program import Program
from graphopt.replay import make_random_states_explicit
from graphopt.rewriting import Rewriting, run_joint_passes
from graphopt.schedule import Schedule

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = [
    "baseline_point",
    "depends",
    "follows_plan",
    "frontier_of",
    "named_choices",
    "named_forms",
    "room_of",
    "say_effort",
    "see_inference",
    "see_joint",
]


@uncollected()
def see_inference(session: Session, captured: Captured, graph: fx.GraphModule) -> None:
    """Take note of a functional inference graph, and what it could run."""
    captured.mode = "infer"
    if session.emitter.name == "eager":
        _settle(session, captured, graph)
    captured.joint = inference_program(captured.name, graph, captured.specs)
    captured.traced = captured.joint.fingerprint
    captured.baseline = _unchanged(captured.joint)
    captured.frontier = frontier_of(session, captured)


@uncollected()
def see_joint(session: Session, captured: Captured, joint: fx.GraphModule, num_outputs: int) -> None:
    """Take note of a joint graph, changed in place, and of the schedules that it could run."""
    captured.mode = "train"
    _torch.eliminate_common_subexpressions(joint, must_happen)
    drop_unread_statistics(joint)
    if session.emitter.name == "eager":
        _settle(session, captured, joint)
        make_random_states_explicit(joint)
        own_gradients(joint, num_outputs, session.gradients_of(captured.specs))
    program = joint_program(captured.name, joint, captured.specs, num_outputs)
    traced = program.fingerprint
    if captured.joint is None or captured.traced != traced:
        captured.joint, captured.traced, captured.point = program, traced, None
        captured.baseline = save_everything(program)
        captured.frontier = frontier_of(session, captured)
    elif captured.joint.fingerprint == traced:
        captured.joint = program


def _settle(session: Session, captured: Captured, graph: fx.GraphModule) -> None:
    """Let values have the layouts of the kernels that run, and the report say where they could not."""
    for why in settle_layouts(graph):
        note = f"{captured.name}: {why}"
        if note not in session.diagnostics:
            session.diagnostics.append(note)


def frontier_of(session: Session, captured: Captured) -> Frontier:
    """The curve of schedules that the joint-level passes offer; the baseline is always on it."""
    assert captured.joint is not None and captured.baseline is not None
    # Searching for schedules takes longer than all else, and a program that fits as it is needs no other.
    enough = _fits(session, captured)
    bounded = session.bounded and not enough
    room = room_of(session, captured) if bounded else None
    ctx = session.context(captured.mode, bounded=bounded)
    ctx = replace(ctx, effort=captured.effort, room_bytes=room, searching=not follows_plan(session))
    done = _passed(session, captured, ctx)
    start = time.perf_counter()
    baseline = _rebased(session, captured, done)
    if enough and not _fits(session, captured):
        # Rewritten it takes more. Passes that free memory have their turn on what there is.
        ctx = replace(ctx, bounded=True, room_bytes=room_of(session, captured))
        freed = _passed(session, captured, ctx)
        baseline = _rebased(session, captured, freed)
        done += freed
    nearby = not ctx.bounded or ctx.room_bytes is not None
    captured.partly = not ctx.searching or (nearby and not session.emitter.by_segments)
    if not captured.provisional:
        session._note(done)
    captured.reference_seconds, captured.flops = _prices(session, captured.joint, captured.baseline)
    best = done.frontiers[-1] if done.frontiers else Frontier("none", (baseline,))
    if captured.mode == "train" and not captured.provisional:
        # A pass that saw this very program and offered nothing need not look again.
        seen = frozenset(p.name for p in session.passes) - done.offering if not done.changed else frozenset()
        best = _with_forms(session, captured, best, ctx, seen)
    if session.held_gradient_bytes:
        # Each program's gradients are added to those held and go before the next one runs.
        best = replace(best, points=tuple(replace(point, gradients=0) for point in best.points))
    session.planning_seconds += time.perf_counter() - start
    return best


def follows_plan(session: Session) -> bool:
    """Whether a plan that is replayed says which schedules and forms run, and nothing else is asked for."""
    return session.whole and session.replay is not None and not session.every


def named_choices(session: Session, captured: Captured) -> list[Choice]:
    """What the plan which is replayed names for the calls of ``captured``."""
    assert session.replay is not None
    calls = captured.calls or (captured.name,)
    return [choice for choice in session.replay.choices if choice.program in calls]


def named_forms(session: Session, captured: Captured) -> frozenset[str]:
    """The forms of ``captured`` that the plan which is replayed names, ``""`` for the program itself."""
    return frozenset(choice.alternative for choice in named_choices(session, captured))


def room_of(session: Session, captured: Captured) -> int | None:
    """Bytes that a program may take above what is held throughout, by what it takes as it is; ``None`` where
    it is not the whole step, or is not planned op by op for one budget."""
    if not _has_room(session, captured):
        return None
    if captured.room is not None:
        return captured.room
    assert captured.reference is not None
    base = session.static_bytes or 0
    budget = session.budget.resolve(base + captured.reference.peak_bytes)
    return None if budget is None else budget - base


def _has_room(session: Session, captured: Captured) -> bool:
    one = session.whole and not captured.provisional and not session.emitter.fuses
    others = session.every or session.policy is not None or session.replay is not None
    return one and not others and session.budget.memory is not None


def _fits(session: Session, captured: Captured) -> bool:
    """Whether a program as it is, nothing freed, keeps the one budget that there is."""
    assert captured.joint is not None and captured.baseline is not None
    if not _has_room(session, captured):
        return False
    captured.reference = baseline_point(session, captured.joint, captured.baseline)
    room = room_of(session, captured)
    return room is not None and captured.reference.peak_bytes <= room


def _rebased(session: Session, captured: Captured, done: Rewriting) -> FrontierPoint:
    """What a program takes as it is, after passes."""
    assert captured.joint is not None and captured.baseline is not None
    if done.changed:
        again = save_everything if captured.mode == "train" else _unchanged
        captured.baseline = again(captured.joint)
    captured.reference = baseline_point(session, captured.joint, captured.baseline)
    return captured.reference


def _passed(session: Session, captured: Captured, ctx: PassContext) -> Rewriting:
    """What the joint-level passes make of ``captured`` as it was traced. Of a program of which others are
    part it is traced first to see a step, then to plan it: passes run once for both."""
    assert captured.joint is not None
    budgeted = session.budget.memory is not None
    asked = (ctx.bounded, ctx.searching, ctx.room_bytes, ctx.allow, ctx.only, ctx.effort)
    key = (captured.mode, captured.traced, budgeted, *asked)
    if captured.passed is None or captured.passed[0] != key:
        program = captured.joint
        done = run_joint_passes(
            program, session.passes, ctx, session.host, on_error=session.on_error, budgeted=budgeted
        )
        captured.passed = key, program, done
    _, captured.joint, done = captured.passed
    captured.budget_decides |= done.budget_decides
    return done


def depends(session: Session, captured: Captured) -> Hashable:
    """What the frontier and the forms of a captured program follow from besides itself."""
    budgeted = captured.budget_decides and session.budget.memory is not None
    held = session.held_gradient_bytes > 0
    return (
        budgeted,
        session.bounded,
        held,
        session.allow,
        session.only,
        id(session.replay) if session.replay else 0,
    )


def _with_forms(
    session: Session, captured: Captured, own: Frontier, ctx: PassContext, idle: Set[str]
) -> Frontier:
    """The frontier of a program together with those of what joint-level passes offer instead of it."""
    source = [step for step in session.passes if step.name == own.pass_id]
    if not source:
        return own
    assert captured.joint is not None
    forms, frontiers = {"": replace(captured)}, {"": (own, captured.reference_seconds)}
    others = [step for step in session.passes if step not in source and step.name not in idle]
    seeing = replace(ctx, effort=ctx.effort * FORM_EFFORT)
    wanted = None if ctx.searching else named_forms(session, captured)
    for name, program in joint_alternatives(captured.joint, others, ctx, session.fail):
        if wanted is not None and joined(captured.form, name) not in wanted:
            captured.passed_over += (name,)
            continue
        done = run_joint_passes(program, source, seeing, session.host, on_error=session.on_error)
        if not done.frontiers:
            session.diagnostics.extend(
                f"{captured.name} with {name}: {record.id}: {record.reason}" for record in done.records
            )
            continue
        baseline = save_everything(program)
        seconds, flops = _prices(session, program, baseline)
        forms[name] = replace(
            captured, joint=program, baseline=baseline, reference_seconds=seconds, flops=flops
        )
        frontiers[name] = done.frontiers[-1], forms[name].reference_seconds
        say_effort(session, joined(captured.name, name), done.frontiers[-1])
    if len(forms) == 1:
        return own
    captured.forms = forms
    return united(frontiers)


def say_effort(session: Session, form: str, found: Frontier) -> None:
    """Let the report say that there may be better schedules of a form than those that were found."""
    if found.effort < 1:
        why = f"a form of a large program: searched with {found.effort:.0%} of the usual work"
        session.declined.append(Declined(f"further schedules of {form}", why))


def _prices(session: Session, program: Program, schedule: Schedule) -> tuple[float, dict[str, int]]:
    """Predicted seconds of everything that a schedule runs, and the FLOPs of every node."""
    costs = {node.name: session.cost.node(node) for node in program.nodes()}
    if session.emitter.fuses:
        seconds = fused_point(program, schedule, session.cost, flops=0, label="").seconds
    else:
        runs = (*schedule.forward, *schedule.backward)
        seconds = sum(costs[name].seconds for name in runs if name in costs)
    return seconds, {name: cost.flops for name, cost in costs.items()}


def baseline_point(session: Session, program: Program, schedule: Schedule) -> FrontierPoint:
    if session.emitter.fuses:
        point = fused_point(program, schedule, session.cost, flops=0, label="no recomputation")
        return replace(point, seconds=0.0, gradients=0 if session.held_gradient_bytes else point.gradients)
    profile = session.cost.memory([(program, schedule)])
    return FrontierPoint(
        schedule,
        profile.phase_peak("forward"),
        profile.phase_peak("backward"),
        profile.retained_bytes,
        profile.gradient_bytes,
        0.0,
        label="no recomputation",
    )


def _unchanged(program: Program) -> Schedule:
    """Everything in the order of the graph."""
    return Schedule(tuple(n.name for n in program.graph.nodes if n.op in ("call_function", "get_attr")))
