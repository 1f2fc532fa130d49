"""What was captured beside the model that it was captured of, on the inputs of the capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.capture.faithful import Comparison, compared
from graphopt.capture.faithful_gradients import gradients_compared, no_room
from graphopt.errors import CaptureError
from graphopt.model_code import code_digest
from graphopt.session import NotPlanned
from graphopt.step_store import note_compared

if TYPE_CHECKING:
    from graphopt.capture.driver import Driver

__all__ = ["OtherPath", "difference", "gradient_difference", "held_before", "note_held"]

_OTHERWISE = "compiled, the model computes something else than it does op by op: "


class OtherPath(BaseException):
    """Raised where what was captured ``differs`` from the model and may be captured in another way. No
    ``Exception``: what is one has its own ways on."""

    def __init__(self, differs: str) -> None:
        super().__init__(differs)
        self.differs = differs


Both = Callable[[Callable[..., Any], Sequence[torch.Tensor]], Comparison]


def difference(
    driver: Driver, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """How the outputs of what was captured differ from the model's, or ``""``."""
    if not driver.compare:
        return ""

    def both(captured: Callable[..., Any], written: Sequence[torch.Tensor]) -> Comparison:
        filled = _filled(driver, captured)
        return compared(driver.model, captured, args, kwargs, written, filled)

    found = _beside(driver, call, both)
    if found.refused:
        driver.session.uncompared = True
        driver.remark(f"what was captured was not compared with the model: {found.refused}")
    return _OTHERWISE + found.difference if found.difference else ""


def gradient_difference(
    driver: Driver, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """How the gradients of what was captured and planned differ from the model's, or ``""``."""
    session = driver.session
    # A program that is none for training may be one that has lost all gradients.
    if not driver.compare or not torch.is_grad_enabled() or not session.trains:
        return ""

    def both(captured: Callable[..., Any], written: Sequence[torch.Tensor]) -> Comparison:
        session.differentiating = True
        filled = _filled(driver, captured)
        try:
            return gradients_compared(driver.model, captured, args, kwargs, written, filled, driver.loss_fn)
        finally:
            session.differentiating = False

    plan = driver.plan()
    refused = no_room(driver.model, plan.baseline, session.static_bytes or 0, plan.budget)
    if session.writes_apart:
        refused = "plain code of the model writes parameters"
    found = Comparison(refused=refused) if refused else _beside(driver, call, both)
    if found.refused:
        session.uncompared = True
        driver.remark(f"gradients of what was captured were not compared with the model's: {found.refused}")
    return _OTHERWISE + found.difference if found.difference else ""


def _filled(driver: Driver, captured: Callable[..., Any]) -> Callable[..., Any]:
    """``captured``, memory that its programs read before they write to it being filled."""

    def filled(*args: Any, **kwargs: Any) -> Any:
        driver.session.around = _torch.FilledMemory
        try:
            return captured(*args, **kwargs)
        finally:
            driver.session.around = nullcontext

    return filled


def held_before(driver: Driver) -> bool:
    """Whether an earlier process found that what was captured computes what the model does, whose code was
    the same: the report says so."""
    kept = driver.session.kept
    if not driver.compare or kept is None or not kept.compared:
        return False
    held = kept.compared == code_digest(driver.model, kept.followed)
    if held:
        driver.remark("an earlier process compared what was captured with the model, whose code is the same")
    return held


def note_held(driver: Driver) -> None:
    """Let later processes know that what was captured was compared with the model, and held."""
    kept = driver.session.kept
    if driver.compare and kept is not None and not driver.session.uncompared:
        code = code_digest(driver.model, kept.followed)
        if code and code != kept.compared:
            note_compared(kept.key, code)


def _beside(driver: Driver, call: Callable[..., Any], both: Both) -> Comparison:
    """``both(captured, written)``: ``captured`` runs what dynamo captured and may write the parameters that
    are ``written``."""
    session = driver.session
    known = dict(driver.model.named_parameters())
    written = [known[name] for name in driver.written_parameters() if name in known]

    def captured(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except NotPlanned:
            raise CaptureError("copies of the inputs are captured as another program") from None

    session.comparing = True
    try:
        return both(captured, written)
    finally:
        session.comparing = False
