"""What one step of several programs did around them, as it was seen to run.

Between the programs of a model that is not one graph lies what runs as it did: values are made and
released there, a program may be called more than once, and what one program returns goes when the
last that reads it is through. The liveness of a whole step under other schedules follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from graphopt.cost import MemoryProfile
from graphopt.program import Program
from graphopt.schedule import Schedule

__all__ = [
    "Arrival",
    "BackwardHalf",
    "Choice",
    "Entry",
    "ForwardHalf",
    "Gap",
    "Halves",
    "ObservedRun",
    "ObservedStep",
    "ObservedStorage",
    "Ports",
    "Returned",
    "StepMemory",
]

Choice = tuple[Program, Schedule]
"""What one program of a step is run as: itself or a form of it, and a schedule."""


@dataclass(frozen=True)
class Gap:
    """A stretch between two runs of programs: bytes that it adds (``net``) and reaches (``peak``), both
    above what is held as it begins."""

    net: int
    peak: int


@dataclass(frozen=True)
class ObservedStorage:
    """Memory that one run read or returned.

    ``released`` is the position in the step (gap ``i`` is at ``2 i``, run ``i`` at ``2 i + 1``) at which
    nobody held it any more; ``None``: held to the end. ``dropped`` is the position up to which something
    besides the programs held it: it goes there unless a backward to come reads it.
    """

    bytes: int
    released: int | None = None
    dropped: int | None = None


@dataclass(frozen=True)
class ObservedRun:
    """One half of a program, run once. ``program`` counts the programs; ``forward`` is the position
    among the runs of the forward that this belongs to (its own, for a forward). ``inputs`` and
    ``outputs`` map ports (``Ports``) to storages: what a forward reads and returns, the tangents of a
    backward. ``abandoned``: of a forward whose backward never ran, (position, bytes) of what it had kept
    for that and where it was let go, ``None`` for what was held to the end; 0 bytes where others held it
    too."""

    program: int
    backward: bool
    forward: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    abandoned: tuple[tuple[int | None, int], ...] = ()

    def at_ports(self, ports: Ports, program: int) -> ObservedRun:
        """The same with names of nodes replaced by ``ports``, and another number for the program."""
        entering = ports.tangents if self.backward else ports.inputs
        return ObservedRun(
            program,
            self.backward,
            self.forward,
            {entering[name]: storage for name, storage in self.inputs.items() if name in entering},
            {port: self.outputs[name] for name, port in ports.outputs if name in self.outputs},
            self.abandoned,
        )


@dataclass(frozen=True)
class ObservedStep:
    """Runs in execution order, one more gap than runs around them, storages that runs share.

    Where the model returns a run is ``None``. ``bare_gaps`` are the gaps before that as they are while
    no program keeps anything for its backward: what was ``dropped`` in them goes there.
    """

    runs: tuple[ObservedRun | None, ...]
    gaps: tuple[Gap, ...]
    storages: tuple[ObservedStorage, ...]
    bare_gaps: tuple[Gap, ...] = ()

    def calls(self, program: int) -> int:
        """How often the forward of a program runs."""
        return sum(run is not None and run.program == program and not run.backward for run in self.runs)


@dataclass(frozen=True)
class Ports:
    """The ends of a program by which its forms are alike, whatever their nodes are called.

    ``inputs``: port of each node that the forward reads, ``tangents`` those of the backward alone;
    ``outputs``: (node, port) of what the forward returns. A code generator that writes to inputs within
    the program returns nothing for them.
    """

    inputs: Mapping[str, str]
    tangents: Mapping[str, str]
    outputs: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, program: Program) -> Ports:
        signature = program.signature
        entering = [spec.node for spec in signature.inputs if spec.role != "tangent"]
        given = [spec.node for spec in signature.outputs if spec.role == "output"]
        written = [spec.node for spec in signature.outputs if spec.role == "mutation"]
        # Counted from the end: some traces return written inputs first, some nothing for them.
        return cls(
            {node: f"in {k - len(entering)}" for k, node in enumerate(entering)},
            {spec.node: f"tangent {k}" for k, spec in enumerate(signature.by_role("tangent"))},
            (
                *((node, f"out {k - len(given)}") for k, node in enumerate(given)),
                *((node, f"written {k}") for k, node in enumerate(written)),
            ),
        )

    def returned(self, node: str) -> list[str]:
        """Ports of the outputs that are ``node``."""
        return [port for name, port in self.outputs if name == node]


@dataclass(frozen=True)
class Returned:
    """New memory of ``bytes`` that a forward returns at ``ports``."""

    bytes: int
    ports: frozenset[str]


@dataclass(frozen=True)
class ForwardHalf:
    """One forward under one schedule: bytes above its inputs at the ``peak``, what it ``returned``, the
    ``saved_bytes`` besides, the ports of inputs and outputs whose memory is ``held`` for the backward."""

    peak: int
    saved_bytes: int
    returned: tuple[Returned, ...]
    held: frozenset[str]


@dataclass(frozen=True)
class Arrival:
    """A tangent: ``storage`` tells those in one storage apart from others (``None``: not seen), ``bytes``
    of it; somebody else holds it too where it is ``lasting``."""

    port: str
    storage: int | None
    bytes: int
    lasting: bool


@dataclass(frozen=True)
class Entry:
    """What one backward finds: ``dying`` inputs of the forward (port, bytes) that go within it, outputs
    of the forward that are read and ``staying``, and the ``tangents``."""

    dying: frozenset[tuple[str, int]]
    staying: frozenset[str]
    tangents: tuple[Arrival, ...]


@dataclass(frozen=True)
class BackwardHalf:
    """One backward: bytes that it finds and takes over (``enters``), reaches and leaves behind."""

    enters: int
    peak: int
    leaves: int


class Halves(Protocol):
    """Memory of both halves of programs, each by itself."""

    def forward(self, program: Program, schedule: Schedule) -> ForwardHalf: ...

    def backward(self, program: Program, schedule: Schedule, entry: Entry) -> BackwardHalf: ...


class StepMemory(Protocol):
    """Liveness of an observed step, what each of its programs runs as being chosen."""

    def peak(self, choices: Sequence[Choice]) -> int:
        """Peak in bytes above the static base."""
        ...

    def profile(self, choices: Sequence[Choice], *, base_bytes: int = 0) -> MemoryProfile:
        """Bytes over the whole step, ``base_bytes`` added to every point."""
        ...
