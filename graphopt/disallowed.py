"""What passes that change results, and are not allowed to, are predicted to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphopt.alternatives import compatible
from graphopt.budget import format_bytes
from graphopt.errors import PassError
from graphopt.passes import Pass, PassContext
from graphopt.program import Program
from graphopt.proposals import read_proposals
from graphopt.selection import choose

__all__ = ["advice_on_disallowed"]


def advice_on_disallowed(
    programs: Sequence[Program], passes: Sequence[Pass], ctx: PassContext, missing_bytes: int
) -> list[str]:
    """Sentences that name the passes of a pipeline that would free ``missing_bytes`` were they allowed: each
    one that does alone, or else all of them if they do together.

    Bytes are what their candidates predict, taken off the least peak that was found without them; nothing
    is rewritten. A pass that fails to propose is left out.
    """
    savings: dict[str, int] = {}
    for step in passes:
        if not step.exact and step.name not in ctx.allow:
            savings[step.name] = savings.get(step.name, 0) + _predicted(programs, step, ctx)
    helping = {name: saved for name, saved in savings.items() if saved > 0}
    alone = {name: saved for name, saved in helping.items() if saved >= missing_bytes}
    if alone:
        return [
            f"pass {name!r} changes results and is not allowed; it is predicted to save "
            f"{format_bytes(saved)}, which would do: allow=({name!r},)"
            for name, saved in alone.items()
        ]
    if not helping or sum(helping.values()) < missing_bytes:
        return []
    names = ", ".join(map(repr, helping))
    return [
        f"passes {names} change results and are not allowed; together they are predicted to save "
        f"{format_bytes(sum(helping.values()))}, which would do: allow={tuple(helping)!r}"
    ]


def _predicted(programs: Sequence[Program], step: Pass, ctx: PassContext) -> int:
    """Bytes that a pass would take off the peak of ``programs``, by its own prediction."""
    allowed = replace(ctx, allow=ctx.allow | {step.name})
    saved = 0
    for program in programs:
        if program.level is not step.level:
            continue
        try:
            offered = read_proposals(step, program, allowed).candidates
        except PassError:
            return 0
        chosen = [*choose(step, offered, allowed, budgeted=True)[0], *compatible(offered)]
        saved -= sum(candidate.delta.peak_bytes + candidate.delta.static_bytes for candidate in chosen)
    return saved
