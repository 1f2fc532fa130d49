"""Calls a model through dynamo and a session: capture, planning, fall-back, then plain running."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import graphopt
from graphopt import _torch
from graphopt.agreement import Agreement, for_programs
from graphopt.apart import CompiledApart
from graphopt.capture.beside import OtherPath, difference, gradient_difference, held_before, note_held
from graphopt.capture.inputs import bind_inputs
from graphopt.capture.judged import judge
from graphopt.capture.plugged import PluggedCapture
from graphopt.capture.timeline import statistics_of
from graphopt.capture.watched import capture_pieces, decide_step
from graphopt.cost import Cost, MemoryProfile
from graphopt.dumping import dumped, programs_of
from graphopt.errors import (
    BudgetError,
    CaptureError,
    GraphoptError,
    InputsError,
    brief,
)
from graphopt.explanation import MemoryExplanation
from graphopt.first_run import Untouched
from graphopt.first_step import FirstStep
from graphopt.guard import Guard
from graphopt.kept_inputs import KeptExample
from graphopt.pareto_front import ParetoPoint
from graphopt.planned_step import showing
from graphopt.plans import Plan
from graphopt.program import Program, layer_of
from graphopt.report import Environment, Report
from graphopt.restored import cuda_devices, restored
from graphopt.session import NotPlanned, Session
from graphopt.several import compile_together
from graphopt.step_cost import step_curve, step_memory
from graphopt.unfolding import unfold

if TYPE_CHECKING:
    from graphopt.packing.fit import Fitted, WeightFit

__all__ = ["Driver"]


_OTHER_PATH = "look for code that asks torch.compiler.is_compiling() and takes another path then"
_OTHER_GRADIENT = f"{_OTHER_PATH}, or states a gradient of its own"


class Driver:
    """Owns the compiled callables of one model.

    The whole model is captured in one graph if dynamo can; if not, in several with plain Python
    between them; if that fails too the model runs as it did and ``diagnostics`` say why
    (``on_error="raise"`` raises instead). ``fit`` packs weights where nothing fits without. ``compare``: run
    what was captured once beside the model, and leave a model as it is that computes something else.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        session: Session,
        *,
        inputs: Any = None,
        dynamic: bool | None = None,
        loss_fn: Callable[[Any], torch.Tensor] | None = None,
        fit: WeightFit | None = None,
        compare: bool = False,
    ) -> None:
        self.fit, self.compare = fit, compare
        self.model, self.session, self.dynamic = model, session, dynamic
        self._example = None if inputs is None else KeptExample(inputs)
        self.loss_fn = loss_fn
        self.call: Callable[..., Any] | None = None
        self._watched: Callable[..., Any] | None = None
        self._uncaptured = self._differentiates = self.uncompiled = False
        self._ran: set[bool] = set()
        self.step: Callable[[], object] | None = None
        self.calls = 1
        self.first: FirstStep | None = None
        self.guard: Guard | None = None
        self._first_plan: Plan | None = None
        self.plugged: PluggedCapture | None = None
        session.modes = partial(_modes, model)
        self.apart = ""
        """What the predicted peak leaves out, for the report."""

    @property
    def agreement(self) -> Agreement | None:
        """With the ranks that share the model, where there are any."""
        return self.session.agreement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            raise CaptureError(
                "an exporter traces the code of the model, and nothing of what was optimized",
                hint="export fast.exportable(), or the model itself",
            )
        if self._watched is not None:
            self.calls += 1
            return self._watched(*args, **kwargs)
        self.prepare(args, kwargs)
        if self.call is None:
            return self.model(*args, **kwargs)
        training = torch.is_grad_enabled() and self.training_step()
        if self.guard is not None:
            if self.guard.due(training):
                judge(self, self.guard, args, kwargs, training)
            if self.guard.replaced(training):
                return self.model(*args, **kwargs)
        first = self._first_step() if training else None
        before = None if training in self._ran else self._before(args, kwargs)
        self.session.arguments = (args, kwargs)
        try:
            with _torch.quiet_capture():
                self.session.finish()
                if first is not None:
                    first.begin(self.session.static_bytes or 0)
                output = self.call(*args, **kwargs)
            if first is not None:
                first.returned(output)
            self._ran.add(training)
            return output
        except Exception as raised:
            error = _torch.unmasked(raised)
            inner = _torch.inner_error(error)
            if inner is not error and isinstance(inner, GraphoptError):
                raise inner from None
            failed = isinstance(error, _torch.compile_errors()) and self.session.whole
            if self.session.on_error == "raise" or not (failed or _may_be_left(error, before)):
                raise
            note = f"calls of other inputs run as they did: {brief(inner)}"
        finally:
            self.session.arguments = None
        # No part of the call has had an effect. Inputs that the model refuses get the model's own error.
        output = self.model(*args, **kwargs)
        if not failed:
            self.session.forget()
            self.call, self.first, self._uncaptured = None, None, True
            note = f"not captured, runs as it did: what was captured fails: {brief(inner)}"
        if note not in self.session.diagnostics:
            self.session.diagnostics.append(note)
        return output

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Untouched | None:
        """How things are before what was captured in one graph runs first; ``None`` where it may not be left:
        other ranks count on each other's collectives."""
        if not self.session.whole or self.agreement is not None:
            return None
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        return Untouched([*self.model.parameters(), *self.model.buffers(), *given])

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture and plan, if that has not happened yet; together with the ranks that share the model."""
        if self.call is not None or self._uncaptured:
            return
        if self._example is None:
            self._example = KeptExample(kwargs if kwargs and not args else args)
        if self.agreement is None:
            self._decide(args, kwargs)
            return
        self.agreement.compare(self.model, (args, kwargs))
        self.agreement.capture(lambda: self._decide(args, kwargs))
        self._settle(self.agreement, lambda: self._prepare(args, kwargs))

    def _settle(self, agreement: Agreement, again: Callable[[], None]) -> None:
        """Run what all ranks agree on; ``again`` captures and plans once more."""

        def adopt(plan: Plan) -> None:
            session = self.session
            whole, session.replay = session.whole, for_programs(plan, session)
            try:
                if whole:
                    session.forget()
                    again()
                else:
                    # What lies between the graphs was seen: only the choice is another.
                    compile_together(session, session.current)
            finally:
                session.replay = None

        agreement.settle(self.session, adopt)
        self.session.confirm = agreement.confirm

    def _decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture and plan, weights packed where that is allowed and nothing fits without."""
        if self.fit is not None and (fitted := self.fit.before(args, kwargs)) is not None:
            self._take(fitted)
        try:
            self._prepare(args, kwargs)
            return
        except BudgetError as error:
            if self.fit is None or self.session.replay is not None:
                raise
            refused = error.with_traceback(None)
        self._take(self.fit.after(refused, args, kwargs))
        self._prepare(args, kwargs)

    def _take(self, fitted: Fitted) -> None:
        """Go on with packed weights, which were tried and fit."""
        fitted.session.agreement = self.session.agreement
        self.model, self.session, self.fit = fitted.model, fitted.session, None
        self.session.modes = partial(_modes, self.model)

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.session.arguments = (args, kwargs)
        try:
            self._capture(args, kwargs)
        finally:
            self.session.arguments = None

    def example(self) -> Any:
        """What the model was optimized with, or first called with."""
        return None if self._example is None else self._example.inputs()

    def bind(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``inputs``, or the example inputs, as positional and keyword arguments."""
        chosen = self.example() if inputs is None else inputs
        if chosen is None:
            raise InputsError("no inputs: none were given, here or to optimize()")
        return bind_inputs(self.model, chosen)

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture and plan one call without running it where one graph holds it all."""
        training = self.model.training
        self._differentiates = torch.is_grad_enabled()
        with _torch.quiet_capture(), torch.set_grad_enabled(torch.is_grad_enabled() and training):
            if self._capture_plugged(args, kwargs):
                return
            self.uncompiled = False
            try:
                self._capture_traced(args, kwargs)
            except OtherPath as other:
                self.session.forget()
                self.uncompiled = True
                self.remark(f"{other.differs}: captured as if it were not compiled")
                self._capture_traced(args, kwargs)

    def _capture_traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture a call by dynamo, in one graph or in several. Raises ``OtherPath`` where that computes
        something else than the model, which may have been told that it is compiled."""
        known = list(self.session.diagnostics)
        try:
            self._capture_whole(args, kwargs)
            return
        except GraphoptError:
            raise
        except Exception as error:
            breaks = isinstance(error, _torch.graph_break_errors())
            if not breaks and self.session.on_error == "raise":
                self.give_up(_torch.inner_error(error), args, kwargs)
            self.session.forget()
            self.session.diagnostics.extend(known)
            self.remark(f"not one graph: {brief(_torch.inner_error(error))}")
        capture_pieces(self, args, kwargs)

    def traced(self, *, whole: bool) -> CompiledApart:
        """The model under dynamo, in one graph or in several."""
        return CompiledApart(
            self.model, self.session.backend, fullgraph=whole, dynamic=self.dynamic,
            uncompiled=self.uncompiled,
        )  # fmt: skip

    def _capture_plugged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a plugin captured the call."""
        self.plugged = None
        if not self.session.host.capture_hooks():
            return False
        self.plugged = PluggedCapture(
            self.model,
            self.session,
            dynamic=self.dynamic,
            compare=self.compare,
            differs=self._differs,
            refused=self._run_plain,
        )
        if not self.plugged.capture(args, kwargs):
            return False
        self.call = self.plugged
        return True

    def _capture_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session = self.session
        session.whole, session.capturing = True, True
        call = self.traced(whole=True)
        try:
            call(*args, **kwargs)
        except NotPlanned:
            if held_before(self) or self._holds_now(call, args, kwargs):
                self.call = call
        except Exception as error:
            inner = _torch.inner_error(error)
            if isinstance(inner, GraphoptError):
                raise inner from None
            raise
        else:
            # Nothing was compiled: the model computes nothing that dynamo could capture.
            self.give_up(
                CaptureError("the model runs no tensor operation that can be captured"), args, kwargs
            )
        finally:
            session.capturing = False

    def _holds_now(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether what was captured computes what the model does, its gradients included."""
        self.session.uncompared = False
        if not (self.is_faithful(call, args, kwargs) and self.has_faithful_gradients(call, args, kwargs)):
            return False
        note_held(self)
        return True

    def is_faithful(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether what was captured computes what the model does; a model of which it does not is left as it
        is, once it was captured as if it were not compiled."""
        differs = difference(self, call, args, kwargs)
        if not self.uncompiled:
            if differs:
                raise OtherPath(differs)
        elif self.session.uncompared:
            differs = "captured as if it were not compiled, it could not be compared with the model"
        return self._holds(differs, _OTHER_PATH, args, kwargs)

    def has_faithful_gradients(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether what was captured and planned has the model's gradients, where it trains; a model of which
        it has not is left as it is."""
        return self._holds(gradient_difference(self, call, args, kwargs), _OTHER_GRADIENT, args, kwargs)

    def _holds(self, differs: str, hint: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether nothing ``differs``; where something does the model is left as it is."""
        if not differs:
            return True
        self.session.forget()
        self.give_up(CaptureError(differs, hint=hint), args, kwargs)
        return False

    def _differs(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """How what was captured differs from the model, or ``""``."""
        return difference(self, call, args, kwargs) or gradient_difference(self, call, args, kwargs)

    def prepare_step(self, step: Callable[[], object]) -> None:
        """Capture and plan all that ``step()`` runs of the model, everything put back afterwards; together
        with the ranks that share the model.

        Raises ``InputsError`` where ``step`` raises or never calls the model.
        """
        if self.agreement is None:
            decide_step(self, step)
            return
        self.agreement.compare(self.model, ())
        self.agreement.capture(lambda: decide_step(self, step))
        self._settle(self.agreement, lambda: decide_step(self, step))

    def give_up(self, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Leave the model as it is. Inputs that the model itself refuses are the caller's error."""
        self._run_plain(args, kwargs)
        if self.session.on_error == "raise":
            raise CaptureError(f"the model could not be captured: {brief(error)}") from error
        self._uncaptured = True
        self.session.diagnostics.append(f"not captured, runs as it did: {brief(error)}")

    def _run_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model, everything put back. Raises ``InputsError`` where it does not run."""
        with (
            torch.set_grad_enabled(self._differentiates),
            restored(self.model, ()),
            torch.random.fork_rng(devices=cuda_devices(self.model)),
            _torch.gathers_ended(self.model),
        ):
            try:
                self.model(*args, **kwargs)
            except Exception as refused:
                raise InputsError(
                    f"the model does not run with these inputs: {brief(refused)}",
                ) from refused

    def training_step(self) -> bool:
        """Whether the captured step has a backward."""
        if self._uncaptured or not self.session.current:
            return self.model.training
        return any(captured.mode == "train" for captured in self.session.current)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Steps are launched kernel by kernel: what a replayed one takes is in no allocator's statistics."""
        for recorder in self.session.recorders:
            recorder.paused = True
        guard = self.guard
        if guard is not None:
            guard.paused = True
        try:
            yield
        finally:
            for recorder in self.session.recorders:
                recorder.paused = False
            if guard is not None:
                guard.paused = False

    def remark(self, text: str) -> None:
        """Have the report say something."""
        self.session.diagnostics.append(text)

    def written_parameters(self) -> list[str]:
        """Parameters that the present programs write, by their dotted names."""
        return self.session.written_parameters()

    def gradients_held(self) -> bool:
        """Whether parameters carried gradients when the model was optimized."""
        return self.session.held_gradient_bytes > 0

    def held_bytes(self) -> int:
        """Bytes held throughout besides weights and inputs: gradients, libraries' workspace."""
        return self.session.held_bytes

    def _first_step(self) -> FirstStep | None:
        """What watches the first step of the present plan; ``None`` once it is over."""
        if self.first is None:
            self._first_plan = self.session.plan
            devices = {p.device for p in self.model.parameters()}
            device = devices.pop() if len(devices) == 1 else torch.device("cpu")
            self.first = FirstStep(
                [p for p in self.model.parameters() if p.requires_grad],
                statistics_of(device),
                calls=self.calls,
                held=self.gradients_held(),
                note=self.session.diagnostics.append,
                workspace_bytes=self.session.cost.device.workspace_bytes,
            )
        return None if self.first.over else self.first

    def measured(self) -> Cost | None:
        """What the first step took, where that was free to measure and the step is over."""
        known = self.first is not None and self._first_plan is self.session.plan
        peak = self.first.peak_bytes if self.first is not None and known else None
        return Cost(peak, self.weight_bytes(), None) if peak is not None else None

    def lasting_bytes(self) -> int:
        """Bytes of the inputs of a watched step that are there before and after it."""
        return self.session.lasting_bytes

    def weight_bytes(self) -> int:
        return self.session.weight_bytes or 0

    def plan(self) -> Plan:
        if self.session.plan is None:
            uncalled = "it was not called yet"
            if self._example is None:
                uncalled += " and no inputs were given"
            why = "; ".join(self.session.diagnostics) or uncalled
            raise CaptureError(f"the model was not captured: {why}")
        return self.session.plan

    def frontier(self) -> tuple[ParetoPoint, ...]:
        baseline = self.plan().baseline.seconds or 0.0
        session = self.session
        unfold(session)
        points: list[ParetoPoint] = []
        for peak, seconds, flops, label in step_curve(session, session.static_bytes or 0):
            point = ParetoPoint(peak, baseline + seconds, flops, label)
            # What is added may be too little to make the sum another number.
            if not points or point.seconds < points[-1].seconds:
                points.append(point)
        return tuple(points)

    def report(self) -> Report:
        session = self.session
        plan = None if self._uncaptured else self.plan()
        environment = Environment(
            torch.__version__, platform.python_version(), graphopt.__version__, session.cost.device.name
        )
        current = session.current if plan else []
        earlier = [c for c in session.captured if not any(c is now for now in current)]
        return Report(
            environment,
            plan.baseline if plan else None,
            plan.predicted if plan else None,
            budget=plan.budget
            if plan
            else session.budget.resolve(0)
            if session.budget.fraction() is None
            else None,
            plan=plan,
            plugins=session.host.records(),
            programs=tuple(captured.summary for captured in current),
            earlier=tuple(captured.summary for captured in earlier),
            steps=tuple(session.records),
            declined=tuple(session.declined),
            near_misses=(*session.near_misses, *dict.fromkeys(session.emitter.near_misses)),
            diagnostics=(
                *session.diagnostics,
                *session.missing_rewrites(),
                *((self.apart,) if self.apart else ()),
            ),
            groups=tuple(dict.fromkeys(session.emitter.groups)),
            quantization=session.quantization,
            rewrites=session.chosen_rewrites(),
            captures=self.plugged.records() if self.plugged is not None else (),
        )

    def memory(self) -> tuple[MemoryProfile, MemoryProfile]:
        self.plan()
        unfold(self.session)
        current = self.session.current
        before, now = [c.reference for c in current], [c.point for c in current]
        return step_memory(self.session, before), step_memory(self.session, now)

    def explain_memory(self) -> MemoryExplanation:
        before, after = self.memory()
        plan = self.plan()
        layers = {
            node.name: layer
            for captured in self.session.current
            if captured.joint is not None
            for node in captured.joint.graph.nodes
            if (layer := layer_of(node))
        }
        static = self.session.static_bytes or 0
        return MemoryExplanation(before, after, static, plan.predicted.peak_bytes, plan.budget, layers)

    def step_count(self) -> int:
        """How many steps there are that each have a plan."""
        return max(1, len(self.session.steps))

    @contextmanager
    def showing(self, number: int) -> Iterator[None]:
        """In the block the driver shows step ``number``, the present one being the last."""
        steps = self.session.steps
        with showing(self.session, steps[number]) if steps else nullcontext():
            yield

    def programs(self) -> tuple[Program, ...]:
        unfold(self.session)
        return programs_of(self.session.current)

    def dump(self, form: str, stage: str, beside: Sequence[Program] = ()) -> str:
        self.plan()
        unfold(self.session)
        session = self.session
        return dumped(session.current, session.host, session.cost, form, stage, beside)


def _may_be_left(error: Exception, before: Untouched | None) -> bool:
    """Whether the model may run in place of a first call that ended in ``error``: put back as ``before``."""
    if before is None or isinstance(error, (GraphoptError, torch.OutOfMemoryError)):
        return False
    return before.put_back()


def _modes(model: torch.nn.Module) -> tuple[bool, ...]:
    """Which modules of ``model`` are in training mode."""
    return tuple(module.training for module in model.modules())
