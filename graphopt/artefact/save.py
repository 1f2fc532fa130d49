"""``Optimized.save``: what runs the steps of a module, written down so that it can be compiled again
elsewhere.

How arguments and results of a call belong to inputs and outputs of a program is seen, not told: each step
runs once on example inputs, everything put back, and tensors are known by identity. Steps that the module
would run by another one, or capture anew, are left out with a note.
"""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import graphopt
from graphopt.artefact.calling import signature_json
from graphopt.artefact.driver import LoadedDriver
from graphopt.artefact.folder import WEIGHTS, Folder, written
from graphopt.artefact.matching import Given, pick
from graphopt.artefact.place import place_of
from graphopt.artefact.records import SavedMemory, SavedOperator
from graphopt.artefact.seen import seen_step
from graphopt.artefact.state import Tensors, saved_state
from graphopt.artefact.writer import Graphs, StepWriter, WrittenStep
from graphopt.cache_folder import cache_folder
from graphopt.errors import ArtefactError, InputsError
from graphopt.packing.artefact import ArtefactWeight
from graphopt.packing.convert import converted
from graphopt.packing.save import written_weight
from graphopt.plugins.host import PluginHost
from graphopt.record_json import encode
from graphopt.step_view import step_name
from graphopt.tensors_file import TensorsFile, write_tensors

if TYPE_CHECKING:
    from graphopt.capture.driver import Driver
    from graphopt.optimized import Optimized
    from graphopt.planned_step import Example

__all__ = ["save", "write_extras"]


def save(optimized: Optimized, path: Path, *, weights: bool = True) -> Path:
    """Write what ``Optimized.save`` promises to the folder ``path``."""
    driver = optimized._driver
    if isinstance(driver, LoadedDriver):
        _save_again(driver, path, weights)
        return path
    _check_savable(optimized)
    tensors = Tensors()
    state = saved_state(driver.model, tensors)
    if not weights:
        tensors = Tensors()
    graphs = Graphs(tensors)
    steps, notes = _steps(driver, tensors, graphs)
    _check_told_apart(driver, steps, graphs, tensors)
    host = driver.session.host
    reports, memories = [], []
    for number in steps:
        with driver.showing(number):
            report = optimized.report if number == driver.step_count() - 1 else driver.report()
            reports.append(replace(report, earlier=(), diagnostics=(*report.diagnostics, *notes)))
            memories.append(SavedMemory(driver.explain_memory(), driver.frontier()))
    content = {
        "steps": [step.json for step in steps.values()],
        "graphs": graphs.programs,
        "types": graphs.types,
        "state": encode(state),
        "packed": {name: encode(weight) for name, weight in _packed(driver.model).items()},
        "signature": signature_json(inspect.signature(driver.model.forward)),
    }
    facts = {
        "graphopt": graphopt.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "device": encode(place_of(_device(steps.values()))),
        "operators": encode(_operators(graphs.targets, host)),
        "weights": weights,
    }
    with written(path, facts) as folder:
        _write_json(folder / "programs.json", content)
        _write_json(folder / "report.json", {"steps": [report.to_json() for report in reports]})
        _write_json(folder / "memory.json", {"steps": encode(memories)})
        tensors.write(folder / WEIGHTS, {"format": "pt"})
        write_extras(folder, host, list(dict.fromkeys(g for report in reports for g in report.groups)))
    return path


def _steps(driver: Driver, tensors: Tensors, graphs: Graphs) -> tuple[dict[int, WrittenStep], list[str]]:
    """The steps that the module still runs, by number, and notes on those that it does not."""
    last = driver.step_count() - 1
    with _named(driver):
        seen = seen_step(driver, last) or seen_step(driver, last, anew=True)
        if seen is None:
            raise ArtefactError(
                "it was captured last, and the module now runs another step for the same call",
                hint="optimize the model anew in the mode and for the inputs that are to be saved",
            )
    found: dict[int, WrittenStep] = {}
    notes = []
    present = driver.step_count() - 1
    for number in range(driver.step_count()):
        with driver.showing(number), _named(driver):
            known = seen if number == present else seen_step(driver, number)
            if known is not None:
                writer = StepWriter(driver.session, number, known, tensors, graphs)
                found[number] = writer.written(_example(driver, number).training)
                continue
            name = _said(driver)
        notes.append(f"{name} is not in the artefact: the module runs its calls by another step now")
    return found, notes


@contextmanager
def _named(driver: Driver) -> Iterator[None]:
    """``ArtefactError`` of the block names the step that it is of, where there are several."""
    try:
        yield
    except ArtefactError as error:
        name = f"{_said(driver)}: " if driver.step_count() > 1 else ""
        raise ArtefactError(f"{name}{error.message}", hint=error.hint) from None


def _example(driver: Driver, number: int) -> Example:
    example = driver.session.steps[number].example
    assert example is not None
    return example


def _said(driver: Driver) -> str:
    """What the present step of a driver is called."""
    return step_name([captured.summary for captured in driver.session.current])


def _check_told_apart(
    driver: Driver, steps: Mapping[int, WrittenStep], graphs: Graphs, tensors: Tensors
) -> None:
    """Raise ``ArtefactError`` where a loaded module would take the call of one step for one of another."""
    names = []
    for number in steps:
        with driver.showing(number):
            names.append(_said(driver))
    model = driver.model
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    callees = [
        step.callee(graphs, dict(tensors.by_name), name)
        for step, name in zip(steps.values(), names, strict=True)
    ]
    for k, (number, step) in enumerate(steps.items()):
        example = _example(driver, number)
        with example.around(model):
            given = Given(step.seen.bound, example.training, torch.is_grad_enabled(), state)
            try:
                chosen, _ = pick(callees, given)
            except InputsError as error:
                raise ArtefactError(f"{names[k]} would not take its own call: {error.message}") from None
        if chosen != k:
            raise ArtefactError(
                f"{names[k]} and {names[chosen]} take the same calls: what tells them apart in the module is "
                "not part of a call",
                hint="optimize the model anew for each, and save one artefact for each",
            )


def _device(steps: Iterable[WrittenStep]) -> torch.device:
    found = {str(step.seen.device): step.seen.device for step in steps}
    if len(found) > 1:
        raise ArtefactError(f"steps are on {' and '.join(sorted(found))}: artefacts are of one device")
    return next(iter(found.values()))


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
    with written(path, {**facts, "weights": weights}, schema=source.schema) as folder:
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
