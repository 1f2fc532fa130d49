"""What a step takes: bytes over its time, seconds and FLOPs, at the schedules that its programs run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import FrontierPoint
from graphopt.captured import Captured
from graphopt.chain_plan import Rerun, chain_peak, least_chain, plan_chain, rerun_calls
from graphopt.cost import Cost, MemoryProfile
from graphopt.program import Program

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = [
    "baseline_of",
    "cost_of",
    "every_schedule",
    "last_baseline",
    "node_bytes",
    "predicted_peak",
    "settle",
    "step_curve",
    "step_memory",
]


def step_memory(session: Session, points: Sequence[FrontierPoint | None]) -> MemoryProfile:
    """Bytes over the present step, run op by op at the given points."""
    taken = [point for point in points if point is not None]
    if observed := session.observed(session.current):
        return observed.profile(taken, session.base_bytes)
    programs = [c.program_at(p) for c, p in zip(session.current, points, strict=True) if p is not None]
    step = [(p, point.schedule) for p, point in zip(programs, taken, strict=True) if p is not None]
    return session.cost.memory(step, base_bytes=session.static_bytes or 0)


@contextmanager
def every_schedule(session: Session) -> Iterator[None]:
    """In the block the present programs of ``session`` have the schedules and forms of all budgets. What they
    run, and what is said of them, stays: to plan them for one budget the fastest may have been enough."""
    partly = [captured for captured in session.current if captured.partly]
    looks = dict.fromkeys(captured.look for captured in partly if captured.look is not None)
    if not looks:
        yield
        return
    were = [(captured, dict(vars(captured))) for captured in session.current]
    go_back, every, seconds = session.checkpoint(), session.every, session.planning_seconds
    session.every = True
    try:
        for look in looks:
            look()
        if session.observed(session.current) is None:
            settle(session.current, session.cost.device.allocation_granularity)
        yield
    finally:
        for captured, values in were:
            vars(captured).update(values)
        go_back()
        session.looked_anew()
        session.every, session.planning_seconds = every, seconds


def step_curve(session: Session, base_bytes: int) -> list[tuple[int, float, int, str]]:
    """(peak, added seconds, FLOPs again, label) of the present step's plans under every budget, least peak
    first.

    Several programs: the planner's choice at each peak that some combination reaches.
    """
    with every_schedule(session):
        return _curve(session, base_bytes)


def _curve(session: Session, base_bytes: int) -> list[tuple[int, float, int, str]]:
    if observed := session.observed(session.current):
        return [
            (
                base_bytes - session.replay_bytes + found.peak_bytes,
                found.seconds,
                sum(count * p.flops for count, p in zip(observed.calls, found.points, strict=True)),
                ", ".join(p.label for p in found.points),
            )
            for found in observed.front
        ]
    links = session.links(session.current)
    if len(links) == 1:
        rooms = [point.peak_bytes for point in links[0].frontier.points]
    else:
        lowest = least_chain(links).peak_bytes
        most = chain_peak([min(link.frontier.points, key=lambda p: p.seconds) for link in links])
        rooms = [lowest + (most - lowest) * k // 24 for k in range(25)]
    rows: list[tuple[int, float, int, str]] = []
    for room in rooms:
        chosen = plan_chain(links, room)
        if chosen is None:
            continue
        row = (
            base_bytes + chosen.peak_bytes,
            chosen.seconds,
            sum(p.flops for p in chosen.points),
            ", ".join([p.label for p in chosen.points] + [str(row) for row in chosen.reruns]),
        )
        if not rows or row[1] < rows[-1][1]:
            rows.append(row)
    return rows


def predicted_peak(session: Session, group: Sequence[Captured]) -> int:
    """Peak in bytes of the whole step at the present points."""
    points = [c.point for c in group if c.point is not None]
    return cost_of(session, group, points, session.reruns).peak_bytes


def baseline_of(session: Session, group: Sequence[Captured]) -> Cost:
    references = tuple(c.reference for c in group if c.reference is not None)
    key = (*map(id, references), session.static_bytes, session.weight_bytes, id(session._seen))
    if session._counted is None or session._counted[0] != key:
        session._counted = key, references, cost_of(session, group, references)
    return session._counted[2]


def last_baseline(session: Session) -> Cost:
    """What the step that was planned last, in vain or not, takes without rewrites."""
    return session._counted[2] if session._counted is not None else baseline_of(session, session.current)


def cost_of(
    session: Session, group: Sequence[Captured], points: Sequence[FrontierPoint], reruns: Sequence[Rerun] = ()
) -> Cost:
    """Cost of a step that runs the given points: exact liveness where programs run op by op,
    the points' own arithmetic where kernels are fused."""
    base = session.static_bytes or 0
    observed = session.observed(group)
    calls = observed.calls if observed else [1] * len(group)
    if observed:
        peak = session.base_bytes + observed.peak(points)
    elif session.emitter.fuses:
        peak = base + chain_peak(points, session.links(group) if reruns else (), reruns)
    elif len(group) == 1 and points[0] is group[0].reference:
        # Counted when it was made.
        peak = base + points[0].peak_bytes
    else:
        programs = [(c.program_at(p), p.schedule) for c, p in zip(group, points, strict=True)]
        step = [(program, schedule) for program, schedule in programs if program is not None]
        peak = session.cost.memory(step, base_bytes=base).peak_bytes
    seconds, flops = 0.0, 0
    for count, c, p in zip(calls, group, points, strict=True):
        runs = (*p.schedule.forward, *p.schedule.backward)
        seconds += count * (c.reference_seconds + p.seconds)
        known = c.forms.get(p.alternative, c).flops
        flops += count * sum(known.get(name, 0) for name in runs)
    links = session.links(group) if reruns else []
    for k in rerun_calls(reruns):
        seconds += links[k].forward_seconds
        known = group[k].forms.get(points[k].alternative, group[k]).flops
        flops += sum(known.get(name, 0) for name in points[k].schedule.forward)
    return Cost(peak, session.weight_bytes or 0, seconds, flops)


