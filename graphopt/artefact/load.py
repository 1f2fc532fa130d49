"""``graphopt.load``: an artefact read, checked, compiled by the emitter that made it, behind a module.

What is compiled is the program that passes rewrote, under the schedule that was planned: dynamo, passes and
planning do not run. AOTAutograd traces the program again, and what it gives has to be what the plan is of.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.api import make_session
from graphopt.artefact.calling import signature_of
from graphopt.artefact.contents import Contents, StepContents, contents_of
from graphopt.artefact.driver import LoadedDriver, LoadedStep
from graphopt.artefact.folder import WEIGHTS, Folder
from graphopt.artefact.operators import Operators
from graphopt.artefact.place import check_place, check_torch
from graphopt.artefact.records import Autocast, MadeFor, SavedCode
from graphopt.artefact.state import Shell, held_tensors, read_state
from graphopt.artefact.values import dtype_named, no_symbols, type_of
from graphopt.cache_folder import lend_tuning
from graphopt.candidate import Reason
from graphopt.capture.chain import Call, Segmented
from graphopt.capture.joint import drop_unread_statistics, inference_program, joint_program
from graphopt.capture.own_gradients import own_gradients
from graphopt.capture.true_layouts import settle_layouts
from graphopt.captured import Captured
from graphopt.chain_run import ChainRunner
from graphopt.emit.emitter import Emitter, Gradients
from graphopt.errors import ArtefactError, HostMemoryError, brief
from graphopt.optimized import Optimized
from graphopt.order import must_happen
from graphopt.partition import ordered, partition
from graphopt.planned_step import said_of
from graphopt.program import Program, copied_module, same_names
from graphopt.record_json import RecordFormatError, decode
from graphopt.recording import Roles
from graphopt.replay import make_random_states_explicit
from graphopt.replayed_steps import replayed
from graphopt.session import Session
from graphopt.stored_step import results_of_text
from graphopt.warm_start import reserved

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    model: torch.nn.Module | None = None,
    *,
    operators: Iterable[str] = (),
    plugins: Sequence[object] = (),
    cuda_graphs: bool = True,
) -> Optimized:
    """What ``Optimized.save`` wrote to ``path``, compiled again: the same results, bit for bit, on a
    machine of the same kind with the same releases.

    Without ``model`` the weights are those of the artefact, under the model's own names: ``state_dict`` is
    the model's, and takes its checkpoints. ``model``, one with the same parameters and buffers, is run
    instead, with weights of its own, and has what else it can do.

    Operators of torch, graphopt and plugins may be called; ``operators`` are namespaces of others that are
    trusted (``("mylib",)``). ``plugins`` and ``cuda_graphs`` as for ``optimize``.

    The steps are those that were saved: for their shapes, or sizes within what is assumed of them, their
    modes and their constants. The one that takes a call is run; calls that none takes raise ``InputsError``,
    which names the nearest. An output besides the loss is detached from autograd.

    Raises ``ArtefactError`` for what is no artefact, was damaged, is of another kind of machine, release or
    format, calls operators that it may not or that nothing provides, or does not fit ``model``.
    """
    read = partial(_loaded, path, tuple(operators), tuple(plugins), cuda_graphs)
    return read(model)


def _loaded(
    path: str | os.PathLike[str],
    trusted: tuple[str, ...],
    plugins: tuple[object, ...],
    cuda_graphs: bool,
    model: torch.nn.Module | None,
    example: Any = None,
) -> Optimized:
    """``example`` is not asked for: copies are made with one where modules capture."""
    folder = Folder(path)
    try:
        made_for = decode(MadeFor, folder.facts["device"], where="device")
        check_torch(str(folder.facts["torch"]))
        notes = check_place(made_for)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error.message}", hint=error.hint) from None
    except (KeyError, RecordFormatError) as error:
        raise ArtefactError(f"{path} is malformed: {error}") from error
    contents = contents_of(folder)
    device = torch.device(made_for.kind)
    if contents.tuned:
        lend_tuning(contents.folder / "tuning")
    session = make_session(
        device,
        emit=contents.steps[0].step.emit,
        pipeline=(),
        plugins=plugins,
        cache=False,
        cuda_graphs=cuda_graphs,
        runs_on=device,
    )
    allowed = Operators(session.host, trusted)
    try:
        steps = [_compiled(session, step, allowed, device) for step in contents.steps]
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error.message}", hint=error.hint) from error
    module = _module(contents, model)
    session.diagnostics += notes
    if any(step.step.detached for step in contents.steps):
        session.diagnostics.append("outputs besides the loss are cut off from autograd in a loaded step")
    reports = [step.report for step in contents.steps]
    saved_kernels = {group.kernel for report in reports for group in report.groups if group.kept}
    if saved_kernels != (now := {group.kernel for group in session.emitter.groups if group.kept}):
        other = sorted(saved_kernels ^ now)
        session.diagnostics.append(f"kernels are not those that were saved: {', '.join(other[:3])}")
    driver = LoadedDriver(module, session, contents, signature_of(contents.signature), steps)
    again = partial(_loaded, path, trusted, plugins, cuda_graphs)
    return Optimized(module, driver, None, again)


def _compiled(
    session: Session, contents: StepContents, operators: Operators, device: torch.device
) -> LoadedStep:
    """One step, compiled again. Raises ``ArtefactError``."""
    step = contents.step
    running = _Compiling(contents, operators, session.emitter)
    functions, captured = running.compiled()
    session.plan, session.reruns = contents.report.plan, step.reruns
    session.current = captured
    session.captured += captured
    session.static_bytes, session.weight_bytes = step.static_bytes, step.weight_bytes
    session.held_gradient_bytes, session.trains = step.held_gradient_bytes, step.mode == "train"
    run = running.run(functions, device)
    roles = Roles(
        frozenset(k for k, spec in enumerate(step.inputs) if spec.source != "argument"),
        running.written_inputs(),
        step.random,
    )

    def cast_roles() -> Roles | Reason:
        if step.random and step.reruns:
            return Reason("layers that draw random numbers run again under the state of their first run")
        if contents.sizes.symbols:
            return Reason("sizes are known at run time alone", tuple(contents.sizes.known))
        return Reason("values wait in the memory of the host") if any(c.moves for c in step.calls) else roles

    callee = replace(contents, sizes=running.sizes).callee(running.held)
    devices = {torch.empty(0, device=device).device}  # with its number
    return LoadedStep(contents, callee, replayed(session, run, devices, cast_roles), said_of(session))


def _module(contents: Contents, model: torch.nn.Module | None) -> torch.nn.Module:
    """The module that the step is run on."""
    if model is None:
        if not contents.weights:
            raise ArtefactError(
                f"{contents.folder} was saved without weights",
                hint="give the model: graphopt.load(path, model)",
            )
        tensors = read_state(contents.folder / WEIGHTS, contents.state)
        shell = Shell(contents.state, tensors, signature_of(contents.signature))
        return shell.train(contents.steps[-1].step.training)
    if not isinstance(model, torch.nn.Module):
        raise ArtefactError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    return model


class _Compiling:
    """Compiles the codes of a step. ``sizes``: with what was assumed of them while programs were traced
    again."""

    def __init__(self, contents: StepContents, operators: Operators, emitter: Emitter) -> None:
        self.contents, self.step = contents, contents.step
        self.operators, self.emitter, self.sizes = operators, emitter, contents.sizes
        names = [spec.name for spec in self.step.inputs if spec.source == "held"]
        file = contents.folder / WEIGHTS
        self.held = held_tensors(file, names, torch.device("cpu"))
        self.constants = held_tensors(file, contents.constants.values(), torch.device("cpu"))

    def compiled(self) -> tuple[list[Callable[..., Any]], list[Captured]]:
        """What runs each of the codes, and the programs of each call for who asks for them."""
        programs = self.contents.programs(self.operators, self.contents.numbers())
        functions = []
        for code in self.step.codes:
            try:
                functions.append(self._compile(code, programs))
            except ArtefactError:
                raise
            except Exception as error:  # whatever a compiler raises on a program that it cannot take
                inner = _torch.inner_error(error)
                if isinstance(inner, ArtefactError):
                    raise inner from None
                raise ArtefactError(
                    f"program {code.name[:60]!r} cannot be compiled: {brief(inner)}"
                ) from error
        return functions, self.contents.captured(programs)

    def _compile(self, code: SavedCode, programs: Mapping[int, Program]) -> Callable[..., Any]:
        semantic = programs[code.semantic]
        specs = list(semantic.signature.inputs)
        context = self.contents.sizes.context()
        mode = context.fake_mode
        assert mode is not None
        make_size = self.contents.sizes.maker(mode) if self.contents.sizes.symbols else no_symbols

        gradients = Gradients(frozenset(code.parameters), code.held)

        def checked_program(traced: Program) -> Program:
            if traced.fingerprint != code.traced:
                raise ArtefactError(
                    f"traced again, {code.name[:60]!r} is another program ({traced.fingerprint}) than "
                    f"the one that was planned ({code.traced[:20]})",
                    hint="save it again with this torch",
                )
            # Numbers that are made of symbolic sizes may have other names than the schedule knows.
            if not code.rewritten and same_names(traced, programs[code.joint]):
                return traced
            return self._rewritten(traced, programs[code.joint])

        def realise(joint: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
            _torch.eliminate_common_subexpressions(joint, must_happen)
            if code.whole:
                drop_unread_statistics(joint)
                if self.emitter.name == "eager":
                    # What could not be settled is said in the report that was saved.
                    settle_layouts(joint)
                    make_random_states_explicit(joint)
                    own_gradients(joint, count, gradients)
            return partition(checked_program(joint_program(code.name, joint, specs, count)), code.schedule)

        def as_is(graph: fx.GraphModule) -> fx.GraphModule:
            if code.whole and self.emitter.name == "eager":
                settle_layouts(graph)
            chosen = checked_program(inference_program(code.name, graph, specs)).gm
            if code.whole:
                chosen.graph = ordered(chosen.graph, code.schedule.forward)
                chosen.recompile()
            return chosen

        with ExitStack() as stack:
            stack.enter_context(_torch.within(context))
            stack.enter_context(_cast(self.step.autocast))
            stack.enter_context(torch.set_grad_enabled(code.mode == "train"))
            with mode:
                examples = [
                    _trained(type_of(self.contents.types[number], make_size), trained)
                    for number, trained in zip(code.examples, code.trained, strict=True)
                ]
            # Compilation takes its module over.
            run = self.emitter.compile(copied_module(semantic.gm), examples, realise, as_is, gradients)
        if self.contents.sizes.symbols:
            self.sizes = self.sizes.with_guards(_torch.context_guards(context))
        return run

    def _rewritten(self, traced: Program, saved: Program) -> Program:
        """The program that passes made of the ``traced`` one, with the values that it computes here."""
        gm = copied_module(saved.gm)
        sources = [node for node in traced.graph.nodes if node.op in ("placeholder", "output")]
        targets = [node for node in gm.graph.nodes if node.op in ("placeholder", "output")]
        if [node.name for node in sources[:-1]] != [node.name for node in targets[:-1]]:
            raise ArtefactError(f"program {saved.name[:60]!r} takes other inputs than it was traced with")
        for source, target in zip(sources, targets, strict=True):
            target.meta = dict(source.meta)
        values = [node.meta["val"] for node in sources[:-1]]
        _torch.propagate_fakes(gm, values, _torch.fake_mode_of(values))
        made = Program(saved.name, saved.level, gm, saved.signature, saved.symbols)
        if made.fingerprint != saved.fingerprint:
            raise ArtefactError(f"program {saved.name[:60]!r} computes values of other types than it says")
        return made

    def run(self, functions: Sequence[Callable[..., Any]], device: torch.device) -> Callable[..., Any]:
        """What runs the whole step on the inputs of its program."""
        step = self.step
        self.held = {name: tensor.to(device) for name, tensor in self.held.items()}
        if len(step.calls) == 1 and step.codes[0].whole:
            return functions[0]
        named = self.contents.constants
        constants = {name: self.constants[named[name]].to(device) for name in step.constants}
        calls = tuple(Call(call.code, call.args, call.outs, call.drops) for call in step.calls)
        inputs = tuple(spec.node for spec in step.inputs)
        chain = Segmented((), calls, inputs, constants, results_of_text(step.results), ())
        try:
            moves, host = reserved(step.calls)
        except HostMemoryError as error:
            raise ArtefactError(f"values cannot wait in the memory of the host: {error.message}") from error
        runner = ChainRunner(
            chain,
            [functions[call.code] for call in step.calls],
            step.reruns,
            [call.written for call in step.calls],
            [call.random for call in step.calls],
            moves,
            host,
        )
        return lambda *args: runner(list(args))

    def written_inputs(self) -> frozenset[int]:
        places = {spec.node: k for k, spec in enumerate(self.step.inputs)}
        return frozenset(
            places[call.args[position]]
            for call in self.step.calls
            for position in call.written
            if call.args[position] in places
        )


def _trained(value: Any, trained: bool) -> Any:
    return value.requires_grad_() if trained and isinstance(value, torch.Tensor) else value


@contextmanager
def _cast(casts: Sequence[Autocast]) -> Iterator[None]:
    """The state of autocast that programs were traced in."""
    with ExitStack() as stack:
        for cast in casts:
            if cast.enabled or torch.is_autocast_enabled(cast.kind):
                dtype = dtype_named(cast.dtype)
                stack.enter_context(torch.autocast(cast.kind, dtype=dtype, enabled=cast.enabled))
        yield
