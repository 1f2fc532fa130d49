"""A whole step as a chain of segments, made here or taken over from an earlier process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from graphopt import _torch
from graphopt.ambient_state import AmbientState
from graphopt.capture.auxiliary import reattach
from graphopt.captured import Ran
from graphopt.program import InputSpec

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["segmented", "unfold"]


def segmented(
    session: Session,
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    specs: list[InputSpec],
    auxiliary: Sequence[int],
) -> Callable[..., Any]:
    """Repeated blocks planned once and compiled once: the chain of segments is the step. What an earlier
    process made of the same program is taken over."""
    from graphopt.replayed_steps import replayed, roles_of
    from graphopt.segmented import SegmentedStep
    from graphopt.warm_start import WarmStart

    warm = WarmStart(session, name, gm, inputs, specs)
    session._fold = None
    restored = warm.restored()
    ran = session._made = Ran(specs, tuple(auxiliary))
    if restored is not None:
        run = restored
        session._fold = _folded(session, name, gm, inputs, specs, auxiliary, ran)
    else:
        program, attached = session._semantic(name, gm, inputs, specs, auxiliary)
        step = SegmentedStep(session, name, program.gm, specs, warm.code_name)
        session.current = step.captured
        session.captured.extend(step.captured)
        run = step.compile()
        if not session.dry_run and attached == auxiliary:
            warm.keep(step)
        auxiliary = attached
        ran.detached, ran.step = tuple(auxiliary), step
        run = replayed(session, run, warm.devices, lambda: roles_of(step, specs))
    if warm.note:
        session.diagnostics.append(warm.note)
    last = session.current[-1]
    if auxiliary:
        run = reattach(run, gm, auxiliary, lambda: session._used(last))
    run = session.guarded(run, lambda *args: _torch.run_as_captured(gm, args), name)

    def call(*args: Any) -> Any:
        if session.capturing:
            return session._as_captured(gm, args)
        return session._ran(run, args, ran)

    return call


def unfold(session: Session) -> None:
    """Make the programs and curves of a step that was taken over from another process, which left them
    out: whatever shows them asks for them first."""
    unfold, session._fold = session._fold, None
    if unfold is not None:
        unfold()


def _folded(
    session: Session,
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    specs: list[InputSpec],
    auxiliary: Sequence[int],
    ran: Ran,
) -> Callable[[], None]:
    """Does what was left out when the present step was taken over."""
    from graphopt.segmented import SegmentedStep

    context, around, told = _torch.capture_context(), AmbientState.now(), session.current
    # Dynamo clears what it noted on the nodes of its graph.
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    noted_on = [(node, dict(node.meta)) for graph in graphs for node in graph.nodes]

    def unfold() -> None:
        noted = (
            session.records,
            session.declined,
            session.near_misses,
            session.rewrites,
            session.diagnostics,
        )
        before = [list(notes) for notes in noted]
        groups, misses = list(session.emitter.groups), list(session.emitter.near_misses)
        decided = session.plan, session.reruns, session.planning_seconds
        for node, meta in noted_on:
            node.meta = meta
        with _torch.within(context), around.again():
            program, _ = session._semantic(name, gm, inputs, specs, auxiliary)
            step = SegmentedStep(session, name, program.gm, specs)
            step.compile()
        for notes, known in zip(noted, before, strict=True):
            notes[:] = known  # type: ignore[index]
        session.emitter.note(groups, misses)
        session.plan, session.reruns, session.planning_seconds = decided
        first = next(k for k, captured in enumerate(session.captured) if captured is told[0])
        session.captured[first : first + len(told)] = step.captured
        session.current, ran.step = step.captured, step

    return unfold
