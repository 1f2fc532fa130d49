"""Exact storage-level liveness of a step: what the allocator holds while each node runs.

A storage lives from the node that makes it to the last use of any value that refers to it
(views included). Outputs of a node are allocated while its inputs are still held. Everything is
per execution: a node that runs again makes new storages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.fx as fx

from graphopt.cost import LiveTensor, MemoryProfile, MemoryStep
from graphopt.program import Program, layer_of
from graphopt.replay import random_state_of
from graphopt.schedule import Schedule
from graphopt.values import Leaf, value_table

__all__ = ["STATIC", "Half", "Simulator", "profile"]

STATIC = -1
"""Buffer number of whatever belongs to the graph's inputs: it is in the base, not counted here."""


def profile(
    step: Sequence[tuple[Program, Schedule]],
    *,
    base_bytes: int = 0,
    granularity: int = 1,
    workspace: Callable[[fx.Node], int] | None = None,
) -> MemoryProfile:
    """Live bytes over a whole step: forwards in call order, then backwards in reverse.

    ``base_bytes`` is what is held throughout (parameters, buffers, inputs). Outputs of each
    program are held until its own backward has ended, those of the last until the step has, as a
    caller who keeps them does. Sizes are rounded up to ``granularity``. ``workspace`` gives a
    node's transient bytes within its kernel.
    """
    steps: list[MemoryStep] = []
    peak: MemoryStep | None = None
    peak_half: tuple[Half, int] | None = None
    carried = base_bytes
    simulators = [Simulator(program, schedule, granularity) for program, schedule in step]

    def record(simulator: Simulator, half: Half) -> None:
        nonlocal peak, peak_half
        for index, (name, live) in enumerate(zip(half.names, half.live, strict=True)):
            node = simulator.nodes.get(name)
            extra = workspace(node) if workspace and node is not None and node.op == "call_function" else 0
            if half.phase == "backward":
                extra += simulator.generator_bytes(name)
            entry = MemoryStep(simulator.program.name, half.phase, name, carried + live + extra)
            steps.append(entry)
            if peak is None or entry.bytes > peak.bytes:
                peak, peak_half = entry, (half, index - 1)

    forwards = []
    for simulator in simulators:
        half = simulator.forward()
        record(simulator, half)
        carried += half.kept_bytes
        forwards.append(half)
    retained = carried - base_bytes
    handed = 0
    for simulator, forward in zip(reversed(simulators), reversed(forwards), strict=True):
        if not simulator.schedule.backward:
            continue
        # Gradients of activations arrive as tangents of the programs that made those.
        arriving = min(handed, simulator.tangent_bytes())
        handed -= arriving
        carried -= forward.kept_bytes + arriving
        half = simulator.backward(forward)
        record(simulator, half)
        is_last = simulator is simulators[-1]
        carried += half.kept_bytes if is_last else simulator.bytes_of(simulator.gradients, half)
        handed += simulator.bytes_of(simulator.handed, half)
    held = peak_half[0].held_at(peak_half[1], simulators) if peak_half else ()
    return MemoryProfile(
        peak.bytes if peak else base_bytes, tuple(steps), peak, held, retained, carried - base_bytes
    )


@dataclass
class Half:
    """Buffers of one half: alive from ``born`` to ``last`` (positions in ``order``; -1 is entry)."""

    program: str
    phase: str
    order: Sequence[str]
    values: dict[str, list[int]]
    born: dict[int, int]
    last: dict[int, int]
    owner: dict[int, str]
    sizes: list[int]
    kept: set[int]

    @property
    def names(self) -> list[str]:
        return ["entry", *self.order]

    @property
    def kept_bytes(self) -> int:
        return sum(self.sizes[buffer] for buffer in self.kept)

    @property
    def live(self) -> list[int]:
        change = [0] * (len(self.order) + 3)
        for buffer, start in self.born.items():
            change[start + 1] += self.sizes[buffer]
            change[self.last[buffer] + 2] -= self.sizes[buffer]
        live, running = [], 0
        for delta in change[: len(self.order) + 1]:
            running += delta
            live.append(running)
        return live

    def held_at(self, position: int, simulators: Sequence[Simulator]) -> tuple[LiveTensor, ...]:
        simulator = next(s for s in simulators if s.program.name == self.program)
        alive = [b for b, start in self.born.items() if start <= position <= self.last[b]]
        held = [simulator.describe(self.owner[b], self.sizes[b]) for b in alive]
        return tuple(sorted((h for h in held if h.bytes), key=lambda h: (-h.bytes, h.node)))


