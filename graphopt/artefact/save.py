"""``Optimized.save``: what runs the present step, written down so that it can be compiled again elsewhere.

How arguments and results of a call belong to inputs and outputs of the program is seen, not told: the step
runs once on its example inputs, everything put back, and tensors are known by identity.
"""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

import graphopt
from graphopt import _torch
from graphopt.artefact.calling import signature_json
from graphopt.artefact.driver import LoadedDriver
from graphopt.artefact.folder import WEIGHTS, Folder, written
from graphopt.artefact.graphs import program_json
from graphopt.artefact.place import place_of
from graphopt.artefact.records import (
    Autocast,
    SavedCode,
    SavedInput,
    SavedMemory,
    SavedOperator,
    SavedStep,
)
from graphopt.artefact.seen import SeenCall, seen_call
from graphopt.artefact.state import Tensors, saved_state
from graphopt.artefact.values import type_json
from graphopt.cache_folder import cache_folder
from graphopt.captured import Captured
from graphopt.chain_rows import draws_random, written_inputs
from graphopt.errors import ArtefactError
from graphopt.packing.artefact import ArtefactWeight
from graphopt.packing.convert import converted
from graphopt.packing.save import written_weight
from graphopt.plugins.host import PluginHost
from graphopt.program import Program
from graphopt.record_json import encode
from graphopt.schedule import Schedule
from graphopt.session import Session
from graphopt.stored_step import StoredCall, results_text
from graphopt.tensors_file import TensorsFile, write_tensors
from graphopt.warm_start import stored_moves

if TYPE_CHECKING:
    from graphopt.optimized import Optimized
    from graphopt.segmented import SegmentedStep

__all__ = ["save", "write_extras"]

_KINDS = ("cpu", "cuda")


def save(optimized: Optimized, path: Path, *, weights: bool = True) -> Path:
    """Write what ``Optimized.save`` promises to the folder ``path``."""
    driver = optimized._driver
    if isinstance(driver, LoadedDriver):
        _save_again(driver, path, weights)
        return path
    _check_savable(optimized)
    seen = seen_call(driver)
    tensors = Tensors()
    state = saved_state(driver.model, tensors)
    if not weights:
        tensors = Tensors()
    graphs = _Graphs(tensors)
    step = _Writer(driver.session, seen, tensors, graphs).step(driver.model.training)
    host = driver.session.host
    report, explanation = optimized.report, driver.explain_memory()
    content = {
        "step": encode(step),
        "graphs": graphs.programs,
        "types": graphs.types,
        "state": encode(state),
        "packed": {name: encode(weight) for name, weight in _packed(driver.model).items()},
        "signature": signature_json(inspect.signature(driver.model.forward)),
        "arguments": seen.arguments,
        "results": seen.results,
        "tensors": len(seen.given),
    }
    facts = {
        "graphopt": graphopt.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "device": encode(place_of(seen.device)),
        "operators": encode(_operators(graphs.targets, host)),
        "weights": weights,
    }
    with written(path, facts) as folder:
        _write_json(folder / "programs.json", content)
        _write_json(folder / "report.json", report.to_json())
        _write_json(folder / "memory.json", encode(SavedMemory(explanation, driver.frontier())))
        tensors.write(folder / WEIGHTS, {"format": "pt"})
        write_extras(folder, host, report.groups)
    return path


def _save_again(driver: LoadedDriver, path: Path, weights: bool) -> None:
    """Write a loaded step once more, with its parameters and buffers as they are now."""
    source = Folder(driver.source)
    facts = {name: value for name, value in source.facts.items() if name not in ("schema", "files")}
    old = TensorsFile(source.path / WEIGHTS)
    now = driver.tensors_now()
    state = {entry.tensor for entry in driver.saved_state}
    tensors = {name: old.read(name) for name in old.entries if name not in state}
    if weights:
        tensors |= {entry.tensor: now[entry.path] for entry in driver.saved_state}
    with written(path, {**facts, "weights": weights}) as folder:
        for name in source.files:
            if name != WEIGHTS:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes((source.path / name).read_bytes())
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def _check_savable(optimized: Optimized) -> None:
    driver = optimized._driver
    session = driver.session
    if optimized._generator is not None:
        raise ArtefactError(
            "a module that was optimized to generate cannot be saved: the model's own generate runs between "
            "its programs",
            hint="save its weights with graphopt.save_weights, and optimize again where it runs",
        )
    driver.plan()
    if session.dry_run:
        raise ArtefactError("the step was planned, not compiled: save what graphopt.optimize gives")
    if not session.whole:
        why = "step= was given" if driver.step is not None else "; ".join(session.diagnostics[:1])
        raise ArtefactError(
            f"the model is {len(session.current)} programs with Python of its own between them ({why}), "
            "which an artefact cannot hold",
            hint="make forward one graph: torch.compile(model, fullgraph=True) says where it breaks",
        )


