"""What is left out where a step is taken over from an earlier process, made when something shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from graphopt import _torch
from graphopt.ambient_state import AmbientState
from graphopt.captured import Captured, Ran

if TYPE_CHECKING:
    from graphopt.segmented import SegmentedStep
    from graphopt.session import Session

__all__ = ["fold", "unfold"]

Made = tuple[Sequence[Captured], "Captured | SegmentedStep"]
"""The programs of a step, and what it was made as."""


def fold(session: Session, gm: fx.GraphModule, ran: Ran, make: Callable[[], Made]) -> None:
    """Let ``make`` make the programs of the present step, which was taken over, of dynamo's graph ``gm`` when
    they are asked for. What it decides and notes is left: that was taken over too. The plan says what is to
    be found, and nothing else is looked for."""
    plan = session.plan
    context, around, told = _torch.capture_context(), AmbientState.now(), session.current
    # Dynamo clears what it noted on the nodes of its graph.
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    noted_on = [(node, dict(node.meta)) for graph in graphs for node in graph.nodes]

    def unfold() -> None:
        for node, meta in noted_on:
            node.meta = meta
        known, before = len(session.captured), session.replay
        session.replay = plan
        with _as_decided(session), _torch.within(context), around.again():
            try:
                made, step = make()
            finally:
                del session.captured[known:]
                session.current, session.replay = told, before
        first = next(k for k, captured in enumerate(session.captured) if captured is told[0])
        session.captured[first : first + len(told)] = made
        session.current, ran.step = list(made), step

    session._fold = unfold


def unfold(session: Session) -> None:
    """Make the programs and curves of a step that was taken over from another process, which left them
    out: whatever shows them asks for them first."""
    unfold, session._fold = session._fold, None
    if unfold is not None:
        unfold()


@contextmanager
def _as_decided(session: Session) -> Iterator[None]:
    """Afterwards ``session`` has the plan, and says what it said, before."""
    noted: tuple[list[Any], ...] = (
        session.records,
        session.declined,
        session.near_misses,
        session.rewrites,
        session.diagnostics,
    )
    before = [list(notes) for notes in noted]
    groups, misses = list(session.emitter.groups), list(session.emitter.near_misses)
    decided = session.plan, session.reruns, session.planning_seconds
    try:
        yield
    finally:
        for notes, known in zip(noted, before, strict=True):
            notes[:] = known
        session.emitter.note(groups, misses)
        session.plan, session.reruns, session.planning_seconds = decided