class Simulator:
    """Runs both halves of one program without running it."""

    def __init__(
        self,
        program: Program,
        schedule: Schedule,
        granularity: int,
        table: Mapping[str, tuple[Leaf, ...]] | None = None,
    ) -> None:
        self.program, self.schedule, self.granularity = program, schedule, granularity
        self.table = value_table(program.graph) if table is None else table
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.sizes: list[int] = []
        signature = program.signature
        self.outputs = [spec.node for spec in signature.outputs if spec.role == "output"]
        self.mutations = [spec.node for spec in signature.outputs if spec.role == "mutation"]
        self.gradients = [spec.node for spec in signature.outputs if spec.role == "gradient"]
        self.inputs = {spec.node: [STATIC] * len(self.table[spec.node]) for spec in signature.inputs}
        self.handed = signature.gradients_of("activation")
        self.tangents = [spec.node for spec in signature.by_role("tangent")]

    def forward(self) -> Half:
        lasting = [*self.outputs, *self.schedule.saved]
        half = self.run("forward", self.inputs, self.schedule.forward, [*lasting, *self.mutations], ())
        # New values of mutated inputs are copied to them as the forward ends, and are gone then.
        half.kept.intersection_update(b for name in lasting for b in half.values.get(name, ()))
        return half

    def backward(self, forward: Half) -> Half:
        entry = dict(self.inputs)
        for name in self.schedule.saved:
            entry[name] = forward.values[name]
        for name in self.tangents:
            entry[name] = [self.new(leaf.bytes) for leaf in self.table[name]]
        held = {b for name in self.outputs for b in forward.values.get(name, ()) if b != STATIC}
        # Whoever calls backward() on a loss holds the one that it starts from until it returns.
        held.update(
            b for name in self.tangents if not self.nodes[name].meta["val"].dim() for b in entry[name]
        )
        half = self.run("backward", entry, self.schedule.backward, self.gradients, held)
        for buffer in held & forward.owner.keys():
            half.owner.setdefault(buffer, forward.owner[buffer])
        return half

    def describe(self, name: str, size: int) -> LiveTensor:
        role = "activation"
        if name in self.tangents:
            role = "tangent"
        elif name in self.gradients:
            role = "gradient"
        elif name in self.outputs:
            role = "output"
        return LiveTensor(name, size, layer_of(self.nodes[name]) if name in self.nodes else "", role)

    def bytes_of(self, names: Iterable[str], half: Half) -> int:
        """Bytes of the distinct buffers of some values that ``half`` leaves behind."""
        buffers = {b for name in names for b in half.values.get(name, ()) if b != STATIC}
        return sum(self.sizes[b] for b in buffers)

    def tangent_bytes(self) -> int:
        return sum(self.rounded(leaf.bytes) for name in self.tangents for leaf in self.table[name])

    def generator_bytes(self, name: str) -> int:
        """Where a random operator is replayed, the generator's own state is put aside meanwhile."""
        node = self.nodes.get(name)
        state = random_state_of(node) if node is not None else None
        return self.rounded(self.table[state.name][0].bytes) if state is not None else 0

    def rounded(self, size: int) -> int:
        return -(-size // self.granularity) * self.granularity

    def new(self, size: int) -> int:
        self.sizes.append(self.rounded(size))
        return len(self.sizes) - 1

    def run(
        self,
        phase: str,
        entry: dict[str, list[int]],
        order: Sequence[str],
        keep: Iterable[str],
        held: Iterable[int],
        static: Collection[int] = (),
    ) -> Half:
        """``keep`` names what outlives the half; ``held`` are buffers held throughout by others; those
        in ``static`` are counted elsewhere."""
        values = {name: list(refs) for name, refs in entry.items()}
        born: dict[int, int] = {}
        last: dict[int, int] = {}
        owner: dict[int, str] = {}
        for name, refs in entry.items():
            for buffer in refs:
                born[buffer] = last[buffer] = -1
                owner.setdefault(buffer, name)
        for position, name in enumerate(order):
            node = self.nodes[name]
            for source in node.all_input_nodes:
                for buffer in values.get(source.name, ()):
                    last[buffer] = position
            refs = []
            for leaf in self.table[name]:
                if leaf.alias is not None:
                    origin = refs if leaf.alias[0] == name else values[leaf.alias[0]]
                    buffer = origin[leaf.alias[1]]
                elif node.op == "call_function":
                    buffer = self.new(leaf.bytes)
                    born[buffer], owner[buffer] = position, name
                else:
                    buffer = STATIC
                last[buffer] = position
                refs.append(buffer)
            values[name] = refs
        kept = {buffer for name in keep for buffer in values.get(name, ())} | set(held)
        for buffer in kept:
            born.setdefault(buffer, -1)
            last[buffer] = len(order)
        for mapping in (born, last, owner):
            for buffer in (STATIC, *static):
                mapping.pop(buffer, None)
        kept.difference_update((STATIC, *static))
        return Half(self.program.name, phase, order, values, born, last, owner, self.sizes, kept)
