"""The steps that one optimized model has planned: each with what shows it, and a call that runs it.

::

    fast(x[64])  ->  g0   planned, compiled                   session.steps = [g0]
    fast(x[48])  ->  g1   planned, compiled, the present one  session.steps = [g0, g1]

A session describes the step that was captured last. Of earlier ones what it said of them is kept, and put in
place of the present while they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphopt.ambient_state import AmbientState
from graphopt.errors import ArtefactError
from graphopt.kept_inputs import Look, Looks, Made

if TYPE_CHECKING:
    from graphopt.captured import Ran
    from graphopt.session import Session

__all__ = ["Example", "PlannedStep", "put_back", "remember", "said_of", "showing"]

_OF_A_STEP = (
    *("current", "plan", "reruns", "chain", "trains", "_fold"),
    *("static_bytes", "weight_bytes", "lasting_bytes", "replay_bytes", "planning_seconds"),
)
"""What a session says of the present step alone."""


@dataclass(frozen=True)
class _Other:
    """Any other object of a call: it may hold memory, and is not kept."""

    kind: str


@dataclass(frozen=True)
class Example:
    """A call that a step was captured for, none of its tensors kept: ``made`` makes others that look alike,
    in which every number is zero. ``modes``: which modules were in training mode; ``state``: what was
    switched on."""

    args: Any
    modes: tuple[bool, ...]
    state: AmbientState

    @classmethod
    def of(cls, call: Any, modes: tuple[bool, ...], state: Mapping[int, Any]) -> Example:
        """``call``: positional and keyword arguments. Tensors in ``state``, by ``id``, are the model's own
        and stay."""
        looks = Looks()

        def look(value: Any) -> Any:
            if value is None or type(value) in (bool, int, float, str) or id(value) in state:
                return value
            return looks.of(value) if looks.can(value) else _Other(type(value).__name__)

        args = torch.utils._pytree.tree_map(look, call)
        return cls(args, modes, AmbientState.now())

    @property
    def training(self) -> bool:
        """The mode of the model itself."""
        return self.modes[0]

    def made(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the call. Raises ``ArtefactError`` for objects that are not made again."""
        made = Made()

        def tensor(look: Any) -> Any:
            if isinstance(look, _Other):
                raise ArtefactError(f"a call has a {look.kind}, which an artefact cannot hold")
            return made.tensor(look) if isinstance(look, Look) else look

        args, kwargs = torch.utils._pytree.tree_map(tensor, self.args)
        return args, kwargs

    @contextmanager
    def around(self, model: torch.nn.Module) -> Iterator[None]:
        """In the block modes of ``model``, gradients and autocast are those of the call.

        Raises ``ArtefactError`` where ``model`` has other modules by now."""
        modules = list(model.modules())
        if len(modules) != len(self.modes):
            raise ArtefactError("the model has other modules than when the step was captured")
        before = [module.training for module in modules]
        try:
            for module, mode in zip(modules, self.modes, strict=True):
                module.training = mode
            with self.state.again():
                yield
        finally:
            for module, mode in zip(modules, before, strict=True):
                module.training = mode


@dataclass
class PlannedStep:
    """A whole step. ``said``: what the session said of it; empty for the present one, which it still says."""

    ran: Ran
    example: Example | None
    said: dict[str, Any] = field(default_factory=dict)


def said_of(session: Session) -> dict[str, Any]:
    """What ``session`` says of the present step."""
    return {name: getattr(session, name) for name in _OF_A_STEP}


def remember(session: Session, ran: Ran, before: dict[str, Any]) -> None:
    """Note a step that ``session`` has planned just now, in a call with ``session.arguments``; ``before``:
    what it said of the one before."""
    if session.steps:
        session.steps[-1].said = before
    example = None
    if session.arguments is not None:
        example = Example.of(session.arguments, session.modes(), session.names)
    session.steps.append(PlannedStep(ran, example))


@contextmanager
def showing(session: Session, step: PlannedStep) -> Iterator[None]:
    """In the block ``session`` describes ``step``, one of its own."""
    if not step.said:
        yield
        return
    present = said_of(session)
    try:
        put_back(session, step.said)
        yield
    finally:
        step.said = said_of(session)
        put_back(session, present)


def put_back(session: Session, said: Mapping[str, Any]) -> None:
    """Let ``session`` say what it ``said``."""
    for name, value in said.items():
        setattr(session, name, value)
