"""What the planner may run instead of a program: copies of it, each with one alternative applied.

Other candidates are chosen by what they gain by themselves. An alternative trades one resource for
another (bytes for seconds, as computing logits in chunks does), and whether that pays depends on what
else the budget would have to be met with. So each becomes a program of its own, is planned like the
one that it stands for, and the planner picks among the schedules of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphopt.candidate import Candidate, Frontier, FrontierPoint
from graphopt.errors import GraphoptError, PassError, brief
from graphopt.passes import Pass, PassContext
from graphopt.program import Program, copied_module
from graphopt.proposals import read_proposals

__all__ = [
    "FORM_EFFORT",
    "OFFERS",
    "Form",
    "Grade",
    "Offer",
    "alternatives",
    "applied",
    "begins",
    "compatible",
    "coordinate_wise",
    "copied",
    "joined",
    "joint_alternatives",
    "offers",
    "united",
]

OFFERS = 3
"""How many offers of one pass are looked at together with those of others."""

FORM_EFFORT = 0.25
"""The share of the work spent on the schedules of a large program that goes into those of each form of it:
there may be a dozen, and together they should not take several times as long as the program itself."""


@dataclass(frozen=True)
class Offer:
    """Alternatives of one pass that are weighed as one: a single one, or those of a family at all their
    places. ``id`` is its name in plans."""

    id: str
    candidates: tuple[Candidate, ...]

    @property
    def peak_bytes(self) -> int:
        """Predicted change of the peak: that of the place which frees least, as others may then hold it."""
        return max(candidate.delta.peak_bytes for candidate in self.candidates)

    @property
    def seconds(self) -> float:
        return sum(candidate.delta.seconds for candidate in self.candidates)


def offers(
    program: Program, step: Pass, ctx: PassContext, failed: Callable[[str, GraphoptError], None]
) -> list[Offer]:
    """What a pass offers instead of ``program``; without a budget, what is predicted to take no longer. A
    pass that fails is reported to ``failed``."""
    if step.level is not program.level or not (step.exact or step.name in ctx.allow):
        return []
    try:
        found = [c for c in read_proposals(step, program, ctx).candidates if c.alternative]
    except GraphoptError as error:
        failed(f"{program.name}: {step.name} offered no alternatives: {error.message}", error)
        return []
    families: dict[str, list[Candidate]] = {}
    for candidate in found:
        if candidate.exactness != "lossy" or (candidate.allowed_by or step.name) in ctx.allow:
            families.setdefault(candidate.family or candidate.id, []).append(candidate)
    made = [
        Offer(together[0].id if len(together) == 1 else name, together)
        for name, members in families.items()
        if (together := tuple(compatible(members)))
    ]
    return [offer for offer in made if ctx.bounded or offer.seconds <= 0]


def alternatives(
    make: Callable[[], Program],
    passes: Sequence[Pass],
    ctx: PassContext,
    failed: Callable[[str, GraphoptError], None],
    look_at: Callable[[Sequence[Offer]], Sequence[Offer]] | None = None,
) -> Iterator[tuple[Offer, Program]]:
    """What the ``passes`` of the program's level offer, ``OFFERS`` each or those that ``look_at`` takes, and
    a program with it applied.

    ``make`` gives a new copy of the program, its nodes named alike each time. A pass or candidate
    that fails is reported to ``failed`` with a sentence and left out.
    """
    program = make()
    for step in passes:
        for offer in (look_at or _worth_a_look)(offers(program, step, ctx, failed)):
            changed = make()
            if applied(offer, changed, failed):
                yield offer, changed


def coordinate_wise(
    program: Program,
    passes: Sequence[Pass],
    ctx: PassContext,
    failed: Callable[[str, GraphoptError], None],
    look: Callable[[Form], Grade | None],
    grade: Grade,
) -> list[Offer]:
    """Try what passes offer together on copies of ``program``: each pass's offers on top of the best of the
    passes before it.

    ``grade`` is that of the program itself; ``look`` tells that of a form, ``None`` where it cannot be had.
    Of the offers of one pass ``OFFERS`` are looked at, those that are not worse than another in both
    predicted bytes and seconds. So the forms are at most ``OFFERS`` times the passes that offer anything,
    where all combinations would be their product. Where a form fits already, one that is predicted to take
    longer is not looked at: such offers are returned.
    """
    best = Form("", program, 0.0)
    left: list[Offer] = []
    for step in passes:
        base = best
        found = _worth_a_look(offers(base.program, step, ctx, failed))
        # What takes least longer may make the others needless.
        for offer in sorted(found, key=lambda offer: offer.seconds):
            if not grade.may_gain_from(base.seconds + offer.seconds):
                left.append(offer)
                continue
            form = base.with_offer(offer, failed)
            reached = None if form is None else look(form)
            if form is not None and reached is not None and reached < grade:
                grade, best = reached, form
    return left


@dataclass(frozen=True)
class Form:
    """What may run instead of a program: ``program``, that with offers applied, and the ``seconds`` that they
    are predicted to add."""

    name: str
    program: Program
    seconds: float

    def with_offer(self, offer: Offer, failed: Callable[[str, GraphoptError], None]) -> Form | None:
        """A copy with another offer applied, ``None``, reported to ``failed``, if that does not work."""
        changed = copied(self.program)
        if not applied(offer, changed, failed):
            return None
        return Form(joined(self.name, offer.id), changed, self.seconds + offer.seconds)


@dataclass(frozen=True, order=True)
class Grade:
    """How good a program is, less being better: the ``seconds`` that the fastest of its schedules adds that
    fit the budget, else the ``peak`` in bytes of its least."""

    above: bool
    """Whether none fits, or no budget is known for the program alone."""
    seconds: float
    peak: int

    @classmethod
    def of(cls, frontier: Frontier, shift: float, room: int | None) -> Grade:
        """That of the schedules of ``frontier``, whose program takes ``shift`` seconds more than the one that
        times count from. ``room``: bytes that they may take, ``None`` where that is not known."""
        fitting = [point for point in frontier.points if room is not None and point.peak_bytes <= room]
        if not fitting:
            return cls(True, 0.0, min(point.peak_bytes for point in frontier.points))
        fastest = min(fitting, key=lambda point: (point.seconds, point.peak_bytes))
        return cls(False, fastest.seconds + shift, fastest.peak_bytes)

    def may_gain_from(self, seconds: float) -> bool:
        """Whether a program that takes ``seconds`` longer before any recomputation may be better."""
        return self.above or seconds <= self.seconds


def applied(offer: Offer, program: Program, failed: Callable[[str, GraphoptError], None]) -> bool:
    """Apply an offer, one place after another; ``False``, reported to ``failed``, if that does not work."""
    for candidate in offer.candidates:
        try:
            _apply_all([candidate], program, candidate.pass_id)
        except GraphoptError as error:
            failed(f"{program.name}: alternative {candidate.id} was left out: {error.message}", error)
            return False
    return True


def _worth_a_look(found: Sequence[Offer]) -> list[Offer]:
    """``OFFERS`` of the offers that no other beats: least bytes, least seconds, and those between. Offers
    that are predicted alike, as where a pass predicts nothing, do not beat each other."""
    kept: list[Offer] = []
    for offer in sorted(found, key=lambda o: (o.peak_bytes, o.seconds)):
        if not kept or offer.seconds < kept[-1].seconds or _alike(offer, kept[-1]):
            kept.append(offer)
    if len(kept) <= OFFERS:
        return kept
    return [kept[k * (len(kept) - 1) // (OFFERS - 1)] for k in range(OFFERS)]


def _alike(one: Offer, other: Offer) -> bool:
    return (one.peak_bytes, one.seconds) == (other.peak_bytes, other.seconds)


def joint_alternatives(
    program: Program,
    passes: Sequence[Pass],
    ctx: PassContext,
    failed: Callable[[str, GraphoptError], None],
) -> Iterator[tuple[str, Program]]:
    """Copies of a joint program with alternatives applied, named by the passes that offered them.

    A joint program has many values and each may have alternatives of its own, so they are not tried one
    by one: the first copy has all of the first pass that offers any (of two that conflict, the earlier),
    the next those of the second pass as well, and so on. What fails is reported to ``failed`` and left out.
    """
    taken: list[str] = []
    for step in passes:
        if step.level is not program.level or not (step.exact or step.name in ctx.allow):
            continue
        try:
            # Most programs are offered nothing, and copies of large ones take long.
            if not _offered(step, program, ctx):
                continue
            changed = copied(program)
            _apply_all(_offered(step, changed, ctx), changed, step.name)
        except GraphoptError as error:
            failed(f"{program.name}: alternatives of {step.name} were left out: {error.message}", error)
            continue
        program = changed
        taken.append(step.name)
        yield "+".join(taken), changed


def _offered(step: Pass, program: Program, ctx: PassContext) -> list[Candidate]:
    found = read_proposals(step, program, ctx).candidates
    return compatible([c for c in found if ctx.bounded or c.delta.seconds <= 0])


def compatible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The alternatives among ``candidates`` that go together; of two that conflict, the earlier one."""
    chosen: list[Candidate] = []
    refused: set[str] = set()
    for candidate in candidates:
        rival = candidate.id in refused or any(c.id in candidate.conflicts for c in chosen)
        if candidate.alternative and not rival:
            chosen.append(candidate)
            refused.update(candidate.conflicts)
    return chosen