def settle(group: Sequence[Captured], granularity: int) -> None:
    """Count what programs leave behind as the step's: gradients of activations become tangents of the
    program before, not held beside those; what the last program returns, and the gradient of a loss that
    its backward starts from, are held to the end."""
    pairs = [(None, group[0]), *itertools.pairwise(group)]
    for earlier, later in pairs:
        if later.settled or later.joint is None:
            continue
        later.settled = True
        if earlier is not None and earlier.joint is not None:
            handed = later.joint.signature.gradients_of("activation")
            arriving = [spec.node for spec in earlier.joint.signature.by_role("tangent")]
            known = (
                _value_bytes(later.joint, handed, granularity),
                _value_bytes(earlier.joint, arriving, granularity),
            )
            _add_gradients(later, -min(known))
        if later is group[-1] and later.mode == "train":
            names = [spec.node for spec in later.joint.signature.outputs if spec.role == "output"]
            tangents = later.joint.find([spec.node for spec in later.joint.signature.by_role("tangent")])
            names += [node.name for node in tangents if not node.meta["val"].dim()]
            _add_gradients(later, _value_bytes(later.joint, names, granularity))


def _add_gradients(captured: Captured, size: int) -> None:
    if captured.frontier is not None:
        points = tuple(replace(point, gradients=point.gradients + size) for point in captured.frontier.points)
        captured.frontier = replace(captured.frontier, points=points)


def _value_bytes(program: Program, names: Sequence[str], granularity: int) -> int:
    """Bytes of the storages of some values, each as the allocator rounds it."""
    nodes = [node for node in program.find(names) if isinstance(node.meta.get("val"), torch.Tensor)]
    sizes = {node.meta["val"].untyped_storage()._cdata: node_bytes(node) for node in nodes}
    return sum(-(-size // granularity) * granularity for size in sizes.values())


def node_bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return _torch.hint(value.untyped_storage().nbytes()) if isinstance(value, torch.Tensor) else 0
