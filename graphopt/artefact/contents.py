"""What an artefact says, read and checked. Nothing is compiled, no device is asked.

An artefact of the first format holds one step, whose parts lie beside the graphs; it is read as one of one
step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.artefact.calling import check_structure, numbers_in, signature_of
from graphopt.artefact.folder import WEIGHTS, Folder
from graphopt.artefact.graphs import program_of
from graphopt.artefact.matching import Callee
from graphopt.artefact.operators import Operators
from graphopt.artefact.records import SavedMemory, SavedOperator, SavedState, SavedStep
from graphopt.artefact.sizes import SavedSymbol, Sizes, checked_expression
from graphopt.artefact.state import checked, held_tensors
from graphopt.artefact.values import check_type, no_symbols
from graphopt.candidate import Frontier, FrontierPoint
from graphopt.captured import Captured
from graphopt.errors import ArtefactError, GraphoptError
from graphopt.program import Program
from graphopt.record_json import decode
from graphopt.report import Report
from graphopt.step_view import step_name
from graphopt.stored_step import check_calls, results_of_text

__all__ = ["Contents", "StepContents", "contents_of", "read_contents"]


@dataclass(frozen=True)
class StepContents:
    """What an artefact says of one step, checked but for its graphs. ``constants``: names in the file of
    weights of tensors that its chain holds; ``operators``: those of plugins."""

    folder: Path
    step: SavedStep
    graphs: Sequence[Any]
    types: Sequence[Any]
    operators: tuple[SavedOperator, ...]
    arguments: Any
    results: Any
    tensors: int
    sizes: Sizes
    constants: Mapping[str, str]
    report: Report
    memory: SavedMemory

    @property
    def name(self) -> str:
        """``g0 train f32[64,16]``."""
        return step_name(self.report.programs)

    def numbers(self) -> list[int]:
        """Numbers of the graphs that codes are of."""
        return [n for code in self.step.codes for n in (code.semantic, code.joint, *code.lowered)]

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
        mode = self.sizes.context().fake_mode
        assert mode is not None
        make_size = self.sizes.maker(mode) if self.sizes.symbols else no_symbols
        with mode:
            return {
                number: program_of(self.graphs[number], operators, tensors, make_size) for number in wanted
            }

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

    def callee(self, held: Mapping[str, torch.Tensor]) -> Callee:
        """How it is called; ``held``: the tensors that it has besides its state."""
        looks = self.step.looks(self.types)
        return Callee(self.step, self.arguments, self.tensors, self.sizes, looks, held, self.name)


@dataclass(frozen=True)
class Contents:
    """What an artefact says. ``steps``: at least one, in the order in which they were captured."""

    folder: Path
    weights: bool
    state: tuple[SavedState, ...]
    signature: Any
    steps: tuple[StepContents, ...]
    tuned: bool


def _nodes(graph: Any) -> Sequence[Any]:
    found = graph.get("nodes") if isinstance(graph, dict) else None
    return found if isinstance(found, list) else ()


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """What is in the artefact at ``path``, every file of it checked. Nothing is compiled, no device is asked.

    Raises ``ArtefactError``, ``OSError``.
    """
    return contents_of(Folder(path))


def contents_of(folder: Folder) -> Contents:
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
    reports, memories = folder.json("report.json"), folder.json("memory.json")
    if folder.schema == "graphopt/artefact@1":
        content, reports, memories = _of_one_step(content), {"steps": [reports]}, {"steps": [memories]}
    state = _all(SavedState, content["state"], "state")
    checked(state)
    signature_of(content["signature"])
    parts = [_list(found["steps"], "steps") for found in (content, reports, memories)]
    if not parts[0] or len({len(part) for part in parts}) > 1:
        raise ArtefactError("it has no step, or not a report of each")
    graphs, types = _list(content["graphs"], "graphs"), _list(content["types"], "types")
    operators = _all(SavedOperator, facts["operators"], "operators")
    names = frozenset(entry.path for entry in state)
    steps = []
    for number, (said, report, memory) in enumerate(zip(*parts, strict=True)):
        try:
            steps.append(_step(folder.path, said, graphs, types, operators, names, report, memory))
        except ArtefactError as error:
            where = f"step {number}: " if len(parts[0]) > 1 else ""
            raise ArtefactError(f"{where}{error.message}", hint=error.hint) from None
    emitters = {step.step.emit for step in steps}
    if len(emitters) > 1 or not emitters <= {"eager", "inductor"}:
        raise ArtefactError(f"emitter {sorted(emitters)[0][:40]!r} made it; expected eager or inductor")
    tuned = any(name.startswith("tuning/") for name in folder.files)
    return Contents(folder.path, bool(facts["weights"]), state, content["signature"], tuple(steps), tuned)


def _of_one_step(content: Any) -> Any:
    """What a ``programs.json`` of the first format says, as one of the present format does."""
    constants = {str(name): f"chain.{name}" for name in content["step"]["constants"]}
    said = {key: content[key] for key in ("step", "arguments", "results", "tensors")}
    return {**content, "steps": [{**said, "symbols": [], "guards": [], "constants": constants}]}


def _step(
    folder: Path,
    said: Any,
    graphs: Sequence[Any],
    types: Sequence[Any],
    operators: tuple[SavedOperator, ...],
    names: frozenset[str],
    report: Any,
    memory: Any,
) -> StepContents:
    """One step; ``names`` are those of the state. Raises ``ArtefactError``, ``RecordFormatError`` and what
    indexing JSON raises."""
    step = decode(SavedStep, said["step"], where="step")
    count, constants = said["tensors"], said["constants"]
    if type(count) is not int or count < 0:
        raise ArtefactError(f"the step takes {str(count)[:20]!r} tensors")
    if not isinstance(constants, dict) or sorted(constants) != sorted(step.constants):
        raise ArtefactError("the step has other constants than it names")
    if not all(isinstance(name, str) for name in constants.values()):
        raise ArtefactError("a constant of the step is not named by a text")
    sizes = Sizes(_all(SavedSymbol, said["symbols"], "symbols"), tuple(_list(said["guards"], "guards")))
    returned = _check_step(step, sizes, types)
    numbers = {symbol.input for symbol in sizes.symbols if symbol.of == "number"}
    check_structure(said["arguments"], {"argument": count, "number": len(numbers)})
    if numbers != set(range(len(numbers))) or numbers_in(said["arguments"]) != numbers:
        raise ArtefactError("numbers of the call are not those of its sizes")
    check_structure(said["results"], {"argument": count, "value": returned}, names)
    for spec in step.inputs:
        there = {"state": spec.name in names, "held": True, "symbol": spec.name in sizes.known}
        there["argument"] = spec.name.isdecimal() and int(spec.name) < count
        if not there.get(spec.source, False):
            raise ArtefactError(f"input {spec.node} is {spec.source} {spec.name[:60]!r}, which is not there")
    return StepContents(
        folder,
        step,
        graphs,
        types,
        operators,
        said["arguments"],
        said["results"],
        count,
        sizes,
        constants,
        Report.from_json(report),
        decode(SavedMemory, memory, where="memory"),
    )


def _check_step(step: SavedStep, sizes: Sizes, types: Sequence[Any]) -> int:
    """Raise ``ArtefactError`` where the parts of a step do not belong together. How many values its program
    returns."""
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
        if len(code.examples) != len(code.trained) or any(not 0 <= n < len(types) for n in code.examples):
            raise ArtefactError(f"program {code.name[:60]!r} has inputs without types")
    for call in step.calls:
        if len(call.args) != len(step.codes[call.code].examples):
            raise ArtefactError("a call gives a program other inputs than it takes")
    looks = step.looks(types)
    for look, _ in looks.values():
        _check_look(look, sizes)
    for symbol in sizes.symbols:
        if symbol.of == "number":
            continue
        spec = step.inputs[symbol.input] if symbol.input < len(step.inputs) else None
        if spec is None or spec.source == "symbol" or "shape" not in looks.get(spec.node, ({},))[0]:
            raise ArtefactError(f"no input tells {symbol.name}")
        if symbol.dim >= len(looks[spec.node][0]["shape"]):
            raise ArtefactError(f"no input tells {symbol.name}: {spec.node} has no dimension {symbol.dim}")
    return len(results) if isinstance(results, (tuple, list)) else 0


def _check_look(look: Any, sizes: Sizes) -> None:
    """Raise ``ArtefactError`` unless ``look`` is the type of a tensor, or a size, of these ``sizes``."""
    if isinstance(look, dict) and list(look) == ["size"]:
        checked_expression(look["size"], sizes.known)
        return
    check_type(look)
    for size in (*look["shape"], *look["stride"]):
        if isinstance(size, dict):
            checked_expression(size["size"], sizes.known)


def _list(data: Any, name: str) -> list[Any]:
    if not isinstance(data, list):
        raise ArtefactError(f"{name} is no list")
    return data


def _all(kind: Any, data: Any, name: str) -> tuple[Any, ...]:
    return tuple(decode(kind, item, where=f"{name}[{k}]") for k, item in enumerate(_list(data, name)))
