"""Liveness of a step that was observed, whatever its programs are run as.

What lies between the programs is as it was seen. The programs' halves are asked for one by one, and
values that they share go with the last that holds them: the plain code around, which was seen to let
go of them, or a backward that reads them, which depends on the schedules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from graphopt.observed import (
    Arrival,
    BackwardHalf,
    Choice,
    Entry,
    ForwardHalf,
    Gap,
    Halves,
    ObservedRun,
    ObservedStep,
    ObservedStorage,
)

__all__ = ["ObservedMemory", "Stretch"]


@dataclass(frozen=True)
class Stretch:
    """A gap between programs (``run`` is ``None``) or a run: bytes ``carried`` into it beside what it holds
    itself, and its ``peak``, above those. ``entry`` is what a backward finds."""

    carried: int
    peak: int
    run: ObservedRun | None = None
    entry: Entry | None = None


@dataclass(frozen=True)
class _Held:
    """Memory of ``bytes`` that goes at position ``until`` (``None``: never) and that the plain code knows
    as the storages ``numbers``; the run ``made`` returned it at ``ports``."""

    bytes: int
    until: int | None
    numbers: frozenset[int]
    ports: frozenset[str] = frozenset()
    made: int = -1


class ObservedMemory:
    """The peak of an observed step; ``granularity`` is what the allocator rounds up to, in bytes.

    The bytes of values that programs return are those that their halves state, which may be laid out
    otherwise than what was seen to run.
    """

    def __init__(self, step: ObservedStep, halves: Halves, *, granularity: int) -> None:
        self.step, self.halves, self.granularity = step, halves, granularity
        self._tracked: dict[int, ObservedStorage] = {}
        self._made: set[int] = set()
        for run in step.runs:
            if run is not None and not run.backward:
                self._made.update(set(run.outputs.values()) - self._tracked.keys() - set(run.inputs.values()))
                for number in (*run.inputs.values(), *run.outputs.values()):
                    self._tracked[number] = step.storages[number]
        answered = {run.forward for run in step.runs if run is not None and run.backward}
        self._abandoned = [
            index
            for index, run in enumerate(step.runs)
            if run is not None and not run.backward and index not in answered
        ]

    def peak(self, choices: Sequence[Choice]) -> int:
        """Peak in bytes above the static base, with a program and a schedule for each of the step's."""
        return max(part.carried + part.peak for part in self.walk(choices))

    def walk(self, choices: Sequence[Choice]) -> Iterator[Stretch]:
        """Gaps and runs of the step in order."""
        forwards = [
            self.halves.forward(*choices[run.program]) if run is not None and not run.backward else None
            for run in self.step.runs
        ]
        gone = self._releases(forwards)
        going: dict[int | None, list[_Held]] = defaultdict(list)
        for item in self._memory(forwards, gone):
            going[item.until].append(item)
        carried = 0
        for position in range(2 * len(self.step.runs) + 1):
            if position % 2 == 0:
                gap = self._gap(position, forwards, gone, going[position])
                yield Stretch(carried, gap.peak)
                carried += gap.net
                continue
            run = self.step.runs[position // 2]
            if run is None:
                continue
            forward = forwards[run.forward]
            assert forward is not None
            taken: list[_Held] = []
            if not run.backward:
                yield Stretch(carried, forward.peak, run)
                carried += forward.saved_bytes + sum(item.bytes for item in forward.returned)
            else:
                read = self._held_by(run.forward, forward)
                taken = [item for item in going[position] if item.numbers & read]
                entry = self._entry(run, position, forward, taken)
                backward: BackwardHalf = self.halves.backward(*choices[run.program], entry)
                carried -= backward.enters
                yield Stretch(carried, backward.peak, run, entry)
                carried += backward.leaves
            carried -= sum(item.bytes for item in going[position] if item not in taken)

    def _releases(self, forwards: Sequence[ForwardHalf | None]) -> dict[int, int | None]:
        """Where each shared storage goes: where it was seen to, or with the last backward that reads it."""
        last: dict[int, int] = {}
        lasting: set[int] = set()
        for index, run in enumerate(self.step.runs):
            if run is not None and run.backward and (forward := forwards[run.forward]) is not None:
                for number in self._held_by(run.forward, forward):
                    last[number] = 2 * index + 1
        for index in self._abandoned:
            forward, until = forwards[index], self._given_up(index)
            assert forward is not None
            for number in self._held_by(index, forward):
                if until is None:
                    lasting.add(number)
                else:
                    last[number] = max(until, last.get(number, 0))
        return {
            number: None
            if seen.released is None or seen.dropped is None or number in lasting
            else max(seen.dropped, last.get(number, 0))
            for number, seen in self._tracked.items()
        }

    def _given_up(self, index: int) -> int | None:
        """Where what a forward keeps for a backward that never runs goes, ``None`` for never. Where it kept
        nothing when it was seen, that is not known: never."""
        positions = [position for position, _ in self._run(index).abandoned]
        known = [position for position in positions if position is not None]
        return max(known) if known and len(known) == len(positions) else None

    def _memory(
        self, forwards: Sequence[ForwardHalf | None], gone: Mapping[int, int | None]
    ) -> Iterator[_Held]:
        """What the shared storages really are: those of gaps as seen, those of programs as their halves
        say."""
        for number in self._tracked.keys() - self._made:
            yield _Held(self._size(number), gone[number], frozenset((number,)))
        for index, (run, forward) in enumerate(zip(self.step.runs, forwards, strict=True)):
            if run is None or forward is None:
                continue
            for item in forward.returned:
                numbers = frozenset(run.outputs[port] for port in item.ports if port in run.outputs)
                times = [gone[number] for number in numbers] or [2 * index + 1]
                until = None if None in times else max(time for time in times if time is not None)
                yield _Held(item.bytes, until, numbers, item.ports, index)
            if index in self._abandoned:
                yield _Held(forward.saved_bytes, self._given_up(index), frozenset())

    def _gap(
        self,
        position: int,
        forwards: Sequence[ForwardHalf | None],
        gone: Mapping[int, int | None],
        going: Sequence[_Held],
    ) -> Gap:
        """A gap in which other memory goes than was seen to."""
        bare = position // 2 < len(self.step.bare_gaps) and {
            number for number, at in gone.items() if at == position
        } == {number for number, known in self._tracked.items() if known.dropped == position}
        gap = self.step.bare_gaps[position // 2] if bare else self.step.gaps[position // 2]
        seen = {
            number
            for number, known in self._tracked.items()
            if (known.dropped if bare else known.released) == position
        }
        # When in the gap something goes was seen only of what went: the rest counts to its end.
        freed = sum(map(self._size, seen))
        frees = sum(item.bytes for item in going)
        in_time = sum(
            min(item.bytes, sum(map(self._size, item.numbers)))
            for item in going
            if item.numbers and item.numbers <= seen
        )
        if not bare:
            # Nothing is kept for a backward where gaps are seen bare.
            for index in self._abandoned:
                run, forward = self._run(index), forwards[index]
                assert forward is not None
                kept = sum(map(self._rounded, (size for at, size in run.abandoned if at == position)))
                freed += kept
                if self._given_up(index) == position:
                    in_time += min(kept, forward.saved_bytes)
        return Gap(gap.net + freed - frees, gap.peak + freed - in_time)

    def _held_by(self, index: int, forward: ForwardHalf) -> frozenset[int]:
        """Shared storages that the backward of a forward run reads."""
        run = self._run(index)
        ports = {**run.outputs, **run.inputs}
        return frozenset(ports[port] for port in forward.held if port in ports)

    def _entry(self, run: ObservedRun, position: int, forward: ForwardHalf, taken: Sequence[_Held]) -> Entry:
        own = self._run(run.forward)
        dying = {
            (port, size)
            for port, number in own.inputs.items()
            if port in forward.held and (size := sum(item.bytes for item in taken if number in item.numbers))
        }
        leaving = {port for item in taken if item.made == run.forward for port in item.ports}
        staying = {port for item in forward.returned for port in item.ports} - leaving
        arriving = [
            # A tangent that was still held afterwards is somebody else's too.
            Arrival(port, number, self._size(number), self.step.storages[number].released != position)
            for port, number in sorted(run.inputs.items())
        ]
        return Entry(frozenset(dying), frozenset(staying), tuple(arriving))

    def _run(self, index: int) -> ObservedRun:
        run = self.step.runs[index]
        assert run is not None
        return run

    def _size(self, number: int) -> int:
        return self._rounded(self.step.storages[number].bytes)

    def _rounded(self, size: int) -> int:
        return -(-size // self.granularity) * self.granularity
