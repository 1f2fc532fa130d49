"""What an artefact says of a step, as frozen records: checked field by field when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.chain_plan import Rerun
from graphopt.explanation import MemoryExplanation
from graphopt.pareto_front import ParetoPoint
from graphopt.schedule import Schedule
from graphopt.stored_step import StoredCall

__all__ = [
    "Autocast",
    "MadeFor",
    "SavedCode",
    "SavedInput",
    "SavedMemory",
    "SavedOperator",
    "SavedState",
    "SavedStep",
]


@dataclass(frozen=True)
class MadeFor:
    """Where an artefact runs. ``kind``: ``"cpu"`` or ``"cuda"``; ``capability``: the instruction set of the
    machine (``"x86_64"``), or that of the GPU (``"9.0"``); ``vectors``: which vectors the CPU computes with,
    ``name``: what the GPU is called."""

    kind: str
    capability: str
    vectors: str
    name: str


@dataclass(frozen=True)
class SavedOperator:
    """An operator that graphs call and torch does not have; ``plugin`` and ``distribution`` provide it, where
    that is known."""

    name: str
    plugin: str
    distribution: str


@dataclass(frozen=True)
class SavedState:
    """A parameter or buffer. ``path``: its dotted name in the model, ``key`` that in its ``state_dict``,
    ``""`` where it is not in there; ``tensor``: its name in the file of weights, which tied ones share.
    ``stride`` is that in memory."""

    path: str
    key: str
    tensor: str
    parameter: bool
    trained: bool
    stride: tuple[int, ...]
    device: str


@dataclass(frozen=True)
class SavedInput:
    """An input of the whole program, by position. ``source``: ``"state"``, ``"argument"``, ``"held"`` (a
    tensor that the model had elsewhere) or ``"symbol"`` (a size); ``name``: path of the state, number of the
    argument, name in the file of weights, or of the symbol."""

    node: str
    source: str
    name: str
    trained: bool


@dataclass(frozen=True)
class SavedCode:
    """A program that is compiled once. ``semantic``, ``joint`` and ``lowered``: numbers of its graphs.
    ``traced``: fingerprint of what AOTAutograd makes of the semantic program; ``rewritten``: whether passes
    changed that into the joint program. ``examples``: numbers of the types of its inputs, ``trained``: which
    of them gradients flow to, ``parameters``: which are parameters. ``held``: every gradient of these is
    there when a step begins. ``whole``: a whole model, not a segment of a chain."""

    name: str
    mode: str
    whole: bool
    semantic: int
    joint: int
    lowered: tuple[int, ...]
    traced: str
    rewritten: bool
    schedule: Schedule
    examples: tuple[int, ...]
    trained: tuple[bool, ...]
    parameters: tuple[int, ...]
    held: bool


@dataclass(frozen=True)
class Autocast:
    """What autocast did on a kind of device while programs were traced. ``dtype``: ``"bfloat16"``."""

    kind: str
    enabled: bool
    dtype: str


@dataclass(frozen=True)
class SavedStep:
    """A planned and compiled step. ``calls`` run the ``codes`` on values by name, ``inputs`` first; ``names``
    are those of the programs, one a call. ``results``: what the chain returns, as
    ``stored_step.results_text`` writes it. ``lowered``: which calls show how their code was lowered.
    ``training``: the mode of the model; ``detached``: results of the program that autograd does not see;
    ``static_bytes`` are held whatever the plan."""

    emit: str
    mode: str
    training: bool
    inputs: tuple[SavedInput, ...]
    calls: tuple[StoredCall, ...]
    codes: tuple[SavedCode, ...]
    names: tuple[str, ...]
    lowered: tuple[bool, ...]
    constants: tuple[str, ...]
    results: str
    reruns: tuple[Rerun, ...]
    autocast: tuple[Autocast, ...]
    detached: tuple[int, ...]
    static_bytes: int
    weight_bytes: int
    held_gradient_bytes: int
    random: bool

    def looks(self, types: Sequence[Any]) -> dict[str, tuple[Any, bool]]:
        """What inputs of the whole program look like, by node, and whether gradients flow to them; ``types``
        are those that codes number."""
        found: dict[str, tuple[Any, bool]] = {}
        given = {spec.node: spec for spec in self.inputs}
        for call in self.calls:
            for name, number in zip(call.args, self.codes[call.code].examples, strict=True):
                if name in given:
                    found.setdefault(name, (types[number], given[name].trained))
        return found


@dataclass(frozen=True)
class SavedMemory:
    """What holds the peak of a step, and plans of other peaks."""

    explanation: MemoryExplanation
    frontier: tuple[ParetoPoint, ...]
