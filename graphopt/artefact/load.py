"""``graphopt.load``: an artefact read, checked, compiled by the emitter that made it, behind a module.

What is compiled is the program that passes rewrote, under the schedule that was planned: dynamo, passes and
planning do not run. AOTAutograd traces the program again, and what it gives has to be what the plan is of.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.api import make_session
from graphopt.artefact.calling import check_structure, signature_of
from graphopt.artefact.driver import LoadedDriver
from graphopt.artefact.folder import WEIGHTS, Folder
from graphopt.artefact.graphs import program_of
from graphopt.artefact.operators import Operators
from graphopt.artefact.place import check_place, check_torch
from graphopt.artefact.records import (
    Autocast,
    MadeFor,
    SavedCode,
    SavedMemory,
    SavedOperator,
    SavedState,
    SavedStep,
)
from graphopt.artefact.state import Shell, checked, held_tensors, read_state
from graphopt.artefact.values import dtype_named, like
from graphopt.cache_folder import lend_tuning
from graphopt.candidate import Frontier, FrontierPoint, Reason
from graphopt.capture.chain import Call, Segmented
from graphopt.capture.joint import drop_unread_statistics, inference_program, joint_program
from graphopt.captured import Captured
from graphopt.chain_run import ChainRunner
from graphopt.emit.emitter import Emitter, Gradients
from graphopt.errors import ArtefactError, GraphoptError, HostMemoryError, brief
from graphopt.optimized import Optimized
from graphopt.partition import ordered, partition
from graphopt.program import Program
from graphopt.record_json import RecordFormatError, decode
from graphopt.recording import Roles
from graphopt.replay import make_random_states_explicit
from graphopt.replayed_steps import replayed
from graphopt.report import Report
from graphopt.stored_step import check_calls, results_of_text
from graphopt.warm_start import reserved

__all__ = ["Contents", "load", "read_contents"]


@dataclass(frozen=True)
class Contents:
    """What an artefact says, checked but for its graphs. ``text``: where it was read from, for errors."""

    folder: Path
    weights: bool
    step: SavedStep
    graphs: Sequence[Any]
    types: Sequence[Any]
    state: tuple[SavedState, ...]
    signature: Any
    arguments: Any
    results: Any
    tensors: int
    report: Report
    memory: SavedMemory
    operators: tuple[SavedOperator, ...]
    tuned: bool

    def programs(self, operators: Operators, numbers: Iterable[int]) -> dict[int, Program]:
        """Some of the programs, by number, their values fake. Raises ``ArtefactError``."""
        wanted = dict.fromkeys(numbers)
        if any(not 0 <= number < len(self.graphs) for number in wanted):
            raise ArtefactError(f"{self.folder} names a graph that it has not")
        for operator in self.operators:
            operators.target(operator.name, provider=operator.plugin)
        names = [
            node["tensor"]
            for number in wanted
            for node in _nodes(self.graphs[number])
            if isinstance(node, dict) and isinstance(node.get("tensor"), str)
        ]
        tensors = held_tensors(self.folder / WEIGHTS, names, torch.device("cpu"))
        with _torch.fake_mode():
            return {number: program_of(self.graphs[number], operators, tensors) for number in wanted}

    def numbers(self) -> list[int]:
        """Numbers of the graphs that codes are of."""
        return [n for code in self.step.codes for n in (code.semantic, code.joint, *code.lowered)]

    def captured(self, programs: Mapping[int, Program]) -> list[Captured]:
        """The programs of each call, as if they had been captured here."""
        plan, found = self.report.plan, []
        for k, (call, name, shown) in enumerate(
            zip(self.step.calls, self.step.names, self.step.lowered, strict=True)
        ):
            code = self.step.codes[call.code]
            semantic, joint = programs[code.semantic], programs[code.joint]
            lowered = tuple(programs[number].gm for number in code.lowered) if shown else ()
            point = FrontierPoint(code.schedule, 0, 0, 0, 0, 0.0)
            passes = [choice.pass_id for choice in plan.choices if choice.program == name] if plan else []
            found.append(
                Captured(
                    name,
                    semantic,
                    list(semantic.signature.inputs),
                    code.mode,
                    joint,
                    frontier=Frontier(passes[0] if passes else "", (point,)),
                    point=point,
                    lowered=lowered,
                    told=self.report.programs[k] if k < len(self.report.programs) else None,
                )
            )
        return found

    def looks(self) -> dict[str, tuple[Any, bool]]:
        """What inputs of the whole program look like, by node, and whether gradients flow to them."""
        found: dict[str, tuple[Any, bool]] = {}
        given = {spec.node: spec for spec in self.step.inputs}
        for call in self.step.calls:
            code = self.step.codes[call.code]
            for name, number in zip(call.args, code.examples, strict=True):
                if name in given:
                    found.setdefault(name, (self.types[number], given[name].trained))
        return found


def _nodes(graph: Any) -> Sequence[Any]:
    found = graph.get("nodes") if isinstance(graph, dict) else None
    return found if isinstance(found, list) else ()


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """What is in the artefact at ``path``, every file of it checked. Nothing is compiled, no device is asked.

    Raises ``ArtefactError``, ``OSError``.
    """
    return _read(Folder(path))


def _read(folder: Folder) -> Contents:
    try:
        return _contents(folder)
    except ArtefactError as error:
        raise ArtefactError(f"{folder.path}: {error.message}", hint=error.hint) from None
    except GraphoptError as error:
        raise ArtefactError(f"{folder.path}: {error.message}", hint=error.hint) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{folder.path} is malformed: {type(error).__name__}: {error}") from error


def _contents(folder: Folder) -> Contents:
    facts, content = folder.facts, folder.json("programs.json")
    step = decode(SavedStep, content["step"], where="step")
    state = _all(SavedState, content["state"], "state")
    checked(state)
    count = content["tensors"]
    if type(count) is not int or count < 0:
        raise ArtefactError(f"the step takes {str(count)[:20]!r} tensors")
    inputs = [spec.node for spec in step.inputs]
    if any(name in inputs for name in step.constants):
        raise ArtefactError("a constant has the name of an input")
    results = results_of_text(step.results)
    check_calls([*inputs, *step.constants], step.calls, len(step.codes), results, step.reruns)
    if not len(step.names) == len(step.lowered) == len(step.calls):
        raise ArtefactError("its parts do not belong together")
    modes = {step.mode, *(code.mode for code in step.codes)}
    if not modes <= {"train", "infer"} or any(cast.kind not in ("cpu", "cuda") for cast in step.autocast):
        raise ArtefactError(f"the step is of mode {step.mode[:20]!r}; expected train or infer")
    for code in step.codes:
        if len(code.examples) != len(code.trained) or any(
            not 0 <= n < len(content["types"]) for n in code.examples
        ):
            raise ArtefactError(f"program {code.name[:60]!r} has inputs without types")
    for call in step.calls:
        if len(call.args) != len(step.codes[call.code].examples):
            raise ArtefactError("a call gives a program other inputs than it takes")
    names = frozenset(entry.path for entry in state)
    returned = len(results) if isinstance(results, (tuple, list)) else 0
    check_structure(content["arguments"], {"argument": count})
    check_structure(content["results"], {"argument": count, "value": returned}, names)
    for spec in step.inputs:
        there = spec.name in names if spec.source == "state" else True
        if spec.source == "argument":
            there = spec.name.isdecimal() and int(spec.name) < count
        if spec.source not in ("state", "argument", "held") or not there:
            raise ArtefactError(f"input {spec.node} is {spec.source} {spec.name[:60]!r}, which is not there")
    signature_of(content["signature"])
    return Contents(
        folder.path,
        bool(facts["weights"]),
        step,
        _list(content["graphs"], "graphs"),
        _list(content["types"], "types"),
        state,
        content["signature"],
        content["arguments"],
        content["results"],
        count,
        Report.from_json(folder.json("report.json")),
        decode(SavedMemory, folder.json("memory.json"), where="memory"),
        _all(SavedOperator, facts["operators"], "operators"),
        any(name.startswith("tuning/") for name in folder.files),
    )


def _list(data: Any, name: str) -> list[Any]:
    if not isinstance(data, list):
        raise ArtefactError(f"{name} is no list")
    return data


def _all(kind: Any, data: Any, name: str) -> tuple[Any, ...]:
    return tuple(decode(kind, item, where=f"{name}[{k}]") for k, item in enumerate(_list(data, name)))


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

    The step is the one that was saved: for its shapes, its mode and its constants; other calls raise
    ``InputsError``. An output besides the loss is detached from autograd.

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
    contents = _read(folder)
    step = contents.step
    device = torch.device(made_for.kind)
    if contents.tuned:
        lend_tuning(contents.folder / "tuning")
    if step.emit not in ("eager", "inductor"):
        raise ArtefactError(f"{path} was made with emitter {step.emit[:40]!r}; expected eager or inductor")
    session = make_session(
        device,
        emit=step.emit,
        pipeline=(),
        plugins=plugins,
        cache=False,
        cuda_graphs=cuda_graphs,
        runs_on=device,
    )
    allowed = Operators(session.host, trusted)
    running = _Compiling(contents, allowed, session.emitter)
    try:
        functions, captured = running.compiled()
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error.message}", hint=error.hint) from error
    module = _module(contents, model)
    session.plan, session.reruns = contents.report.plan, step.reruns
    session.current = session.captured = captured
    session.static_bytes, session.weight_bytes = step.static_bytes, step.weight_bytes
    session.held_gradient_bytes, session.trains = step.held_gradient_bytes, step.mode == "train"
    session.diagnostics += notes
    if step.detached:
        session.diagnostics.append("outputs besides the loss are cut off from autograd in a loaded step")
    saved_kernels = {group.kernel for group in contents.report.groups if group.kept}
    if saved_kernels != (now := {group.kernel for group in session.emitter.groups if group.kept}):
        other = sorted(saved_kernels ^ now)
        session.diagnostics.append(f"kernels are not those that were saved: {', '.join(other[:3])}")
    run = running.run(functions, device)
    roles = Roles(
        frozenset(k for k, spec in enumerate(step.inputs) if spec.source != "argument"),
        running.written_inputs(),
        step.random,
    )

    def cast_roles() -> Roles | Reason:
        if step.random and step.reruns:
            return Reason("layers that draw random numbers run again under the state of their first run")
        return Reason("values wait in the memory of the host") if any(c.moves for c in step.calls) else roles

    examples = [torch.empty(0, device=device)]
    driver = LoadedDriver(
        module, session, contents, replayed(session, run, examples, cast_roles), running.held
    )
    again = partial(_loaded, path, trusted, plugins, cuda_graphs)
    return Optimized(module, driver, None, again)


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
        return shell.train(contents.step.training)
    if not isinstance(model, torch.nn.Module):
        raise ArtefactError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    return model


class _Compiling:
    """Compiles the codes of an artefact."""

    def __init__(self, contents: Contents, operators: Operators, emitter: Emitter) -> None:
        self.contents, self.step = contents, contents.step
        self.operators, self.emitter = operators, emitter
        names = [spec.name for spec in self.step.inputs if spec.source == "held"]
        file = contents.folder / WEIGHTS
        self.held = held_tensors(file, names, torch.device("cpu"))
        self.constants = held_tensors(
            file, [f"chain.{name}" for name in self.step.constants], torch.device("cpu")
        )

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
        context = _torch.static_context()
        mode = context.fake_mode
        assert mode is not None
        mode.allow_non_fake_inputs = True

        def checked_program(traced: Program) -> Program:
            if traced.fingerprint != code.traced:
                raise ArtefactError(
                    f"traced again, {code.name[:60]!r} is another program ({traced.fingerprint}) than "
                    f"the one that was planned ({code.traced[:20]})",
                    hint="save it again with this torch",
                )
            if not code.rewritten:
                return traced
            return self._rewritten(traced, programs[code.joint])

        def realise(joint: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
            _torch.eliminate_common_subexpressions(joint)
            if code.whole:
                drop_unread_statistics(joint)
                if self.emitter.name == "eager":
                    make_random_states_explicit(joint)
            return partition(checked_program(joint_program(code.name, joint, specs, count)), code.schedule)

        def as_is(graph: fx.GraphModule) -> fx.GraphModule:
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
                    like(self.contents.types[number]).requires_grad_(trained)
                    for number, trained in zip(code.examples, code.trained, strict=True)
                ]
            gradients = Gradients(frozenset(code.parameters), code.held)
            # Compilation takes its module over.
            return self.emitter.compile(_copy(semantic.gm), examples, realise, as_is, gradients)

    def _rewritten(self, traced: Program, saved: Program) -> Program:
        """The program that passes made of the ``traced`` one, with the values that it computes here."""
        gm = _copy(saved.gm)
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
        constants = {name: self.constants[f"chain.{name}"].to(device) for name in step.constants}
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


@contextmanager
def _cast(casts: Sequence[Autocast]) -> Iterator[None]:
    """The state of autocast that programs were traced in."""
    with ExitStack() as stack:
        for cast in casts:
            if cast.enabled or torch.is_autocast_enabled(cast.kind):
                dtype = dtype_named(cast.dtype)
                stack.enter_context(torch.autocast(cast.kind, dtype=dtype, enabled=cast.enabled))
        yield


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    return fx.GraphModule(gm, graph)
