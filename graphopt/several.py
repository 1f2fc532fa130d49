"""Several graphs under one budget: each looked at as it will be compiled, planned together, compiled,
and planned again where the code turns out to take more than was expected of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graphopt.candidate import FrontierPoint
from graphopt.captured import Captured
from graphopt.choosing import choose_schedules, record_plan
from graphopt.errors import CaptureError
from graphopt.lowered_points import corrected, exact_point, with_bytes
from graphopt.schedule import Schedule
from graphopt.step_cost import predicted_peak

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["ROUNDS", "compile_together"]

ROUNDS = 6
"""How often a plan may be corrected by what its code turned out to hold."""

_Key = tuple[str, str, Schedule]


def compile_together(session: Session, group: Sequence[Captured]) -> None:
    """Plan ``group`` and bind what each runs. Raises ``BudgetError`` where no plan fits.

    Of code that fuses kernels the memory is known once it is there: if the plan then misses the budget,
    it is made again with the true figures, at most ``ROUNDS`` times; after that only schedules whose code
    is there count.
    """
    if session.dry_run:
        choose_schedules(session, group)
        for captured in group:
            captured.run = _never
        return
    code: dict[_Key, tuple[Callable[..., Any], FrontierPoint]] = {}
    for _ in range(ROUNDS if session.emitter.fuses else 1):
        # What is compiled is judged by its code; estimates alone refuse nothing.
        choose_schedules(session, group, tentative=session.emitter.fuses)
        fresh = _compile(session, group, code)
        budget = session.plan.budget if session.plan is not None else None
        if not session.emitter.fuses or budget is None or predicted_peak(session, group) <= budget:
            break
        if not fresh:
            _keep_compiled(session, group, code)
            break
    else:
        _keep_compiled(session, group, code)
    record_plan(session, group)
    for captured in group:
        assert captured.plain is not None
        captured.run = session.guarded(code[_key(captured)][0], captured.plain, captured.name)


def _compile(
    session: Session, group: Sequence[Captured], code: dict[_Key, tuple[Callable[..., Any], FrontierPoint]]
) -> bool:
    """Compile what is chosen and not compiled yet; ``False`` if all of it was."""
    fresh = False
    for captured in group:
        key = _key(captured)
        if key in code:
            continue
        fresh = True
        assert captured.recompile is not None and captured.point is not None
        run, point = captured.recompile(), captured.point
        if session.emitter.fuses:
            records = list(session.emitter.records)
            point = exact_point(captured, point, records)
            if observed := session.observed(group):
                observed.state(captured, records)
        code[key] = run, point
    if session.emitter.fuses and session.observed(group) is None:
        _correct(group, code)
    return fresh


def _correct(group: Sequence[Captured], code: dict[_Key, tuple[Callable[..., Any], FrontierPoint]]) -> None:
    """Put the bytes that code states into the frontiers of programs that no step was seen of."""
    for captured in group:
        exact = {key[1:]: point for key, (_, point) in code.items() if key[0] == captured.name}
        assert captured.frontier is not None and captured.point is not None
        captured.frontier = replace(captured.frontier, points=corrected(captured.frontier.points, exact))
        captured.point = with_bytes(captured.point, exact[_key(captured)[1:]])


def _keep_compiled(
    session: Session, group: Sequence[Captured], code: dict[_Key, tuple[Callable[..., Any], FrontierPoint]]
) -> None:
    """Take away all points whose code is not there, and plan with the others."""
    for captured in group:
        assert captured.frontier is not None
        kept = [p for p in captured.frontier.points if (captured.name, p.alternative, p.schedule) in code]
        captured.frontier = replace(captured.frontier, points=tuple(kept))
    if observed := session.observed(group):
        observed.forget()
    choose_schedules(session, group)


def _key(captured: Captured) -> _Key:
    """What code depends on: the program, its form, the schedule."""
    assert captured.point is not None
    return captured.name, captured.point.alternative, captured.schedule


def _never(*args: Any) -> Any:
    raise CaptureError("this program was planned, not compiled")
