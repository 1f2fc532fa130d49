"""Choosing among candidates: allowed ones that gain, the better of two that conflict."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.budget import format_bytes
from graphopt.candidate import Candidate, Declined
from graphopt.duration import format_seconds
from graphopt.passes import Pass, PassContext

__all__ = ["choose", "worth"]


def worth(candidate: Candidate, ctx: PassContext, *, budgeted: bool) -> float:
    """Seconds that a candidate is predicted to save.

    Under a budget bytes count as well, each at the time that the device takes to copy it: that is
    the least that freeing it in another way would cost.
    """
    seconds = -candidate.delta.seconds
    if budgeted:
        freed = -candidate.delta.peak_bytes - candidate.delta.static_bytes
        seconds += freed / ctx.cost.device.copy_bytes_per_second
    return seconds


def choose(
    step: Pass, candidates: Sequence[Candidate], ctx: PassContext, *, budgeted: bool
) -> tuple[list[Candidate], list[Declined]]:
    """What of ``candidates`` is applied, in their order, and why the others are not.

    Exact candidates are taken unless they are predicted to cost something, those of a mandatory pass
    always, and so is what was ``asked`` for; what changes the order of rounding has to gain; what is lossy
    has to gain and its pass, or the one that it is ``allowed_by``, to be named in ``ctx.allow``. Two
    conflict if one names the other or they share nodes; the one that is worth more stays, the earlier one of
    equals. Alternatives are left to the planner.
    """
    declined: dict[str, str] = {}
    gains = {c.id: worth(c, ctx, budgeted=budgeted) for c in candidates}
    wanted = []
    for candidate in candidates:
        if candidate.alternative:
            continue
        why = _refusal(step, candidate, gains[candidate.id], ctx, budgeted=budgeted)
        if why:
            declined[candidate.id] = why
        else:
            wanted.append(candidate)
    chosen: list[Candidate] = []
    holder: dict[str, str] = {}
    for candidate in sorted(wanted, key=lambda c: -gains[c.id]):
        rival = next((holder[name] for name in candidate.nodes if name in holder), "") or next(
            (c.id for c in chosen if candidate.id in c.conflicts or c.id in candidate.conflicts), ""
        )
        if rival:
            declined[candidate.id] = f"conflicts with {rival}, which gains as much or more"
            continue
        chosen.append(candidate)
        holder.update(dict.fromkeys(candidate.nodes, candidate.id))
    taken = {candidate.id for candidate in chosen}
    order = [candidate for candidate in candidates if candidate.id in taken]
    return order, [Declined(c.id, declined[c.id]) for c in candidates if c.id in declined]


def _refusal(step: Pass, candidate: Candidate, gain: float, ctx: PassContext, *, budgeted: bool) -> str:
    if step.asked:
        return ""
    allowed_by = candidate.allowed_by or step.name
    if candidate.exactness == "lossy" and allowed_by not in ctx.allow:
        return f"lossy in {candidate.metric}: runs with allow=({allowed_by!r},)"
    if step.mandatory and candidate.exactness == "exact":
        return ""
    if gain < 0 or (gain == 0 and candidate.exactness != "exact"):
        delta = candidate.delta
        effects = [f"{format_seconds(delta.seconds)}"]
        if budgeted:
            effects.append(f"{format_bytes(delta.peak_bytes + delta.static_bytes)}")
        return f"no predicted gain: changes the step by {' and '.join(effects)}"
    return ""
