"""Policies: who picks a schedule for each program of a step.

The planner picks the fastest plan that fits. A policy (``graphopt_policies``, ``optimize(policy=...)``) picks
in its place, from the same curves and with the planner's own choice before it. It cannot break the budget:
what it answers is checked as the planner's is, and an answer that does not hold is that plugin's failure,
after which the planner's choice stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.budget import format_bytes
from graphopt.candidate import Frontier, FrontierPoint
from graphopt.chain_plan import Rerun, chain_peak
from graphopt.device import DeviceSpec
from graphopt.errors import PluginError
from graphopt.plugins.loading import GUARDED

if TYPE_CHECKING:
    from graphopt.captured import Captured
    from graphopt.plugins.records import PolicySpec
    from graphopt.session import Session

__all__ = ["PolicyQuestion", "Selection", "ask_policy", "decide"]


@dataclass(frozen=True)
class Selection:
    """One point for each program of a step, in call order, and the rows of calls that run again together
    (``graphopt.Plan.reruns``; none for steps of one program)."""

    points: tuple[FrontierPoint, ...]
    reruns: tuple[Rerun, ...] = ()


@dataclass(frozen=True)
class PolicyQuestion:
    """What a policy picks from.

    ``frontiers``: the curve of each program, in call order; programs of one kind share one, and should share
    a point as well, since each is compiled on its own. ``calls``: how often the step runs each program.
    ``step_seconds``: what the step takes, as predicted, with nothing recomputed. ``room``: bytes that it may
    take beyond what is held throughout (weights, inputs, gradients), ``None`` without a budget. ``default``:
    what the planner picks, which fits. ``peak(selection)``: bytes that a selection takes at its peak, beyond
    the same; raises ``ValueError`` for another number of points.
    """

    frontiers: tuple[Frontier, ...]
    calls: tuple[int, ...]
    step_seconds: float
    room: int | None
    device: DeviceSpec
    default: Selection
    peak: Callable[[Selection], int]

    def seconds(self, selection: Selection) -> float:
        """Seconds that the schedules of a selection add to the step, its ``reruns`` left out."""
        return sum(count * point.seconds for count, point in zip(self.calls, selection.points, strict=True))


def ask_policy(policy: PolicySpec, question: PolicyQuestion) -> Selection:
    """What ``policy`` picks; the planner's choice where it has no wish (``None``).

    Raises ``PluginError`` for an answer that is no selection from what was offered, or that does not fit, and
    whatever the policy raises.
    """
    answer = policy.choose(question)
    if answer is None:
        return question.default
    wrong = _nonsense(answer, question)
    if wrong:
        raise PluginError(f"policy {policy.name!r}: {wrong}")
    return answer


def decide(session: Session, group: Sequence[Captured], default: Selection, room: int | None) -> Selection:
    """What the policy of ``session`` picks for ``group``; ``default`` without one.

    A policy that fails is recorded with its plugin and among the diagnostics, and ``default`` stands; with
    ``on_error="raise"`` that is a ``PluginError``.
    """
    session.chosen_by = ""
    policy = session.policy
    if policy is None:
        return default
    observed = session.observed(group)
    calls = tuple(observed.calls) if observed else (1,) * len(group)
    links = [] if observed else session.links(group)

    def peak(selection: Selection) -> int:
        if len(selection.points) != len(group):
            raise ValueError(f"a selection has {len(group)} points here, got {len(selection.points)}")
        if observed:
            return observed.peak(selection.points)
        return chain_peak(selection.points, links, selection.reruns)

    question = PolicyQuestion(
        tuple(captured.frontier for captured in group if captured.frontier is not None),
        calls,
        sum(count * captured.reference_seconds for count, captured in zip(calls, group, strict=True)),
        room,
        session.cost.device,
        default,
        peak,
    )
    try:
        with session.host.using("graphopt_policies", policy.name):
            picked = ask_policy(policy, question)
    except GUARDED as error:
        said = session.host.blame("graphopt_policies", policy.name, error)
        if session.on_error == "raise":
            raise PluginError(said) from error
        text = f"{said}: the planner's choice is used"
        if text not in session.diagnostics:
            session.diagnostics.append(text)
        return default
    session.chosen_by = policy.name
    return picked


def _nonsense(answer: object, question: PolicyQuestion) -> str:
    """What is wrong with an answer, or ``""``."""
    if not isinstance(answer, Selection):
        return f"expected a Selection or None, got {answer!r}"
    if not isinstance(answer.points, tuple) or len(answer.points) != len(question.frontiers):
        what = len(answer.points) if isinstance(answer.points, Sequence) else repr(answer.points)
        return f"expected a tuple of {len(question.frontiers)} points, one for each program, got {what}"
    for number, (point, frontier) in enumerate(zip(answer.points, question.frontiers, strict=True)):
        # Copies that say other bytes would be believed.
        if point not in frontier.points:
            return f"point {number} is not one of the {len(frontier.points)} of its program's curve"
    known = question.default.reruns
    if not isinstance(answer.reruns, tuple) or any(row not in known for row in answer.reruns):
        return "its reruns are not among those of the planner's choice: only those are known to run"
    if len(set(answer.reruns)) < len(answer.reruns):
        return "it names a row of its reruns twice"
    moved = sum(point.moved_bytes for point in answer.points)
    room = max((frontier.host_bytes for frontier in question.frontiers), default=0)
    if moved > room:
        return f"it moves {format_bytes(moved)} to the host's memory, where {format_bytes(room)} may be used"
    if question.room is not None and (peak := question.peak(answer)) > question.room:
        return f"its choice takes {format_bytes(peak)}, where {format_bytes(question.room)} are left"
    return ""
