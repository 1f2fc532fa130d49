"""Calls a loaded step: arguments to inputs, results back into the structure that the model returned."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import graphopt
from graphopt.artefact.calling import filled, signature_of, taken
from graphopt.artefact.values import type_json
from graphopt.capture.driver import Driver
from graphopt.cost import MemoryProfile
from graphopt.errors import ArtefactError, InputsError
from graphopt.explanation import MemoryExplanation
from graphopt.pareto_front import ParetoPoint
from graphopt.report import Environment, Report

if TYPE_CHECKING:
    from pathlib import Path

    from graphopt.artefact.load import Contents
    from graphopt.artefact.records import SavedState
    from graphopt.session import Session

__all__ = ["LoadedDriver"]


class LoadedDriver(Driver):
    """A driver whose step is there already. ``run`` takes the inputs of the program; ``held`` are tensors
    that the model had besides its state.

    Raises ``ArtefactError`` for a ``model`` whose parameters or buffers are not those of the artefact.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        session: Session,
        contents: Contents,
        run: Callable[..., Any],
        held: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(model, session)
        self._contents, self._run, self._held = contents, run, held
        self._signature = signature_of(contents.signature)
        self._looks = contents.looks()
        self._call = self._step
        state = self.tensors_now()
        for spec in contents.step.inputs:
            if spec.source == "state":
                try:
                    self._check(spec.node, state[spec.name], spec.name)
                except InputsError as error:
                    raise ArtefactError(
                        f"the model does not fit {contents.folder}: {error.message}"
                    ) from None

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
        step = self._contents.step
        if self.model.training != step.training:
            modes = {True: "training", False: "evaluation"}
            raise InputsError(
                f"the step was saved in {modes[step.training]} mode, "
                f"the module is in {modes[not step.training]} mode",
                hint=f"call {'train' if step.training else 'eval'}() first, or save a step of the other mode",
            )
        for cast in step.autocast:
            now = torch.is_autocast_enabled(cast.kind), str(torch.get_autocast_dtype(cast.kind))[6:]
            if now[0] != cast.enabled or (cast.enabled and now[1] != cast.dtype):
                was = (
                    f"autocast of {cast.kind} to {cast.dtype}"
                    if cast.enabled
                    else f"no autocast of {cast.kind}"
                )
                raise InputsError(f"the step was saved under {was}: call it so")
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputsError(
                f"the step does not take these inputs: {error}",
                hint=f"its arguments: {', '.join(self._signature.parameters)}",
            ) from None
        bound.apply_defaults()
        tensors: list[torch.Tensor | None] = [None] * self._contents.tensors
        taken(self._contents.arguments, bound.arguments, tensors, "the call")
        state = self.tensors_now()
        inputs = []
        for spec in step.inputs:
            if spec.source == "state":
                value: torch.Tensor | None = state[spec.name]
            else:
                value = tensors[int(spec.name)] if spec.source == "argument" else self._held[spec.name]
            assert value is not None
            said = spec.name if spec.source != "argument" else f"tensor {spec.name} of the call"
            self._check(spec.node, value, said)
            inputs.append(value)
        with torch.set_grad_enabled(torch.is_grad_enabled() and step.mode == "train"):
            outputs = list(self._run(*inputs))
        return filled(self._contents.results, {"value": outputs, "argument": tensors, "state": state})

    def _check(self, node: str, tensor: torch.Tensor, name: str) -> None:
        """Raise ``InputsError`` unless ``tensor`` looks as the program was compiled for."""
        if node not in self._looks:
            return
        look, trained = self._looks[node]
        found = type_json(tensor)
        for what in ("dtype", "shape", "device", "stride"):
            if not _same(what, found, look):
                raise InputsError(
                    f"{name} has {what} {_said(found[what])}, the step was saved for {_said(look[what])}",
                    hint="save a step for these inputs as well",
                )
        if self._contents.step.mode == "train" and tensor.requires_grad != trained:
            now, was = ("a", "no") if tensor.requires_grad else ("no", "a")
            raise InputsError(
                f"{name} requires {now} gradient; when the step was saved it required {was} gradient"
            )

    def report(self) -> Report:
        saved = self._contents.report
        environment = Environment(
            torch.__version__, platform.python_version(), graphopt.__version__, saved.environment.device
        )
        notes = tuple(dict.fromkeys((*saved.diagnostics, *self.session.diagnostics)))
        return replace(saved, environment=environment, measured=None, diagnostics=notes)

    def memory(self) -> tuple[MemoryProfile, MemoryProfile]:
        explained = self._contents.memory.explanation
        return explained.before, explained.after

    def explain_memory(self) -> MemoryExplanation:
        return self._contents.memory.explanation

    def frontier(self) -> tuple[ParetoPoint, ...]:
        return self._contents.memory.frontier


def _same(what: str, found: Mapping[str, Any], look: Mapping[str, Any]) -> bool:
    if what == "device":
        # Another device of the same kind is one of the same program.
        return str(found[what]).partition(":")[0] == str(look[what]).partition(":")[0]
    if what == "stride":
        # Steps along dimensions of one element are nobody's.
        pairs = zip(found["shape"], found["stride"], look["stride"], strict=True)
        return all(size == 1 or one == other for size, one, other in pairs) or 0 in found["shape"]
    return bool(found[what] == look[what])


def _said(value: Any) -> str:
    return ",".join(map(str, value)).join("[]") if isinstance(value, list) else str(value)
