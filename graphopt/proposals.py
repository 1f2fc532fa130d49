"""Reading what a pass yields: sorted by kind, nonsense refused with the pass and the place named."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, Declined, Frontier, NearMiss
from graphopt.errors import InputsError, PassError, brief, nearest
from graphopt.passes import Pass, PassContext
from graphopt.plugins.loading import GUARDED
from graphopt.program import Level, Program
from graphopt.rewrites import rewrite_id
from graphopt.schedule import Schedule

__all__ = ["Proposals", "read_proposals"]

_EXACTNESS = ("exact", "reassociated", "lossy")


@dataclass(frozen=True)
class Proposals:
    """What one pass yielded for one program, in its order."""

    candidates: tuple[Candidate, ...] = ()
    frontiers: tuple[Frontier, ...] = ()
    declined: tuple[Declined, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()


def read_proposals(step: Pass, program: Program, ctx: PassContext) -> Proposals:
    """Run ``step.propose`` to its end. Raises ``PassError`` where it raises or yields nonsense, and
    ``InputsError`` where it says that its options do not fit the program."""
    try:
        returned = step.propose(program, ctx)
        items = list(returned) if isinstance(returned, Iterable) else None
    except (InputsError, PassError):
        raise
    except GUARDED as error:
        raise PassError(f"{step.name}: propose() raised {brief(error)}") from error
    if items is None:
        raise PassError(f"{step.name}: propose() returned {returned!r}: expected an iterable of proposals")
    for item in items:
        if not isinstance(item, (Candidate, Frontier, NearMiss, Declined)):
            expected = "expected a Candidate, Frontier, NearMiss or Declined"
            raise PassError(f"{step.name}: propose() yielded {item!r}: {expected}")
        if isinstance(item, Frontier) and program.level is not Level.JOINT:
            raise PassError(
                f"{step.name}: propose() yielded a Frontier at the {program.level} level: schedules are of "
                "joint programs"
            )
        if isinstance(item, Frontier):
            _check_frontier(step, program, item)
    candidates = tuple(_numbered(item) for item in items if isinstance(item, Candidate))
    _check(step, program, candidates)
    frontiers = tuple(item for item in items if isinstance(item, Frontier))
    withheld: list[Declined] = []
    # A mandatory pass makes programs what others expect: without it nothing would be told by what fails.
    if ctx.only is not None and not step.mandatory:
        offered: list[Candidate | Frontier] = [*candidates, *frontiers]
        refused = [item for item in offered if rewrite_id(program.name, step.name, item) not in ctx.only]
        candidates = tuple(c for c in candidates if not any(c is item for item in refused))
        frontiers = tuple(f for f in frontiers if not any(f is item for item in refused))
        why = "not among the rewrites that were asked for"
        withheld = [Declined(_title(step, item), why) for item in refused]
    return Proposals(
        candidates,
        frontiers,
        (*(item for item in items if isinstance(item, Declined)), *withheld),
        tuple(item for item in items if isinstance(item, NearMiss)),
    )


def _numbered(candidate: Candidate) -> Candidate:
    """The same with numbers of the sizes while tracing where the pass made symbols of them."""
    delta = candidate.delta
    if not isinstance(delta, CostDelta):
        return candidate
    values = {field.name: getattr(delta, field.name) for field in fields(delta)}
    numbers = {name: _torch.hinted(value) for name, value in values.items()}
    if all(numbers[name] is value for name, value in values.items()):
        return candidate
    return replace(candidate, delta=replace(delta, **numbers))


def _title(step: Pass, proposal: Candidate | Frontier) -> str:
    return proposal.id if isinstance(proposal, Candidate) else f"schedules of {step.name}"


def _check_frontier(step: Pass, program: Program, frontier: Frontier) -> None:
    if not frontier.points:
        raise PassError(f"{step.name}: propose() yielded a Frontier without points")
    names = {node.name for node in program.graph.nodes}
    for point in frontier.points:
        if not isinstance(point.source, Schedule):
            # To ask for every schedule would undo that it is deferred.
            continue
        schedule = point.source
        for name in {*schedule.forward, *schedule.saved, *schedule.backward} - names:
            raise PassError(
                f"{step.name}: schedule {point.label!r}: program {program.name} has no node {name!r}"
            )


def _check(step: Pass, program: Program, candidates: Iterable[Candidate]) -> None:
    names = {node.name for node in program.graph.nodes}
    seen: set[str] = set()
    for candidate in candidates:
        wrong = _nonsense(step, program, candidate, names)
        if candidate.id in seen:
            wrong = "another candidate has the same id"
        if wrong:
            raise PassError(f"{step.name}: candidate {candidate.id!r}: {wrong}")
        seen.add(candidate.id)


def _nonsense(step: Pass, program: Program, candidate: Candidate, names: set[str]) -> str:
    """What is wrong with a candidate, or ``""``."""
    if candidate.pass_id != step.name:
        return f"it says that it is of pass {candidate.pass_id!r}"
    for name in candidate.nodes:
        if name not in names:
            close = nearest(str(name), names)
            hint = f"; did you mean {close!r}?" if close else ""
            return f"program {program.name} has no node {name!r}{hint}"
    if not candidate.nodes:
        return "it names no nodes"
    if candidate.exactness not in _EXACTNESS:
        return f"exactness is {candidate.exactness!r}: expected one of {', '.join(map(repr, _EXACTNESS))}"
    if not callable(candidate.apply):
        return f"apply is {candidate.apply!r}: expected a function of the edit"
    delta = candidate.delta
    if not isinstance(delta, CostDelta):
        return f"delta is {delta!r}: expected a CostDelta"
    if not (math.isfinite(delta.seconds) and math.isfinite(delta.error)):
        return f"delta is not finite: seconds={delta.seconds}, error={delta.error}"
    if candidate.exactness == "lossy":
        if step.exact and not candidate.allowed_by:
            return "it is lossy, but the pass says that it is exact"
        if not candidate.metric:
            return "it is lossy and does not say in which metric"
    elif delta.error != 0:
        return f"it is {candidate.exactness}, but predicts an error of {delta.error}"
    return ""
