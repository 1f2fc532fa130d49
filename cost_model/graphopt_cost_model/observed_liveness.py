"""Exact liveness of both halves of programs that run op by op, as parts of a step that was observed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch.fx as fx

from graphopt.cost import LiveTensor, MemoryProfile, MemoryStep
from graphopt.observed import BackwardHalf, Choice, Entry, ForwardHalf, ObservedStep, Ports, Returned
from graphopt.observed_memory import ObservedMemory
from graphopt.program import Program
from graphopt.schedule import Schedule
from graphopt.values import Leaf, value_table
from graphopt_cost_model.liveness import STATIC, Half, Simulator

__all__ = ["SimulatedHalves", "SimulatedStep"]


@dataclass(frozen=True)
class _Forward:
    simulator: Simulator
    half: Half
    live: Sequence[int]
    memory: ForwardHalf


@dataclass(frozen=True)
class _Backward:
    half: Half
    live: Sequence[int]
    memory: BackwardHalf


class SimulatedHalves:
    """Implements ``graphopt.observed.Halves``. ``workspace`` gives a node's transient bytes."""

    def __init__(self, *, granularity: int, workspace: Callable[[fx.Node], int] | None) -> None:
        self.granularity, self.workspace = granularity, workspace
        self._tables: dict[int, tuple[Program, Mapping[str, tuple[Leaf, ...]], Ports]] = {}
        self._forwards: dict[tuple[int, Schedule], _Forward] = {}
        self._backwards: dict[Hashable, _Backward] = {}

    def forward(self, program: Program, schedule: Schedule) -> ForwardHalf:
        return self.simulated_forward(program, schedule).memory

    def backward(self, program: Program, schedule: Schedule, entry: Entry) -> BackwardHalf:
        return self.simulated_backward(program, schedule, entry).memory

    def simulated_forward(self, program: Program, schedule: Schedule) -> _Forward:
        key = id(program), schedule
        found = self._forwards.get(key)
        if found is None:
            found = self._forwards[key] = self._run_forward(program, schedule)
        return found

    def simulated_backward(self, program: Program, schedule: Schedule, entry: Entry) -> _Backward:
        key = id(program), schedule, entry
        found = self._backwards.get(key)
        if found is None:
            found = self._backwards[key] = self._run_backward(program, schedule, entry)
        return found

    def _known(self, program: Program) -> tuple[Program, Mapping[str, tuple[Leaf, ...]], Ports]:
        # The program is kept, so that its id stays its own.
        if id(program) not in self._tables:
            self._tables[id(program)] = program, value_table(program.graph), Ports.of(program)
        return self._tables[id(program)]

    def _run_forward(self, program: Program, schedule: Schedule) -> _Forward:
        _, table, ports = self._known(program)
        simulator = Simulator(program, schedule, self.granularity, table)
        # Inputs get buffers of their own, counted elsewhere: what is saved may be a view of them.
        for name in ports.inputs:
            simulator.inputs[name] = [simulator.new(leaf.bytes) for leaf in simulator.table[name]]
        for name in ports.inputs:
            for index, leaf in enumerate(simulator.table[name]):
                if leaf.alias is not None:
                    source, place = leaf.alias
                    simulator.inputs[name][index] = simulator.inputs[source][place]
        static = {buffer for refs in simulator.inputs.values() for buffer in refs}
        # New values of written inputs are among what it returns: they were seen to go afterwards.
        kept = [*(name for name, _ in ports.outputs), *schedule.saved]
        half = simulator.run("forward", simulator.inputs, schedule.forward, kept, (), static)
        live = self._live(simulator, half)
        at: dict[int, set[str]] = {}
        for name, port in ports.outputs:
            for buffer in half.kept.intersection(half.values.get(name, ())):
                at.setdefault(buffer, set()).add(port)
        returned = tuple(Returned(simulator.sizes[b], frozenset(found)) for b, found in sorted(at.items()))
        saved = sum(simulator.sizes[buffer] for buffer in half.kept - at.keys())
        memory = ForwardHalf(max(live), saved, returned, _held(simulator, half, ports))
        return _Forward(simulator, half, live, memory)

    def _run_backward(self, program: Program, schedule: Schedule, entry: Entry) -> _Backward:
        ports = self._known(program)[2]
        forward = self.simulated_forward(program, schedule)
        simulator = forward.simulator
        values = {name: list(refs) for name, refs in simulator.inputs.items()}
        dying = dict(entry.dying)
        taken: set[int] = set()
        for name, port in ports.inputs.items():
            if port in dying:
                for buffer in values[name]:
                    simulator.sizes[buffer] = dying[port]
                taken.update(values[name])
        static = {buffer for refs in simulator.inputs.values() for buffer in refs} - taken
        for name in simulator.schedule.saved:
            values[name] = forward.half.values[name]
        arriving = {arrival.port: arrival for arrival in entry.tangents}
        arrived: dict[int, int] = {}
        made: set[int] = set()
        held: set[int] = set()
        for name, port in ports.tangents.items():
            arrival = arriving.get(port)
            if arrival is None or arrival.storage is None:
                values[name] = [simulator.new(leaf.bytes) for leaf in simulator.table[name]]
                made.update(values[name])
                continue
            if arrival.storage not in arrived:
                arrived[arrival.storage] = simulator.new(arrival.bytes)
            values[name] = [arrived[arrival.storage]]
            if arrival.lasting:
                held.update(values[name])
        found = {buffer for refs in values.values() for buffer in refs} - static - {STATIC}
        staying = {name for name, port in ports.outputs if port in entry.staying}
        held |= found & {b for name in staying for b in forward.half.values[name]}
        order = simulator.schedule.backward
        half = simulator.run("backward", values, order, simulator.gradients, held, static)
        live = self._live(simulator, half)
        enters = sum(simulator.sizes[buffer] for buffer in found - made)
        return _Backward(half, live, BackwardHalf(enters, max(live), half.kept_bytes))

    def _live(self, simulator: Simulator, half: Half) -> list[int]:
        live = []
        for name, held in zip(half.names, half.live, strict=True):
            node = simulator.nodes.get(name)
            if node is not None and node.op == "call_function" and self.workspace:
                held += self.workspace(node)
            if half.phase == "backward":
                held += simulator.generator_bytes(name)
            live.append(held)
        return live


