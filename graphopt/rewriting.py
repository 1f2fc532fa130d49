"""Running the passes of one level over a program: propose, choose, apply, verify, or roll back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.candidate import Declined, Frontier, NearMiss
from graphopt.duration import format_seconds
from graphopt.edit import Edit
from graphopt.errors import GraphoptError, PassError, VerificationError, brief
from graphopt.passes import Pass, PassContext, pass_text
from graphopt.plugins.host import PluginHost
from graphopt.program import Program
from graphopt.proposals import Proposals, read_proposals
from graphopt.report import PassRecord, PassStatus
from graphopt.selection import choose, worth
from graphopt.verify import verify_values

__all__ = ["Rewriting", "run_pass", "run_passes"]


@dataclass(frozen=True)
class Rewriting:
    """What came of passes: a record of each, what was not done and why, curves for the planner."""

    records: tuple[PassRecord, ...] = ()
    declined: tuple[Declined, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    frontiers: tuple[Frontier, ...] = ()

    def __add__(self, other: Rewriting) -> Rewriting:
        return Rewriting(
            self.records + other.records,
            self.declined + other.declined,
            self.near_misses + other.near_misses,
            self.frontiers + other.frontiers,
        )


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    ctx: PassContext,
    host: PluginHost,
    *,
    on_error: str = "rollback",
    budgeted: bool = False,
) -> Rewriting:
    """Run the passes of ``program``'s level, in the order given. See ``run_pass``."""
    total = Rewriting()
    for step in passes:
        if step.level is program.level:
            total += run_pass(program, step, ctx, host, on_error=on_error, budgeted=budgeted)
    return total


def run_pass(
    program: Program,
    step: Pass,
    ctx: PassContext,
    host: PluginHost,
    *,
    on_error: str = "rollback",
    budgeted: bool = False,
) -> Rewriting:
    """Run one pass as one transaction: all of its chosen candidates or none.

    A pass that raises, yields nonsense, changes the program while it looks at it, or whose edit breaks
    the structure leaves the program as it was: recorded as ``rolled-back`` with the reason, or raised
    (``PassError``, ``VerificationError``) with ``on_error="raise"``. ``budgeted``: bytes count as gains.
    """
    if not step.exact and step.name not in ctx.allow:
        why = f"changes results: runs with allow=({step.name!r},)"
        return Rewriting((_record(step, host, "skipped", why),))
    try:
        verify_values(program)
    except VerificationError as error:
        return Rewriting((_record(step, host, "skipped", f"the program was not traced: {error.message}"),))
    start = time.perf_counter()
    host.notify_before(ctx, step, program)
    proposals = Proposals()
    refused: list[Declined] = []
    status: PassStatus
    try:
        with program.edit(step.name) as edit:
            proposals = read_proposals(step, program, ctx)
            if edit.differs:
                raise PassError(f"{step.name}: propose() changed the program: only apply() may")
            chosen, refused = choose(step, proposals.candidates, ctx, budgeted=budgeted)
            for candidate in chosen:
                _apply(step, candidate.id, candidate.apply, edit)
    except GraphoptError as error:
        if on_error == "raise":
            raise
        status, reason = "rolled-back", error.message
        proposals, refused = Proposals(), []
    else:
        gain = sum(worth(candidate, ctx, budgeted=False) for candidate in chosen)
        status, reason = _outcome(proposals, len(chosen), gain, edit)
    record = _record(step, host, status, reason, time.perf_counter() - start)
    host.notify_after(ctx, step, program, record)
    return Rewriting((record,), (*proposals.declined, *refused), proposals.near_misses, proposals.frontiers)


def _apply(step: Pass, candidate: str, apply: object, edit: Edit) -> None:
    assert callable(apply)
    try:
        apply(edit)
    except GraphoptError:
        raise
    except Exception as error:
        raise PassError(f"{step.name}: candidate {candidate!r}: apply() raised {brief(error)}") from error


def _outcome(proposals: Proposals, chosen: int, gain: float, edit: Edit) -> tuple[PassStatus, str]:
    if proposals.frontiers:
        return "applied", ""
    if not proposals.candidates:
        missed = len(proposals.near_misses)
        return "no-op", f"nothing to rewrite; {missed} near misses" if missed else "nothing to rewrite"
    share = f"{chosen} of {len(proposals.candidates)} candidates"
    if chosen and not edit.committed:
        return "no-op", f"{share} chosen, none changed the program"
    if not chosen:
        return "no-op", f"{share} chosen"
    return "applied", f"{share}" + (f", saves {format_seconds(gain)} (predicted)" if gain else "")


def _record(
    step: Pass, host: PluginHost, status: PassStatus, reason: str, seconds: float = 0.0
) -> PassRecord:
    plugin = host.owner("graphopt_passes", step.name).plugin
    text = pass_text(step)
    options = text[len(step.name) + 1 : -1] if text != step.name else ""
    return PassRecord(step.name, plugin, status, reason, options, seconds)
