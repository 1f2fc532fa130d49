"""Exact liveness of a step that was observed, under any schedules of its programs.

What lies between the programs is as it was seen. The programs themselves are simulated, and values
that they share go with the last that holds them: the plain code around, which was seen to let go of
them, or a backward that reads them, which depends on the schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.fx as fx

from graphopt.cost import LiveTensor, MemoryProfile, MemoryStep
from graphopt.observed import Gap, ObservedRun, ObservedStep, ObservedStorage
from graphopt.program import Program
from graphopt.schedule import Schedule
from graphopt.values import value_table
from graphopt_cost_model.liveness import STATIC, Half, Simulator

__all__ = ["ObservedMemory"]


@dataclass(frozen=True)
class _Forward:
    """One forward under one schedule. ``held``: inputs and outputs whose memory the backward reads."""

    simulator: Simulator
    half: Half
    live: Sequence[int]
    held: frozenset[str]
    peak: int


@dataclass(frozen=True)
class _Backward:
    """One backward. ``enters``: bytes of what it finds and takes over, saved values and tangents."""

    simulator: Simulator
    half: Half
    live: Sequence[int]
    enters: int
    peak: int


class ObservedMemory:
    """Implements ``graphopt.observed.StepMemory`` for op-by-op execution."""

    def __init__(
        self,
        programs: Sequence[Program],
        step: ObservedStep,
        *,
        granularity: int,
        workspace: Callable[[fx.Node], int] | None,
    ) -> None:
        self.programs, self.step = programs, step
        self.granularity, self.workspace = granularity, workspace
        self._tables = [value_table(program.graph) for program in programs]
        self._forwards: dict[tuple[int, Schedule], _Forward] = {}
        self._backwards: dict[Hashable, _Backward] = {}
        self._tracked = self._shared_storages()

    def peak(self, schedules: Sequence[Schedule]) -> int:
        return max(
            carried + (part if isinstance(part, int) else part.peak)
            for carried, part in self._walk(schedules)
        )

    def profile(self, schedules: Sequence[Schedule], *, base_bytes: int = 0) -> MemoryProfile:
        steps: list[MemoryStep] = []
        peak: MemoryStep | None = None
        alive: tuple[LiveTensor, ...] = ()
        phase = "forward"
        for carried, part in self._walk(schedules):
            carried += base_bytes
            if isinstance(part, int):
                entries = [MemoryStep("", phase, "between programs", carried + part)]
            else:
                name, phase = part.half.program, part.half.phase
                entries = [
                    MemoryStep(name, phase, node, carried + live)
                    for node, live in zip(part.half.names, part.live, strict=True)
                ]
            steps += entries
            top = max(range(len(entries)), key=lambda k: entries[k].bytes)
            if peak is None or entries[top].bytes > peak.bytes:
                peak = entries[top]
                alive = () if isinstance(part, int) else part.half.held_at(top - 1, [part.simulator])
        return MemoryProfile(peak.bytes if peak else base_bytes, tuple(steps), peak, alive)

    def _shared_storages(self) -> dict[int, ObservedStorage]:
        """Storages that forwards read or return, by number."""
        found: dict[int, ObservedStorage] = {}
        for run in self.step.runs:
            if run is None or run.backward:
                continue
            signature = self.programs[run.program].signature
            returned = {spec.node for spec in signature.outputs if spec.role != "gradient"}
            for number in (*run.inputs.values(), *(run.outputs[n] for n in returned & run.outputs.keys())):
                found[number] = self.step.storages[number]
        return found

    def _walk(self, schedules: Sequence[Schedule]) -> Iterator[tuple[int, int | _Forward | _Backward]]:
        """Gaps (bytes that one reaches) and runs in order, each with the bytes held besides."""
        gone = self._releases(schedules)
        carried = 0
        for position in range(2 * len(self.step.runs) + 1):
            if position % 2 == 0:
                gap = self._gap(position, gone)
                yield carried, gap.peak
                carried += gap.net
                continue
            run = self.step.runs[position // 2]
            if run is None:
                continue
            schedule = schedules[run.program]
            forward = self._forward(run.program, schedule)
            inside: frozenset[int] = frozenset()
            if not run.backward:
                yield carried, forward
                carried += forward.half.kept_bytes
            else:
                inside = frozenset(n for n in self._held_by(run.forward, schedule) if gone.get(n) == position)
                backward = self._backward(run, position, schedule, inside)
                carried -= backward.enters
                yield carried, backward
                carried += backward.half.kept_bytes
            carried -= sum(
                self._size(number)
                for number in self._tracked
                if gone[number] == position and number not in inside
            )

    def _gap(self, position: int, gone: Mapping[int, int | None]) -> Gap:
        """A gap under schedules with which shared storages go where ``gone`` says."""
        going = {number for number, at in gone.items() if at == position}
        seen = {number for number, known in self._tracked.items() if known.released == position}
        dropped = {number for number, known in self._tracked.items() if known.dropped == position}
        if going == dropped and position // 2 < len(self.step.bare_gaps):
            return self.step.bare_gaps[position // 2]
        gap = self.step.gaps[position // 2]
        # When in the gap something goes was seen only of what went: the rest counts to its end.
        longer = sum(self._size(number) for number in seen - going)
        sooner = sum(self._size(number) for number in going - seen)
        return Gap(gap.net + longer - sooner, gap.peak + longer)

    def _releases(self, schedules: Sequence[Schedule]) -> dict[int, int | None]:
        """Where each shared storage goes: where it was seen to, or with the last backward that reads it."""
        last: dict[int, int] = {}
        for index, run in enumerate(self.step.runs):
            if run is not None and run.backward:
                for number in self._held_by(run.forward, schedules[run.program]):
                    last[number] = 2 * index + 1
        return {
            number: None
            if seen.released is None or seen.dropped is None
            else max(seen.dropped, last.get(number, 0))
            for number, seen in self._tracked.items()
        }

    def _held_by(self, forward: int, schedule: Schedule) -> frozenset[int]:
        """Shared storages that the backward of a forward run reads."""
        run = self._run(forward)
        held = self._forward(run.program, schedule).held
        names = {**run.outputs, **run.inputs}
        return frozenset(number for name in held if (number := names.get(name)) in self._tracked)

    def _run(self, index: int) -> ObservedRun:
        run = self.step.runs[index]
        assert run is not None
        return run

    def _size(self, number: int) -> int:
        size = self.step.storages[number].bytes
        return -(-size // self.granularity) * self.granularity

    def _forward(self, program: int, schedule: Schedule) -> _Forward:
        found = self._forwards.get((program, schedule))
        if found is None:
            simulator = Simulator(self.programs[program], schedule, self.granularity, self._tables[program])
            inputs = [spec.node for spec in self.programs[program].signature.inputs if spec.role != "tangent"]
            # Inputs get buffers of their own, counted elsewhere: what is saved may be a view of them.
            for name in inputs:
                simulator.inputs[name] = [simulator.new(leaf.bytes) for leaf in simulator.table[name]]
            for name in inputs:
                for index, leaf in enumerate(simulator.table[name]):
                    if leaf.alias is not None:
                        source, place = leaf.alias
                        simulator.inputs[name][index] = simulator.inputs[source][place]
            static = {buffer for refs in simulator.inputs.values() for buffer in refs}
            # New values of mutated inputs are among what it returns: they were seen to go afterwards.
            kept = [*_returned(simulator), *schedule.saved]
            half = simulator.run("forward", simulator.inputs, schedule.forward, kept, (), static)
            live = self._live(simulator, half)
            found = _Forward(simulator, half, live, _held(simulator, half), max(live))
            self._forwards[program, schedule] = found
        return found

    def _backward(
        self, run: ObservedRun, position: int, schedule: Schedule, inside: frozenset[int]
    ) -> _Backward:
        """The backward of ``run``; the shared storages ``inside`` go within it, others stay."""
        forward = self._forward(run.program, schedule)
        simulator = forward.simulator
        own = self._run(run.forward)
        dying = frozenset(n for n, number in own.inputs.items() if number in inside and n in forward.held)
        returned = set(_returned(simulator))
        staying = frozenset(
            name for name, number in own.outputs.items() if name in returned and number not in inside
        )
        # A tangent that was still held afterwards is somebody else's too.
        lasting = frozenset(
            name
            for name in simulator.tangents
            if name in run.inputs and self.step.storages[run.inputs[name]].released != position
        )
        shared = tuple(f"{name} {run.inputs.get(name)}" for name in simulator.tangents)
        key = (run.program, schedule, dying | staying, shared, lasting)
        found = self._backwards.get(key)
        if found is None:
            found = self._simulate(run, forward, dying, staying, lasting)
            self._backwards[key] = found
        return found

    def _simulate(
        self,
        run: ObservedRun,
        forward: _Forward,
        dying: frozenset[str],
        staying: frozenset[str],
        lasting: frozenset[str],
    ) -> _Backward:
        simulator = forward.simulator
        own = self._run(run.forward)
        entry = {name: list(refs) for name, refs in simulator.inputs.items()}
        for name in dying:
            for buffer in entry[name]:
                simulator.sizes[buffer] = self._size(own.inputs[name])
        taken = {buffer for name in dying for buffer in entry[name]}
        static = {buffer for refs in simulator.inputs.values() for buffer in refs} - taken
        for name in simulator.schedule.saved:
            entry[name] = forward.half.values[name]
        arrived: dict[int, int] = {}
        for name in simulator.tangents:
            number = run.inputs.get(name)
            if number is None:
                entry[name] = [simulator.new(leaf.bytes) for leaf in simulator.table[name]]
                continue
            if number not in arrived:
                arrived[number] = simulator.new(self._size(number))
            entry[name] = [arrived[number]]
        found = {buffer for refs in entry.values() for buffer in refs} - static - {STATIC}
        held = {b for name in lasting for b in entry[name]}
        held |= found & {b for name in staying for b in forward.half.values[name]}
        order = simulator.schedule.backward
        half = simulator.run("backward", entry, order, simulator.gradients, held, static)
        enters = sum(simulator.sizes[buffer] for buffer in found)
        live = self._live(simulator, half)
        return _Backward(simulator, half, live, enters, max(live))

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


def _held(simulator: Simulator, forward: Half) -> frozenset[str]:
    """Inputs and outputs of a program whose memory the backward reads."""
    saved = {buffer for name in simulator.schedule.saved for buffer in forward.values[name]}
    entry = {**simulator.inputs, **{name: forward.values[name] for name in simulator.schedule.saved}}
    entry |= {name: [STATIC] * len(simulator.table[name]) for name in simulator.tangents}
    half = simulator.run("backward", entry, simulator.schedule.backward, (), ())
    read = {buffer for buffer, position in half.last.items() if position >= 0}
    inputs = {name for name, refs in simulator.inputs.items() if read.union(saved).intersection(refs)}
    returned = {name for name in _returned(simulator) if saved.intersection(forward.values.get(name, ()))}
    return frozenset(inputs | returned)


def _returned(simulator: Simulator) -> list[str]:
    return [*simulator.outputs, *simulator.mutations]