class _Graphs:
    """Programs and types, each written once, by number."""

    def __init__(self, tensors: Tensors) -> None:
        self.programs: list[dict[str, Any]] = []
        self.types: list[Any] = []
        self.targets: dict[str, None] = {}
        self._tensors = tensors
        self._known: dict[int, tuple[int, Any]] = {}

    def add(self, program: Program) -> int:
        if id(program.gm) in self._known:
            return self._known[id(program.gm)][0]
        number = len(self.programs)
        made = program_json(
            program, lambda tensor: self._tensors.hold(tensor, f"constant.{number}.{self._count()}")
        )
        self.programs.append(made)
        self.targets |= dict.fromkeys(n["target"] for n in made["nodes"] if n["op"] == "call_function")
        self._known[id(program.gm)] = number, program.gm
        return number

    def _count(self) -> int:
        return len(self._tensors.by_name)

    def add_type(self, value: Any) -> int:
        self.types.append(type_json(value))
        if self.types[-1] is None:
            raise ArtefactError(
                "sizes of the program are known at run time alone, which artefacts cannot hold"
            )
        return len(self.types) - 1


@dataclass
class _Writer:
    session: Session
    seen: SeenCall
    tensors: Tensors
    graphs: _Graphs

    def step(self, training: bool) -> SavedStep:
        from graphopt.segmented import SegmentedStep

        assert self.seen.ran is not None
        made = self.seen.ran.step
        if isinstance(made, SegmentedStep):
            return self._chain(made, training)
        assert made is not None
        self._check_present([made])
        names = tuple(node.name for node in made.semantic.graph.nodes if node.op == "placeholder")
        outputs = _flat_results(made.semantic.gm)
        outs = tuple(f"result_{k}" for k in range(len(outputs)))
        call = StoredCall(0, names, outs, (), tuple(written_inputs(made)), draws_random(made))
        trained = tuple(isinstance(x, torch.Tensor) and x.requires_grad for x in self.seen.inputs)
        code = self._code(made, self.seen.inputs, trained, whole=True)
        results = json.dumps({"list": [{"value": name} for name in outs]}, separators=(",", ":"))
        return self._record(training, [made], names, (call,), (code,), (), results)

    def _chain(self, made: SegmentedStep, training: bool) -> SavedStep:
        self._check_present(made.captured)
        runner = made.runner
        assert runner is not None
        numbers: dict[Any, int] = {}
        codes: list[SavedCode] = []
        calls: list[StoredCall] = []
        for k, (call, captured) in enumerate(zip(made.chain.calls, made.captured, strict=True)):
            assert captured.point is not None
            key = call.segment, captured.point.alternative, captured.schedule
            if key not in numbers:
                numbers[key] = len(codes)
                segment = made.chain.segments[call.segment]
                codes.append(self._code(captured, segment.example_inputs(), segment.trained, whole=False))
            calls.append(
                StoredCall(
                    numbers[key],
                    call.args,
                    call.outs,
                    call.drops,
                    tuple(runner.written[k]),
                    runner.random[k],
                    stored_moves(runner, k),
                )
            )
        constants = []
        for name, tensor in made.chain.constants.items():
            if not isinstance(tensor, torch.Tensor):
                raise ArtefactError(f"the program holds a {type(tensor).__name__} as {name}")
            self.tensors.hold(tensor, f"chain.{name}")
            constants.append(name)
        try:
            results = results_text(made.chain.results)
        except TypeError as error:
            raise ArtefactError(str(error)) from None
        return self._record(
            training, made.captured, made.chain.inputs, tuple(calls), tuple(codes), tuple(constants), results
        )

    def _check_present(self, group: Sequence[Captured]) -> None:
        current = self.session.current
        if len(group) != len(current) or any(a is not b for a, b in zip(group, current, strict=True)):
            raise ArtefactError(
                "the module's mode now runs another step than the one that was captured last",
                hint="optimize the model anew in the mode and for the inputs that are to be saved",
            )

    def _record(
        self,
        training: bool,
        group: Sequence[Captured],
        inputs: Sequence[str],
        calls: tuple[StoredCall, ...],
        codes: tuple[SavedCode, ...],
        constants: tuple[str, ...],
        results: str,
    ) -> SavedStep:
        session = self.session
        assert self.seen.ran is not None
        casts = tuple(
            Autocast(kind, torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))[6:])
            for kind in _KINDS
        )
        return SavedStep(
            session.emitter.name,
            group[0].mode,
            training,
            tuple(self._inputs(inputs)),
            calls,
            codes,
            tuple(captured.name for captured in group),
            tuple(bool(captured.lowered) for captured in group),
            constants,
            results,
            session.reruns,
            casts,
            self.seen.ran.detached,
            session.static_bytes or 0,
            session.weight_bytes or 0,
            session.held_gradient_bytes,
            any(call.random for call in calls),
        )

    def _inputs(self, names: Sequence[str]) -> list[SavedInput]:
        places = {id(tensor): k for k, tensor in enumerate(self.seen.given)}
        found = []
        for node, value in zip(names, self.seen.inputs, strict=True):
            if not isinstance(value, torch.Tensor):
                raise ArtefactError(
                    "sizes of the program are known at run time alone, which artefacts cannot hold",
                    hint="optimize with dynamic_shapes=False, and save one artefact for each size",
                )
            if id(value) in self.seen.state:
                source, name = "state", self.seen.state[id(value)]
            elif id(value) in places:
                source, name = "argument", str(places[id(value)])
            else:
                source, name = "held", self.tensors.hold(value, f"held.{node}")
            found.append(SavedInput(node, source, name, value.requires_grad))
        storages = [_torch.storage_key(value) for value in self.seen.inputs if value.numel()]
        if len(set(storages)) < len(storages):
            raise ArtefactError("two inputs of the program share memory, which loaded ones would not")
        return found

    def _code(
        self, captured: Captured, examples: Sequence[Any], trained: Sequence[bool], *, whole: bool
    ) -> SavedCode:
        if captured.joint is None or captured.point is None:
            raise ArtefactError(f"{captured.name} was not compiled")
        gradients = self.session.gradients_of(captured.specs)
        halves = zip(("forward", "backward"), captured.lowered, strict=False)
        lowered = [_lowered(captured, half, name) for name, half in halves]
        return SavedCode(
            captured.semantic.name,
            captured.mode,
            whole,
            self.graphs.add(captured.semantic),
            self.graphs.add(captured.joint),
            tuple(map(self.graphs.add, lowered)),
            captured.traced,
            captured.joint.fingerprint != captured.traced,
            _plain(captured.schedule),
            tuple(map(self.graphs.add_type, examples)),
            tuple(trained),
            tuple(sorted(gradients.parameters)),
            gradients.held,
        )