class SimulatedStep(ObservedMemory):
    """Implements ``graphopt.observed.StepMemory`` for op-by-op execution."""

    halves: SimulatedHalves

    def __init__(self, step: ObservedStep, halves: SimulatedHalves) -> None:
        super().__init__(step, halves, granularity=halves.granularity)

    def profile(self, choices: Sequence[Choice], *, base_bytes: int = 0) -> MemoryProfile:
        steps: list[MemoryStep] = []
        peak: MemoryStep | None = None
        alive: tuple[LiveTensor, ...] = ()
        phase = "forward"
        for part in self.walk(choices):
            carried = part.carried + base_bytes
            if part.run is None:
                entries = [MemoryStep("", phase, "between programs", carried + part.peak)]
                half = None
            else:
                program, schedule = choices[part.run.program]
                ahead = self.halves.simulated_forward(program, schedule)
                ran: _Forward | _Backward = ahead
                if part.entry is not None:
                    ran = self.halves.simulated_backward(program, schedule, part.entry)
                half, phase = ran.half, ran.half.phase
                entries = [
                    MemoryStep(half.program, phase, node, carried + live)
                    for node, live in zip(half.names, ran.live, strict=True)
                ]
            steps += entries
            top = max(range(len(entries)), key=lambda k: entries[k].bytes)
            if peak is None or entries[top].bytes > peak.bytes:
                peak = entries[top]
                alive = half.held_at(top - 1, [ahead.simulator]) if half is not None else ()
        return MemoryProfile(peak.bytes if peak else base_bytes, tuple(steps), peak, alive)


def _held(simulator: Simulator, forward: Half, ports: Ports) -> frozenset[str]:
    """Ports of inputs and outputs of a program whose memory the backward reads."""
    saved = {buffer for name in simulator.schedule.saved for buffer in forward.values[name]}
    entry = {**simulator.inputs, **{name: forward.values[name] for name in simulator.schedule.saved}}
    entry |= {name: [STATIC] * len(simulator.table[name]) for name in simulator.tangents}
    half = simulator.run("backward", entry, simulator.schedule.backward, (), ())
    read = {buffer for buffer, position in half.last.items() if position >= 0}
    inputs = {
        ports.inputs[n]
        for n, refs in simulator.inputs.items()
        if n in ports.inputs and read.union(saved).intersection(refs)
    }
    returned = {port for name, port in ports.outputs if saved.intersection(forward.values.get(name, ()))}
    return frozenset(inputs | returned)
