"""What a whole program that runs op by op may be instead: its forms, seen and planned like itself.

Each form is traced to its joint program and gets a frontier; ``united``, they are the program's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from graphopt import _torch
from graphopt.alternatives import (
    FORM_EFFORT,
    Form,
    Grade,
    begins,
    coordinate_wise,
    copied,
    joined,
    offers,
    united,
)
from graphopt.candidate import Declined
from graphopt.captured import Captured
from graphopt.emit.inductor import JointSeen
from graphopt.errors import GraphoptError
from graphopt.offered_schedules import named_forms, room_of, say_effort, see_inference, see_joint
from graphopt.passes import PassContext

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["see", "weigh_forms"]


def weigh_forms(session: Session, captured: Captured, inputs: Sequence[Any], mode: str) -> None:
    """Let the frontier of ``captured`` be that of all its forms, and decide among them.

    ``mode`` is "train" or "infer". Does nothing where no pass of the semantic level offers an alternative
    that may be chosen: where nothing has to be freed none that takes longer is, and where a form fits the
    budget none that takes longer than it. A replayed plan says which form it is of: that alone is looked at.
    """
    ctx = session.context(mode, bounded=session.bounded)
    if not any(offers(captured.semantic, step, ctx, _nothing) for step in session.passes):
        return
    see(session, captured, inputs)
    if captured.frontier is None:
        return
    plain = captured.semantic
    forms = {**(captured.forms or {"": replace(captured)})}
    frontiers = {"": (captured.frontier, captured.reference_seconds)}

    room, start = room_of(session, captured), captured.reference_seconds

    def look(form: Form) -> Grade | None:
        made = Captured(
            captured.name, form.program, captured.specs, form=form.name, effort=FORM_EFFORT, room=room
        )
        try:
            see(session, made, inputs)
        except Exception as error:
            session.fail(f"{captured.name}: alternative {form.name} was left out: {error}", error)
            return None
        assert made.frontier is not None
        forms.update({joined(form.name, inner): f for inner, f in (made.forms or {"": made}).items()})
        frontiers[form.name] = made.frontier, made.reference_seconds
        captured.budget_decides |= made.budget_decides
        captured.partly |= made.partly
        say_effort(session, joined(captured.name, form.name), made.frontier)
        return Grade.of(made.frontier, made.reference_seconds - start, room)

    if session.replay is not None:
        (wanted,) = named_forms(session, captured) or ("",)
        captured.passed_over += _look_at(wanted, session, Form("", plain, 0.0), ctx, look)
    else:
        own = Grade.of(captured.frontier, 0.0, room)
        left = coordinate_wise(plain, session.passes, ctx, session.fail, look, own)
        captured.partly |= bool(left)
        for offer in left:
            why = f"adds {1e3 * offer.seconds:.3g} ms (predicted): what adds less is within the budget"
            session.declined.append(Declined(f"{captured.name}+{offer.id}", why))
    captured.forms = forms
    captured.frontier = united(frontiers)
    session.pick(captured)


def _look_at(
    wanted: str, session: Session, form: Form, ctx: PassContext, look: Callable[[Form], object]
) -> tuple[str, ...]:
    """Look at the form whose name is ``wanted`` or begins it: joint-level passes may have added to it.
    Returns the names of others that are offered."""
    others: list[str] = []
    for step in session.passes:
        for offer in offers(form.program, step, ctx, session.fail):
            longer = joined(form.name, offer.id)
            if not begins(longer, wanted):
                others.append(longer)
                continue
            changed = form.with_offer(offer, session.fail)
            if changed is not None:
                form = changed
                break
    if form.name:
        look(form)
    return tuple(others)


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