def copied(program: Program) -> Program:
    """A program over a copy of the graph, its nodes named alike, and the same weights."""
    return replace(program, gm=copied_module(program.gm))


def _apply_all(candidates: Sequence[Candidate], program: Program, pass_id: str) -> None:
    with program.edit(pass_id) as edit:
        for candidate in candidates:
            try:
                candidate.apply(edit)
            except GraphoptError:
                raise
            except Exception as error:
                raise PassError(f"{candidate.id}: apply() raised {brief(error)}") from error


def united(frontiers: Mapping[str, tuple[Frontier, float]]) -> Frontier:
    """The frontiers of a program (under ``""``) and of its alternatives (under their ids) as one.

    Each comes with the seconds of its own program without recomputation; times of the result count
    from those of the program itself. A point that another beats in every respect is left out. Points that
    are of an alternative already are named by both, outer first.
    """
    own, start = frontiers[""]
    points: list[FrontierPoint] = []
    shifts: list[tuple[Frontier, float]] = []
    for name, (frontier, seconds) in frontiers.items():
        shift = seconds - start
        shifts.append((frontier, shift))
        points += [
            replace(p, seconds=p.seconds + shift, alternative=joined(name, p.alternative))
            for p in frontier.points
        ]
    return Frontier(
        own.pass_id,
        _undominated(points),
        min(frontier.floor_bytes for frontier in (f for f, _ in shifts)),
        lambda budget: min(f.seconds_bound(budget) + shift for f, shift in shifts),
        effort=min(frontier.effort for frontier, _ in shifts),
    )