def _lowered(captured: Captured, half: fx.GraphModule, name: str) -> Program:
    from graphopt.dumping import lowered_program

    return lowered_program(captured.joint, half, f"{captured.name}.{name}")


def _plain(schedule: Schedule) -> Schedule:
    return Schedule(tuple(schedule.forward), tuple(schedule.saved), tuple(schedule.backward))


def _flat_results(gm: fx.GraphModule) -> list[Any]:
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    return torch.utils._pytree.tree_leaves(output.args[0])


def _packed(model: torch.nn.Module) -> dict[str, ArtefactWeight]:
    """How the packed weights of a model are to be read, by name."""
    packed: dict[int, tuple[Any, list[str]]] = {}
    for name, _, _, weight in converted(model):
        packed.setdefault(id(weight), (weight, []))[1].append(name)
    return {names[0]: written_weight(weight, names) for weight, names in packed.values()}


def _operators(targets: Mapping[str, None], host: PluginHost) -> tuple[SavedOperator, ...]:
    """Operators besides torch's, and who provides them."""
    owners = {spec.op: host.owner("graphopt_kernels", name) for name, spec in host.kernels().items()}
    found = []
    for target in targets:
        space = target.partition("::")[0]
        if "::" in target and space not in ("aten", "prims"):
            owner = owners.get(target.rpartition(".")[0])
            found.append(
                SavedOperator(target, owner.plugin if owner else "", owner.distribution if owner else "")
            )
    return tuple(sorted(found, key=lambda operator: operator.name))


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def write_extras(folder: Path, host: PluginHost, groups: Sequence[Any]) -> None:
    """What tuning found on this machine, and sources of the kernels that are used."""
    tuned = cache_folder() / "tuning"
    for file in sorted(tuned.glob("*.json")) if tuned.is_dir() else ():
        (folder / "tuning").mkdir(exist_ok=True)
        (folder / "tuning" / file.name).write_bytes(file.read_bytes())
    for group in groups:
        for spec in host.replacements().values():
            source = spec.source(group.kernel) if group.kept and spec.source is not None else None
            if source is not None:
                (folder / "kernels").mkdir(exist_ok=True)
                (folder / "kernels" / f"{group.kernel}.py").write_text(source, encoding="utf-8")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
