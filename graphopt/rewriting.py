"""Running the passes of one level over a program: propose, choose, apply, verify, or roll back."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from graphopt.candidate import Candidate, Declined, Frontier, NearMiss
from graphopt.conversion import Conversion
from graphopt.decoding.site_pass import SitePass
from graphopt.duration import format_seconds
from graphopt.edit import Edit
from graphopt.errors import GraphoptError, PassError, VerificationError, brief
from graphopt.packing.plan import QuantizationPlan
from graphopt.passes import Pass, PassContext, pass_text
from graphopt.plans import count_text
from graphopt.plugins.host import PluginHost
from graphopt.plugins.loading import GUARDED
from graphopt.program import Level, Program, layer_of
from graphopt.proposals import Proposals, read_proposals
from graphopt.report import PassRecord, PassStatus
from graphopt.rewrites import Rewrite, rewrite_id
from graphopt.selection import choose, worth
from graphopt.verify import verify_values

__all__ = ["Rewriting", "conversion_records", "left_out", "run_joint_passes", "run_pass", "run_passes"]


@dataclass(frozen=True)
class Rewriting:
    """What came of passes: a record of each, what was not done and why, curves for the planner."""

    records: tuple[PassRecord, ...] = ()
    declined: tuple[Declined, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    frontiers: tuple[Frontier, ...] = ()
    changed: bool = False
    """Whether the program is another than before."""
    offering: frozenset[str] = frozenset()
    """Passes that offered something to be weighed as an alternative."""
    rewrites: tuple[Rewrite, ...] = ()
    """What was chosen; schedules and alternatives are for the planner to choose."""
    budget_decides: bool = False
    """Whether another choice would have been made with a budget, or without one."""

    def __add__(self, other: Rewriting) -> Rewriting:
        return Rewriting(
            self.records + other.records,
            self.declined + other.declined,
            self.near_misses + other.near_misses,
            self.frontiers + other.frontiers,
            self.changed or other.changed,
            self.offering | other.offering,
            self.rewrites + other.rewrites,
            self.budget_decides or other.budget_decides,
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
        apart = isinstance(step, (Conversion, SitePass)) and not step.asked
        if step.level is program.level and not apart:
            total += run_pass(program, step, ctx, host, on_error=on_error, budgeted=budgeted)
    return total


def run_joint_passes(
    program: Program,
    passes: Sequence[Pass],
    ctx: PassContext,
    host: PluginHost,
    *,
    on_error: str = "rollback",
    budgeted: bool = False,
) -> Rewriting:
    """Run the passes of a joint program, each as ``run_pass`` does; ``frontiers`` is then one at most.

    Where several passes offer a curve of schedules, the last one's is taken. A curve that was made before
    the program was last rewritten may name nodes that are gone: its pass is asked again at the end.
    """
    total = Rewriting()
    sources: list[Pass] = []
    found: Frontier | None = None
    stale = False
    for step in passes:
        if step.level is not program.level:
            continue
        seeing = replace(ctx, curve=found)
        done = run_pass(program, step, seeing, host, on_error=on_error, budgeted=budgeted)
        total += replace(done, frontiers=(), declined=(*done.declined, *_passed_over(done, sources)))
        if done.frontiers:
            found, stale = done.frontiers[-1], False
            sources = [*sources, step] if found.extends else [step]
        stale = stale or done.changed
    if sources and stale:
        found = None
        for source in sources:
            asked = f"{source.name} was asked for schedules alone, after the last rewrite"
            again = run_pass(
                program,
                source,
                replace(ctx, curve=found),
                host,
                on_error=on_error,
                budgeted=budgeted,
                closed=asked,
            )
            total += replace(again, frontiers=())
            found = again.frontiers[-1] if again.frontiers else found
    return replace(total, frontiers=(found,) if found is not None else ())


def left_out(passes: Sequence[Pass], host: PluginHost) -> tuple[PassRecord, ...]:
    """Records of the passes of a level at which no program is rewritten."""
    why = "lowered programs are not rewritten: passes run at the semantic and the joint level"
    return tuple(_record(step, host, "skipped", why) for step in passes if step.level is Level.LOWERED)


def conversion_records(
    passes: Sequence[Pass],
    host: PluginHost,
    allow: Set[str],
    done: QuantizationPlan | None,
    *,
    generates: bool = False,
) -> tuple[PassRecord, ...]:
    """Records of the passes that change the model rather than a program. ``done``: what was packed;
    ``generates``: what is kept from token to token has records already."""
    records = []
    for step in passes:
        if isinstance(step, SitePass) and not generates and not step.asked:
            why = "keys and values are kept only where generate= is given"
            records.append(_record(step, host, "skipped", why))
        if not isinstance(step, Conversion):
            continue
        if done is not None:
            records.append(_record(step, host, "applied", done.summary))
        elif step.name not in allow:
            records.append(
                _record(step, host, "skipped", f"changes results: runs with allow=({step.name!r},)")
            )
        else:
            records.append(_record(step, host, "no-op", "the budget is met by weights as they are"))
    return tuple(records)


def _passed_over(done: Rewriting, sources: Sequence[Pass]) -> list[Declined]:
    """Curves that another one takes the place of."""
    if not done.frontiers or done.frontiers[-1].extends:
        return []
    earlier = [step.name for step in sources] + [frontier.pass_id for frontier in done.frontiers[:-1]]
    why = f"a program has one curve of schedules: that of {done.frontiers[-1].pass_id}, the last, is used"
    return [Declined(f"schedules of {name}", why) for name in earlier]


def run_pass(
    program: Program,
    step: Pass,
    ctx: PassContext,
    host: PluginHost,
    *,
    on_error: str = "rollback",
    budgeted: bool = False,
    closed: str = "",
) -> Rewriting:
    """Run one pass as one transaction: all of its chosen candidates or none.

    A pass that raises, yields nonsense, changes the program while it looks at it, or whose edit breaks
    the structure leaves the program as it was: recorded as ``rolled-back`` with the reason, or raised
    (``PassError``, ``VerificationError``) with ``on_error="raise"``. ``budgeted``: bytes count as gains.
    ``closed``: why this program can take no candidate, where that is so; each is declined with it.
    """
    if not step.exact and step.name not in ctx.allow and not step.asked:
        why = f"{step.inexact}: runs with allow=({step.name!r},)"
        return Rewriting((_record(step, host, "skipped", why),))
    try:
        verify_values(program)
    except VerificationError as error:
        return Rewriting((_record(step, host, "skipped", f"the program was not traced: {error.message}"),))
    start = time.perf_counter()
    host.notify_before(ctx, step, program)
    proposals = Proposals()
    chosen: list[Candidate] = []
    taken: tuple[Rewrite, ...] = ()
    refused: list[Declined] = []
    budget_decides = False
    status: PassStatus
    edit = program.edit(step.name)
    try:
        with edit, host.using("graphopt_passes", step.name):
            proposals = read_proposals(step, program, ctx)
            if edit.differs:
                raise PassError(f"{step.name}: propose() changed the program: only apply() may")
            offered = () if closed else proposals.candidates
            chosen, refused = choose(step, offered, ctx, budgeted=budgeted)
            budget_decides = chosen != choose(step, offered, ctx, budgeted=not budgeted)[0]
            if closed:
                refused = [Declined(candidate.id, closed) for candidate in proposals.candidates]
            # Before anything is applied: their nodes may be gone afterwards.
            taken = _rewrites(program, step, chosen)
            for candidate in chosen:
                _apply(step, candidate.id, candidate.apply, edit)
    except GraphoptError as error:
        if on_error == "raise":
            raise
        status, reason = "rolled-back", error.message.removeprefix(f"{step.name}: ")
        taken = tuple(replace(rewrite, applied=False) for rewrite in taken)
        proposals, refused = Proposals(), []
    else:
        gain = sum(worth(candidate, ctx, budgeted=False) for candidate in chosen)
        status, reason = _outcome(proposals, len(chosen), gain, edit, ctx)
    record = _record(step, host, status, reason, time.perf_counter() - start)
    host.notify_after(ctx, step, program, record)
    return Rewriting(
        (record,),
        (*proposals.declined, *refused),
        proposals.near_misses,
        proposals.frontiers,
        edit.committed,
        frozenset({step.name} if any(c.alternative for c in proposals.candidates) else ()),
        (*taken, *_for_the_planner(program, step, proposals)),
        budget_decides,
    )


def _rewrites(program: Program, step: Pass, chosen: Sequence[Candidate]) -> tuple[Rewrite, ...]:
    if step.mandatory or not chosen:
        return ()
    layers = {node.name: layer_of(node) for node in program.graph.nodes}
    return tuple(
        Rewrite(rewrite_id(program.name, step.name, c), layers.get(c.nodes[0], ""), c.delta) for c in chosen
    )


def _for_the_planner(program: Program, step: Pass, proposals: Proposals) -> tuple[Rewrite, ...]:
    offered: list[Candidate | Frontier] = [c for c in proposals.candidates if c.alternative]
    offered += proposals.frontiers
    names = dict.fromkeys(rewrite_id(program.name, step.name, item) for item in offered)
    return () if step.mandatory else tuple(map(Rewrite, names))


def _apply(step: Pass, candidate: str, apply: object, edit: Edit) -> None:
    assert callable(apply)
    try:
        apply(edit)
    except GraphoptError:
        raise
    except GUARDED as error:
        raise PassError(f"{step.name}: candidate {candidate!r}: apply() raised {brief(error)}") from error


def _outcome(
    proposals: Proposals, chosen: int, gain: float, edit: Edit, ctx: PassContext
) -> tuple[PassStatus, str]:
    idle: PassStatus = "applied" if proposals.frontiers else "no-op"
    if not proposals.candidates:
        if proposals.frontiers:
            return idle, ""
        missed = len(proposals.near_misses)
        nothing = "nothing to rewrite"
        if edit.program.level is Level.JOINT:
            nothing += f", nothing to choose in {ctx.mode} mode"
        misses = "1 near miss" if missed == 1 else f"{missed} near misses"
        return idle, f"{nothing}; {misses}" if missed else nothing
    alternatives = sum(candidate.alternative for candidate in proposals.candidates)
    offer = f"{count_text(alternatives, 'alternative')} for the planner"
    if alternatives == len(proposals.candidates):
        return idle, offer
    share = f"{chosen} of {len(proposals.candidates) - alternatives} candidates"
    if alternatives:
        share = f"{offer}; {share}"
    if not chosen:
        return idle, f"{share} chosen"
    if not edit.committed:
        return idle, f"{share} chosen, none changed the program"
    if gain:
        share += f", {'saves' if gain > 0 else 'takes'} {format_seconds(abs(gain))} (predicted)"
    return "applied", share


def _record(
    step: Pass, host: PluginHost, status: PassStatus, reason: str, seconds: float = 0.0
) -> PassRecord:
    plugin = host.owner("graphopt_passes", step.name).plugin
    text = pass_text(step)
    options = text[len(step.name) + 1 : -1] if text != step.name else ""
    return PassRecord(step.name, plugin, status, reason, options, seconds)