def joined(outer: str, inner: str) -> str:
    """The name of an alternative of an alternative."""
    return "+".join(name for name in (outer, inner) if name)


def begins(outer: str, name: str) -> bool:
    """Whether ``name`` is that of the alternative ``outer``, or of an alternative of it."""
    return name == outer or name.startswith(f"{outer}+")


def _undominated(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """Forms have thousands of points together: each is held against all that are kept at once. Bytes are
    exact as floating point up to 8 PiB."""
    ordered = sorted(points, key=_measures)
    rows = np.array([_measures(point) for point in ordered], dtype=np.float64).reshape(len(ordered), 6)
    best = np.empty((5, len(ordered)))
    kept: list[FrontierPoint] = []
    for point, row in zip(ordered, rows[:, 1:], strict=True):
        # In the first measure none of those before it is worse.
        beaten = np.ones(len(kept), dtype=bool)
        for known, value in zip(best[:, : len(kept)], row, strict=True):
            beaten &= known <= value
        if not beaten.any():
            best[:, len(kept)] = row
            kept.append(point)
    return tuple(sorted(kept, key=lambda p: (p.peak_bytes, p.seconds)))


def _measures(point: FrontierPoint) -> tuple[int, int, int, int, int, float]:
    stays = point.retained - point.moved_bytes
    return (
        point.forward_peak,
        point.backward_peak,
        point.retained,
        stays,
        point.gradients,
        point.seconds,
    )
