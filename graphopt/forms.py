"""What a whole program that runs op by op may be instead: its forms, seen and planned like itself.

Each form is traced to its joint program and gets a frontier; ``united``, they are the program's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from graphopt import _torch
from graphopt.alternatives import FORM_EFFORT, applied, coordinate_wise, copied, joined, offers, united
from graphopt.captured import Captured
from graphopt.emit.inductor import JointSeen
from graphopt.errors import GraphoptError
from graphopt.offered_schedules import say_effort, see_inference, see_joint
from graphopt.passes import PassContext
from graphopt.program import Program

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["see", "weigh_forms"]


def weigh_forms(session: Session, captured: Captured, inputs: Sequence[Any], mode: str) -> None:
    """Let the frontier of ``captured`` be that of all its forms, and decide among them.

    ``mode`` is "train" or "infer". Does nothing where no pass of the semantic level offers an alternative.
    A replayed plan says which form it is of: that alone is looked at.
    """
    ctx = session.context(mode)
    if not any(offers(captured.semantic, step, ctx, _nothing) for step in session.passes):
        return
    see(session, captured, inputs)
    if captured.frontier is None:
        return
    plain = captured.semantic
    forms = {**(captured.forms or {"": replace(captured)})}
    frontiers = {"": (captured.frontier, captured.reference_seconds)}

    def look(name: str, program: Program) -> int | None:
        form = Captured(captured.name, program, captured.specs, effort=FORM_EFFORT)
        try:
            see(session, form, inputs)
        except Exception as error:
            session.fail(f"{captured.name}: alternative {name} was left out: {error}", error)
            return None
        assert form.frontier is not None
        forms.update({joined(name, inner): f for inner, f in (form.forms or {"": form}).items()})
        frontiers[name] = form.frontier, form.reference_seconds
        captured.budget_decides |= form.budget_decides
        say_effort(session, joined(captured.name, name), form.frontier)
        return min(point.peak_bytes for point in form.frontier.points)

    def make() -> Program:
        return copied(plain)

    if session.replay is not None:
        wanted = next((c.alternative for c in session.replay.choices if c.program == captured.name), "")
        _look_at(wanted, session, make, ctx, look)
    else:
        least = min(point.peak_bytes for point in captured.frontier.points)
        coordinate_wise(make, session.passes, ctx, session.fail, look, least)
    captured.forms = forms
    captured.frontier = united(frontiers)
    session.pick(captured)


def _look_at(wanted: str, session: Session, make: Any, ctx: PassContext, look: Any) -> None:
    """Look at the form whose name is ``wanted`` or begins it: joint-level passes may have added to it."""
    program, name = make(), ""
    for step in session.passes:
        for offer in offers(program, step, ctx, session.fail):
            longer = joined(name, offer.id)
            if (wanted == longer or wanted.startswith(f"{longer}+")) and applied(
                offer, program, session.fail
            ):
                name = longer
                break
    if name:
        look(name, program)


def see(session: Session, captured: Captured, inputs: Sequence[Any]) -> None:
    """The joint (or inference) program of ``captured``, and the schedules that it could run."""

    def look(joint: fx.GraphModule, num_outputs: int) -> Any:
        see_joint(session, captured, joint, num_outputs)
        raise JointSeen

    def look_inference(graph: fx.GraphModule) -> Any:
        see_inference(session, captured, graph)
        raise JointSeen

    try:
        session.emitter.compile(copied(captured.semantic).gm, inputs, look, look_inference)
    except Exception as error:
        if not isinstance(_torch.inner_error(error), JointSeen):
            raise


def _nothing(text: str, error: GraphoptError) -> None:
    """What fails is said when it is tried."""
