"""One planned step as an artefact holds it: programs by number, calls, inputs, sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.artefact.graphs import program_json
from graphopt.artefact.matching import Callee
from graphopt.artefact.records import Autocast, SavedCode, SavedInput, SavedStep
from graphopt.artefact.seen import SeenCall
from graphopt.artefact.sizes import Sizes, check_results, sizes_of
from graphopt.artefact.state import Tensors
from graphopt.artefact.values import type_json
from graphopt.captured import Captured
from graphopt.chain_rows import draws_random, written_inputs
from graphopt.errors import ArtefactError
from graphopt.program import Program
from graphopt.record_json import encode
from graphopt.schedule import Schedule
from graphopt.session import Session
from graphopt.stored_step import StoredCall, results_text
from graphopt.warm_start import stored_call

if TYPE_CHECKING:
    from graphopt.segmented import SegmentedStep

__all__ = ["Graphs", "StepWriter", "WrittenStep"]

class Graphs:
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
        made = type_json(value)
        if not isinstance(made, dict):
            raise ArtefactError(f"an input of the program is a {type(value).__name__}")
        self.types.append(made)
        return len(self.types) - 1


@dataclass(frozen=True)
class WrittenStep:
    """A step as it is written. ``constants``: names in the file of weights of tensors that the chain
    holds."""

    step: SavedStep
    seen: SeenCall
    sizes: Sizes
    constants: dict[str, str]

    @property
    def json(self) -> dict[str, Any]:
        return {
            "step": encode(self.step),
            "arguments": self.seen.arguments,
            "results": self.seen.results,
            "tensors": len(self.seen.given),
            "symbols": encode(self.sizes.symbols),
            "guards": list(self.sizes.guards),
            "constants": self.constants,
        }

    def callee(self, graphs: Graphs, held: dict[str, torch.Tensor], said: str) -> Callee:
        """How it is called where it is loaded."""
        looks = self.step.looks(graphs.types)
        return Callee(
            self.step, self.seen.arguments, len(self.seen.given), self.sizes, looks, held, said
        )


@dataclass
class StepWriter:
    """Writes step ``number`` of ``session``, which describes it; ``seen`` is a call of it."""

    session: Session
    number: int
    seen: SeenCall
    tensors: Tensors
    graphs: Graphs

    def written(self, training: bool) -> WrittenStep:
        """The step; ``training``: the mode of the model. Raises ``ArtefactError``."""
        from graphopt.segmented import SegmentedStep

        assert self.seen.ran is not None
        made = self.seen.ran.step
        if isinstance(made, SegmentedStep):
            return self._chain(made, training)
        assert made is not None
        self._check_present([made])
        nodes = [node for node in made.semantic.graph.nodes if node.op == "placeholder"]
        names = tuple(node.name for node in nodes)
        examples = [
            _example(node.meta.get("val"), value)
            for node, value in zip(nodes, self.seen.inputs, strict=True)
        ]
        sizes = self._sizes(examples, [made])
        outputs = _flat_results(made.semantic.gm)
        outs = tuple(f"result_{k}" for k in range(len(outputs)))
        call = StoredCall(0, names, outs, (), tuple(written_inputs(made)), draws_random(made))
        trained = tuple(isinstance(x, torch.Tensor) and x.requires_grad for x in self.seen.inputs)
        code = self._code(made, examples, trained, whole=True)
        results = json.dumps({"list": [{"value": name} for name in outs]}, separators=(",", ":"))
        step = self._record(training, [made], names, examples, (call,), (code,), (), results)
        return WrittenStep(step, self.seen, sizes, {})

    def _chain(self, made: SegmentedStep, training: bool) -> WrittenStep:
        self._check_present(made.captured)
        runner = made.runner
        assert runner is not None
        known: dict[str, Any] = {}
        numbers: dict[Any, int] = {}
        codes: list[SavedCode] = []
        calls: list[StoredCall] = []
        for k, (call, captured) in enumerate(zip(made.chain.calls, made.captured, strict=True)):
            assert captured.point is not None
            segment = made.chain.segments[call.segment]
            for name, example in zip(call.args, segment.example_inputs(), strict=True):
                known.setdefault(name, example)
            key = call.segment, captured.point.alternative, captured.schedule
            if key not in numbers:
                numbers[key] = len(codes)
                codes.append(self._code(captured, segment.example_inputs(), segment.trained, whole=False))
            calls.append(stored_call(runner, k, call, numbers[key]))
        constants = {}
        for name, tensor in made.chain.constants.items():
            if not isinstance(tensor, torch.Tensor):
                raise ArtefactError(f"the program holds a {type(tensor).__name__} as {name}")
            constants[name] = self.tensors.hold(tensor, f"chain.{self.number}.{name}")
        try:
            results = results_text(made.chain.results)
        except TypeError as error:
            raise ArtefactError(str(error)) from None
        examples = [known.get(name, made.sizes.get(name)) for name in made.chain.inputs]
        sizes = self._sizes(examples, [*made.kinds, *made.captured])
        names, group = tuple(constants), made.captured
        step = self._record(
            training, group, made.chain.inputs, examples, tuple(calls), tuple(codes), names, results
        )
        return WrittenStep(step, self.seen, sizes, constants)

    def _sizes(self, examples: Sequence[Any], group: Sequence[Captured]) -> Sizes:
        sizes = sizes_of(examples, _values(group), self.seen.arguments)
        if sizes.symbols:
            check_results(self.seen.results)
        return sizes

    def _check_present(self, group: Sequence[Captured]) -> None:
        current = self.session.current
        if len(group) != len(current) or any(a is not b for a, b in zip(group, current, strict=True)):
            raise ArtefactError(f"{group[0].name} was planned once more after it was captured")

    def _record(
        self,
        training: bool,
        group: Sequence[Captured],
        inputs: Sequence[str],
        examples: Sequence[Any],
        calls: tuple[StoredCall, ...],
        codes: tuple[SavedCode, ...],
        constants: tuple[str, ...],
        results: str,
    ) -> SavedStep:
        session = self.session
        assert self.seen.ran is not None
        example = session.steps[self.number].example
        assert example is not None
        casts = tuple(Autocast(c.kind, c.enabled, str(c.dtype)[6:]) for c in example.state.casts)
        return SavedStep(
            session.emitter.name,
            group[0].mode,
            training,
            tuple(self._inputs(inputs, examples)),
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

    def _inputs(self, names: Sequence[str], examples: Sequence[Any]) -> list[SavedInput]:
        places = {id(tensor): k for k, tensor in enumerate(self.seen.given)}
        found = []
        for node, value, example in zip(names, self.seen.inputs, examples, strict=True):
            if not isinstance(value, torch.Tensor):
                symbol = _torch.expression_form(example) if isinstance(example, torch.SymInt) else None
                if not isinstance(symbol, str):
                    raise ArtefactError(
                        f"input {node} of the program is a {type(value).__name__}, and no size of a tensor"
                    )
                found.append(SavedInput(node, "symbol", symbol, False))
                continue
            if id(value) in self.seen.state:
                source, name = "state", self.seen.state[id(value)]
            elif id(value) in places:
                source, name = "argument", str(places[id(value)])
            else:
                source, name = "held", self.tensors.hold(value, f"held.{self.number}.{node}")
            found.append(SavedInput(node, source, name, value.requires_grad))
        storages = [
            _torch.storage_key(v) for v in self.seen.inputs if isinstance(v, torch.Tensor) and v.numel()
        ]
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


def _example(fake: Any, value: Any) -> Any:
    """What an input looks like: as it was traced where sizes of it are symbols."""
    if isinstance(fake, torch.SymInt):
        return fake
    if isinstance(fake, torch.Tensor) and any(
        isinstance(size, torch.SymInt) for size in (*fake.shape, *fake.stride())
    ):
        return fake
    return value


def _values(group: Sequence[Captured]) -> list[Any]:
    """All values of the programs of ``group``."""
    graphs = {
        id(gm): gm
        for captured in group
        for gm in (captured.semantic.gm, captured.joint and captured.joint.gm, *captured.lowered)
        if gm is not None
    }
    return [node.meta.get("val") for gm in graphs.values() for node in gm.graph.nodes]
