"""The part of an optimized module that generates: built when first needed, and what the report says of it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

import graphopt
from graphopt.budget import format_bytes
from graphopt.decoding.arithmetic import NoRoom
from graphopt.decoding.build import Built, build
from graphopt.decoding.generation import generate_with, plain_generate
from graphopt.decoding.options import Generate
from graphopt.errors import CaptureError, GraphoptError, InputsError, VerificationError, brief
from graphopt.report import Environment, Report

if TYPE_CHECKING:
    from graphopt.decoding.assigning import Assigned
    from graphopt.program import Program
    from graphopt.session import Session

__all__ = ["Generator"]

TRIES = 4
"""How often stores are made that fit what is left for them."""

Smaller = Callable[[int], tuple["Assigned", "Session"]]


class Generator:
    """Generates with the model of ``assigned``, in the stores that it says.

    A model that cannot be captured for decoding generates as it did, and ``report`` says why; with
    ``on_error="raise"``, for a model without a ``generate`` of its own, and where a budget would not be kept,
    the reason is raised. ``smaller``: stores for the same model that take no more than so many bytes, where
    passes may choose some.
    """

    def __init__(
        self,
        assigned: Assigned,
        inputs: Any,
        options: Generate,
        session: Session,
        smaller: Smaller | None = None,
    ) -> None:
        self.inputs, self.options, self._smaller = inputs, options, smaller
        self._take(assigned, session)
        self._built: Built | None = None
        self._refused = ""

    def prepare(self) -> None:
        """Capture and check, if that has not happened yet."""
        if self._built is not None or self._refused:
            return
        if self.inputs is None:
            raise InputsError(
                "optimize(generate=...) needs inputs: example tokens, as a tuple or a dict of arguments"
            )
        try:
            self._built = self._build()
        except (CaptureError, VerificationError) as error:
            self._give_up(error, error.message)
        except GraphoptError:
            raise
        except Exception as error:  # what a capture, or a pass, may run into cannot be listed
            self._give_up(error, brief(error))

    def _take(self, assigned: Assigned, session: Session) -> None:
        self.model, self.assigned, self.session = assigned.model, assigned, session
        session.generates = True
        session.records.extend(assigned.records)

    def _build(self) -> Built:
        """Raises ``BudgetError`` where nothing fits, in stores that passes may choose either."""
        for _ in range(TRIES):
            try:
                return build(self.model, self.inputs, self.options, self.session, self.assigned)
            except NoRoom as error:
                if self._smaller is None or error.room <= 0:
                    raise
                # Other stores make another step, which may leave less room.
                refused, before = error, self.assigned.assignment
                self._take(*self._smaller(error.room))
                if self.assigned.assignment == before:
                    # No pass could choose any.
                    break
                self.session.diagnostics.append(
                    f"stores are held to {format_bytes(error.room)}, which passes choose them for: as they "
                    f"are the least step takes {format_bytes(error.least_bytes)}, more than the budget"
                )
        raise refused

    def _give_up(self, error: Exception, why: str) -> None:
        """Leave ``generate`` to the model, where that is what was asked for and is possible."""
        bounded = self.session.budget.memory is not None or self.session.budget.cache is not None
        own = callable(getattr(self.model, "generate", None))
        if self.session.on_error == "raise" or bounded or not own:
            raise error
        self._refused = f"generates as it did: {why}"

    @property
    def built(self) -> Built:
        """What was captured. Raises ``CaptureError`` where the model generates as it did."""
        self.prepare()
        if self._built is None:
            raise CaptureError(self._refused)
        return self._built

    def generate(self, *args: Any, **options: Any) -> Any:
        """What the model's own ``generate`` takes and gives; for models without one see
        ``plain_generate``."""
        self.prepare()
        own = callable(getattr(self.model, "generate", None))
        if self._built is None:
            return self.model.generate(*args, **options)  # type: ignore[operator]
        # Of a large model there are many, and most calls find none.
        training = [module for module in self.model.modules() if module.training]
        if training:
            self.model.eval()
        try:
            if own:
                return generate_with(self.model, self._built.decoder, args, options)
            return plain_generate(self._built.decoder, *args, **options)
        finally:
            for module in training:
                module.training = True

    def programs(self) -> tuple[Program, ...]:
        return self.built.programs

    def report(self) -> Report:
        self.prepare()
        session, built = self.session, self._built
        environment = Environment(
            torch.__version__, platform.python_version(), graphopt.__version__, session.cost.device.name
        )
        budget = session.budget.resolve(built.baseline.peak_bytes) if built is not None else None
        return Report(
            environment,
            built.baseline if built is not None else None,
            built.predicted if built is not None else None,
            budget=budget,
            plugins=session.host.records(),
            steps=tuple(session.records),
            declined=tuple(session.declined),
            near_misses=tuple(session.near_misses),
            diagnostics=(*session.diagnostics, *([self._refused] if self._refused else [])),
            decoding=built.record if built is not None else None,
        )
