"""Calls the steps of an artefact: arguments to inputs, results back into the structure that the model
returned."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

import graphopt
from graphopt.artefact.calling import filled
from graphopt.artefact.matching import Callee, Given, pick
from graphopt.capture.driver import Driver
from graphopt.cost import MemoryProfile
from graphopt.errors import ArtefactError, InputsError
from graphopt.explanation import MemoryExplanation
from graphopt.pareto_front import ParetoPoint
from graphopt.planned_step import put_back
from graphopt.report import Environment, Report

if TYPE_CHECKING:
    from pathlib import Path

    from graphopt.artefact.contents import Contents, StepContents
    from graphopt.artefact.records import SavedState
    from graphopt.session import Session

__all__ = ["LoadedDriver", "LoadedStep"]


@dataclass(frozen=True)
class LoadedStep:
    """A step that was compiled again. ``run`` takes the inputs of its program; ``said`` is what a session
    says of it (``graphopt.planned_step``)."""

    contents: StepContents
    callee: Callee
    run: Callable[..., Any]
    said: dict[str, Any]


class LoadedDriver(Driver):
    """A driver whose ``steps`` are there already. The present one is that which ran last, at first the last.

    Raises ``ArtefactError`` for a ``model`` whose parameters or buffers are not those of the artefact.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        session: Session,
        contents: Contents,
        signature: inspect.Signature,
        steps: Sequence[LoadedStep],
    ) -> None:
        super().__init__(model, session)
        self._contents, self._signature, self._steps = contents, signature, steps
        self._callees = [step.callee for step in steps]
        self.call = self._step
        self._present = -1
        self._show(len(steps) - 1)
        state = self.tensors_now()
        for callee in self._callees:
            try:
                callee.check_state(state)
            except ArtefactError as error:
                raise ArtefactError(f"the model does not fit {contents.folder}: {error.message}") from None

    def _show(self, number: int) -> None:
        """Let the session describe a step."""
        if number != self._present:
            self._present = number
            put_back(self.session, self._steps[number].said)

    @property
    def source(self) -> Path:
        """The folder that the step was loaded from."""
        return self._contents.folder

    @property
    def saved_state(self) -> tuple[SavedState, ...]:
        """The parameters and buffers that the artefact names."""
        return self._contents.state

    def tensors_now(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the module as they are now, by their paths in the saved model."""
        now: dict[str, torch.Tensor] = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }
        found: dict[str, torch.Tensor] = {}
        for entry in self._contents.state:
            tensor = now.get(entry.path, now.get(entry.key))
            if tensor is None:
                raise ArtefactError(f"the model has no {entry.path}, which {self._contents.folder} has")
            found[entry.path] = tensor
        return found

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputsError(
                f"the step does not take these inputs: {error}",
                hint=f"its arguments: {', '.join(self._signature.parameters)}",
            ) from None
        bound.apply_defaults()
        state = self.tensors_now()
        grad = torch.is_grad_enabled()
        number, found = pick(self._callees, Given(bound.arguments, self.model.training, grad, state))
        step = self._steps[number]
        self._show(number)
        with torch.set_grad_enabled(grad and step.callee.trains):
            outputs = list(step.run(*found.inputs))
        return filled(
            step.contents.results, {"value": outputs, "argument": found.tensors, "state": state}
        )

    def step_count(self) -> int:
        return len(self._steps)

    @contextmanager
    def showing(self, number: int) -> Iterator[None]:
        present = self._present
        self._show(number)
        try:
            yield
        finally:
            self._show(present)

    def report(self) -> Report:
        saved = self._steps[self._present].contents.report
        environment = Environment(
            torch.__version__, platform.python_version(), graphopt.__version__, saved.environment.device
        )
        notes = tuple(dict.fromkeys((*saved.diagnostics, *self.session.diagnostics)))
        others = [step.contents.report for k, step in enumerate(self._steps) if k != self._present]
        return replace(
            saved,
            environment=environment,
            measured=None,
            diagnostics=notes,
            earlier=tuple(program for report in others for program in report.programs),
        )

    def memory(self) -> tuple[MemoryProfile, MemoryProfile]:
        explained = self.explain_memory()
        return explained.before, explained.after

    def explain_memory(self) -> MemoryExplanation:
        return self._steps[self._present].contents.memory.explanation

    def frontier(self) -> tuple[ParetoPoint, ...]:
        return self._steps[self._present].contents.memory.frontier
