"""What the planner may run instead of a program: copies of it, each with one alternative applied.

Other candidates are chosen by what they gain by themselves. An alternative trades one resource for
another (bytes for seconds, as computing logits in chunks does), and whether that pays depends on what
else the budget would have to be met with. So each becomes a program of its own, is planned like the
one that it stands for, and the planner picks among the schedules of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from graphopt.candidate import Candidate, Frontier, FrontierPoint
from graphopt.errors import GraphoptError, PassError, brief
from graphopt.passes import Pass, PassContext
from graphopt.program import Program
from graphopt.proposals import read_proposals

__all__ = ["alternatives", "united"]


def alternatives(
    make: Callable[[], Program],
    passes: Sequence[Pass],
    ctx: PassContext,
    failed: Callable[[str, GraphoptError], None],
) -> Iterator[tuple[Candidate, Program]]:
    """Each alternative that the ``passes`` of the program's level offer, and a program with it applied.

    ``make`` gives a new copy of the program, its nodes named alike each time. A pass or candidate
    that fails is reported to ``failed`` with a sentence and left out.
    """
    program = make()
    for step in passes:
        if step.level is not program.level or not (step.exact or step.name in ctx.allow):
            continue
        try:
            offered = [c for c in read_proposals(step, program, ctx).candidates if c.alternative]
        except GraphoptError as error:
            failed(f"{program.name}: {step.name} offered no alternatives: {error.message}", error)
            continue
        for candidate in offered:
            if candidate.exactness == "lossy" and step.name not in ctx.allow:
                continue
            changed = make()
            try:
                _apply(candidate, changed)
            except GraphoptError as error:
                failed(f"{program.name}: alternative {candidate.id} was left out: {error.message}", error)
            else:
                yield candidate, changed


def _apply(candidate: Candidate, program: Program) -> None:
    with program.edit(candidate.pass_id) as edit:
        try:
            candidate.apply(edit)
        except GraphoptError:
            raise
        except Exception as error:
            raise PassError(f"{candidate.id}: apply() raised {brief(error)}") from error


def united(frontiers: Mapping[str, tuple[Frontier, float]]) -> Frontier:
    """The frontiers of a program (under ``""``) and of its alternatives (under their ids) as one.

    Each comes with the seconds of its own program without recomputation; times of the result count
    from those of the program itself. A point that another beats in every respect is left out.
    """
    own, start = frontiers[""]
    points: list[FrontierPoint] = []
    shifts: list[tuple[Frontier, float]] = []
    for name, (frontier, seconds) in frontiers.items():
        shift = seconds - start
        shifts.append((frontier, shift))
        points += [replace(p, seconds=p.seconds + shift, alternative=name) for p in frontier.points]
    return Frontier(
        own.pass_id,
        _undominated(points),
        min(frontier.floor_bytes for frontier in (f for f, _ in shifts)),
        lambda budget: min(f.seconds_bound(budget) + shift for f, shift in shifts),
    )


def _undominated(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=_measures):
        if not any(all(a <= b for a, b in zip(_measures(k), _measures(point), strict=True)) for k in kept):
            kept.append(point)
    return tuple(sorted(kept, key=lambda p: (p.peak_bytes, p.seconds)))


def _measures(point: FrontierPoint) -> tuple[int, int, int, int, float]:
    return (point.forward_peak, point.backward_peak, point.retained, point.gradients, point.seconds)
