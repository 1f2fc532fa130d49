"""The optimized module: the model's own interface, the rewritten programs behind it."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import torch

from graphopt import _torch
from graphopt.capture.driver import Driver
from graphopt.cost import Cost, CostModel, MemoryProfile
from graphopt.decoding.generator import Generator
from graphopt.errors import CaptureError, UnknownNameError
from graphopt.explanation import MemoryExplanation
from graphopt.loss import is_differentiable, loss_of
from graphopt.measure import Measurement, measure
from graphopt.pareto_front import ParetoPoint
from graphopt.plans import Plan
from graphopt.program import Program
from graphopt.report import Report
from graphopt.restored import restored
from graphopt.step_view import StepView

__all__ = ["Optimized"]


class Optimized(torch.nn.Module):
    """What ``graphopt.optimize`` returns.

    Shares parameters, buffers and submodules with the model it was made from: ``state_dict`` has
    the model's keys, ``train()``, ``eval()`` and ``to()`` act on both. Attributes that a module
    does not have are the model's.

    ``copy.deepcopy`` copies the model and gives an optimized module of its own over it, with the same
    options; so does pickling, as far as the model and the options can be pickled. Compiled code is not
    copied: a copy captures anew on its first call.
    """

    _model: torch.nn.Module
    _driver: Driver
    _loss_fn: Callable[[Any], torch.Tensor] | None
    _again: Callable[..., Optimized]
    _generator: Generator | None

    def __init__(
        self,
        model: torch.nn.Module,
        driver: Driver,
        loss_fn: Callable[[Any], torch.Tensor] | None,
        again: Callable[..., Optimized],
        generator: Generator | None = None,
    ) -> None:
        """``again(model, example)`` makes an optimized module with the same options, not captured yet."""
        super().__init__()
        # Shared, not copied: what is registered in one later is registered in the other.
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_driver", driver)
        object.__setattr__(self, "_loss_fn", loss_fn)
        object.__setattr__(self, "_again", again)
        object.__setattr__(self, "_generator", generator)
        object.__setattr__(self, "forward", _forward_like(model, driver))
        self.training = model.training
        self._measured: tuple[Plan | None, Cost] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        example = self._driver.example() if self._generator is None else self._generator.inputs
        made = self._remaking()(copy.deepcopy(self._model, memo), example)
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(self._own_state(), memo))
        return made

    def __copy__(self) -> Optimized:
        return _remade(self._remaking(), self._model, self._own_state(), self._prompt())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _remade, (self._remaking(), self._model, self._own_state(), self._prompt())

    def _prompt(self) -> Any:
        """Example tokens, where there is generation to be captured with them."""
        return None if self._generator is None else self._generator.inputs

    def _remaking(self) -> Callable[..., Optimized]:
        """What makes the same of another model. A share of what this one took before its weights were packed
        is none of what a copy takes."""
        session = self._driver.session
        if session.quantization is None:
            return self._again
        return partial(self._again, budget=session.budget)

    def _own_state(self) -> dict[str, Any]:
        """What is neither the model's nor made from it: hooks, attributes that were set here."""
        return {name: value for name, value in vars(self).items() if name not in _MADE}

    def train(self, mode: bool = True) -> Optimized:
        self._model.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        return self._model.load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def report(self) -> Report:
        """Baseline, predicted and measured cost of the present step, and what was changed for it.

        On CUDA the first training step is measured as it runs (the second, where libraries took their
        workspace in the first), by the allocator's own statistics, whose peak is reset for it. On the CPU
        that would cost time: ``measure()`` fills it in.

        Of a module that was optimized to generate: of one token.

        Raises ``CaptureError`` before anything was captured (no inputs given, not yet called).
        """
        if self._generator is not None:
            return self._generator.report()
        report = self._driver.report()
        if self._measured is not None and self._measured[0] is report.plan:
            return report.with_measured(self._measured[1])
        first = self._driver.measured()
        return report if first is None else report.with_measured(first)

    def generate(self, *args: Any, **options: Any) -> Any:
        """What the model's own ``generate`` does, as it takes it.

        With ``optimize(generate=...)`` its steps are programs that decode: the same tokens, from stores of
        keys and values that are made once and counted. A model without a ``generate`` of its own then has
        that of ``graphopt.decoding.generation.plain_generate``.

        Raises ``InputsError`` for more sequences or positions than there are stores for, and for options that
        bring a cache of their own.
        """
        if self._generator is not None:
            return self._generator.generate(*args, **options)
        return self._model.generate(*args, **options)  # type: ignore[operator]

    @property
    def plan(self) -> Plan:
        """The plan of the present step. Raises ``CaptureError`` before anything was captured."""
        return self._driver.plan()

    @property
    def programs(self) -> tuple[Program, ...]:
        """Every captured program at every level: semantic, joint, then the lowered halves."""
        if self._generator is not None:
            return self._generator.programs()
        return self._driver.programs()

    @property
    def steps(self) -> tuple[StepView, ...]:
        """The steps that the module has planned, each for inputs or a mode of its own, in the order in which
        they were captured: ``report``, ``plan``, ``programs``, ``memory()`` and ``dump()`` of each. The
        module itself shows the present one. Raises ``CaptureError`` before anything was captured."""
        self._driver.plan()
        return tuple(StepView(self._driver, number) for number in range(self._driver.step_count()))

    @property
    def cost_model(self) -> CostModel:
        """What costs were predicted with: the cost model of the device that was planned for."""
        return self._driver.session.cost

    def memory(self) -> tuple[MemoryProfile, MemoryProfile]:
        """Simulated live bytes over the step: of the baseline, and of the plan."""
        return self._driver.memory()

    def explain_memory(self) -> MemoryExplanation:
        """What holds the peak of a step, before and after: as text, JSON and a picture."""
        return self._driver.explain_memory()

    def frontier(self) -> tuple[ParetoPoint, ...]:
        """Plans of the present step that no other beats in peak and seconds, least peak first."""
        return self._driver.frontier()

    def dump(
        self, format: str = "text", stage: str = "final", *, beside: Sequence[Program] = ()
    ) -> str:
        """The programs as text. ``stage``: ``"semantic"``, ``"joint"`` (with the schedule's marks)
        or ``"final"`` (what runs); ``format``: any registered dump format. ``beside``: programs to compare
        with, such as those of ``optimize(pipeline=())``, for formats that show several (``"html"``)."""
        stages = ("semantic", "joint", "final")
        if stage not in stages:
            raise UnknownNameError("stage", stage, stages)
        return self._driver.dump(format, stage, beside)

    def _repr_html_(self) -> str:
        """The report, for notebooks; before anything was captured, that."""
        try:
            return self.report._repr_html_()
        except CaptureError as error:
            return f"<div>optimized {escape(type(self._model).__name__)}: {escape(error.message)}</div>"

    def launching(self) -> AbstractContextManager[None]:
        """In the block, steps launch kernels one by one rather than replay a graph, whose memory no
        allocator's statistics show."""
        return self._driver.launching()

    def measure(self, inputs: Any = None, *, repeats: int = 3) -> Measurement:
        """Run whole steps and measure them: forward and backward in training, else forward.

        ``inputs`` as for ``optimize``; without it the captured example inputs. The peak counts parameters,
        buffers and inputs; gradients are absent when the step begins (or zero, where the parameters carried
        some when the model was optimized) and outputs are held until it ends. Gradients, buffers and
        parameters that the model itself writes are put back afterwards. The loss is the output's ``loss``, or
        ``loss_fn(output)``, or the sum of all differentiable outputs. Kernels are launched one by one, not
        replayed from a graph. A module that was optimized for a ``step`` runs that, unless ``inputs`` are
        given.
        """
        whole = self._driver.step if inputs is None else None
        args, kwargs = self._driver.bind(inputs) if whole is None else ((), {})
        training = self._driver.training_step()
        device = _device_of(self._model, (args, kwargs))
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        held = self._driver.gradients_held()

        def step() -> Any:
            if whole is not None:
                return whole()
            with torch.set_grad_enabled(training):
                output = self(*args, **kwargs)
                # A step that updates parameters may have differentiated its loss itself.
                if training and not (written and not is_differentiable(output)):
                    torch.autograd.backward(self._loss(output))
            return output

        known = dict(self._model.named_parameters())
        written = [known[name] for name in self._driver.written_parameters() if name in known]
        with restored(self._model, parameters, written), self._driver.launching():
            state = torch.get_rng_state()

            def reset() -> None:
                torch.set_rng_state(state)
                for parameter in parameters:
                    if held and parameter.grad is not None:
                        parameter.grad.zero_()
                    else:
                        parameter.grad = None

            static = _torch.storage_bytes([*self._model.parameters(), *self._model.buffers(), args, kwargs])
            # Held before the step like the weights, so the allocator's growth does not show them.
            static += self._driver.held_bytes() + (self._driver.lasting_bytes() if whole is not None else 0)
            taken = measure(step, device=device, static_bytes=static, repeats=repeats, before=reset)
        cost = Cost(taken.peak_bytes, self._driver.weight_bytes(), taken.seconds)
        self._measured = self._driver.report().plan, cost
        return taken

    def save(self, path: str | os.PathLike[str], *, weights: bool = True) -> Path:
        """Write the steps that were planned to the folder ``path``, for ``graphopt.load``; returns its path.

        The folder holds programs, plans, reports, weights (each tensor once, packed ones as they are packed),
        what tuning found and sources of generated kernels; nothing of it is run when it is loaded. It is put
        in place when it is whole, and replaces an artefact that is there. ``weights=False`` leaves parameters
        and buffers out: ``load`` is then given a model. Each step runs once, the first on its example inputs,
        others on zeros of the same types, everything put back. One that the module would run by another step
        by now, or capture anew, is left out with a note in the report.

        Raises ``CaptureError`` before anything was captured, and ``ArtefactError``, with the reason, for what
        cannot be written: several programs with Python between them, generation, sizes that no input tells,
        steps that differ in no part of a call, operators and objects of the model's own; and where ``path``
        holds something else. ``OSError`` as ``open``.
        """
        from graphopt.artefact.save import save

        return save(self, Path(path), weights=weights)

    def exportable(self, *, references: bool = False) -> torch.nn.Module:
        """The rewritten program of an inference step as a module for ``torch.export.export`` and
        ``torch.onnx.export``: same call, parameters, buffers and names as the model, for inputs of the shapes
        that it was captured with.

        Operators of kernels are called by name and have to be there where the program is loaded: ``import
        graphopt_kernels``, or the plugin that has them. ``references=True`` puts what they compute in their
        place, so that torch alone, or another runtime, runs it. The step runs once on its example inputs,
        everything put back.

        Raises ``CaptureError`` before anything was captured, and ``ArtefactError`` for a training step, what
        is more than one program, sizes known at run time alone, forwards that do more than compute their
        result, and operators without a reference where those are asked for.
        """
        from graphopt.exportable import exportable

        return exportable(self, references=references)

    def _loss(self, output: Any) -> torch.Tensor:
        return loss_of(output, self._loss_fn)


_MADE = frozenset(
    ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_measured")
    + ("_model", "_driver", "_loss_fn", "_again", "_generator", "forward")
)
"""Attributes of an ``Optimized`` that follow from its model and its options."""


def _remade(
    again: Callable[..., Optimized], model: torch.nn.Module, own: dict[str, Any], example: Any = None
) -> Optimized:
    made = again(model, example)
    vars(made).update(own)
    return made


def _forward_like(model: torch.nn.Module, driver: Driver) -> Callable[..., Any]:
    """``driver`` under the signature of the model's forward, which trainers and loaders look at."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return driver(*args, **kwargs)

    forward.__doc__ = model.forward.__doc__
    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return forward


def _device_of(model: torch.nn.Module, inputs: Any) -> torch.device:
    tensors = [
        *model.parameters(),
        *(t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)),
    ]
    return next((t.device for t in tensors), torch.device("cpu"))
