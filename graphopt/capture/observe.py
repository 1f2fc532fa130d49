"""Watch one step of several programs: what is made and released between them, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.observed import Gap, ObservedRun, ObservedStep, ObservedStorage

__all__ = ["Observer"]

_MARK = "graphopt::position"

Boxed = Callable[[list[Any]], list[Any]]


@dataclass
class Observer:
    """Wraps the halves of programs; while ``observe`` runs a step it notes each of their runs.

    Memory is that of torch's CPU allocator.
    """

    _runs: list[ObservedRun | None] | None = None
    _saving: bool = True
    _position: int = 0
    _pending: dict[int, int] = field(default_factory=dict)
    _storages: list[ObservedStorage] = field(default_factory=list)
    _held: dict[int, tuple[Any, int]] = field(default_factory=dict)

    def around(
        self, program: int, half: fx.GraphModule, run: Boxed, *, backward: bool, returned: int
    ) -> Boxed:
        """``run``, the code of one half of a program, watched. ``returned``: see ``emit.eager.Around``."""
        names = [node.name for node in half.graph.nodes if node.op == "placeholder"]
        output = next(node for node in reversed(half.graph.nodes) if node.op == "output")
        flat = torch.utils._pytree.tree_leaves(output.args[0])
        results = [value.name if isinstance(value, fx.Node) else "" for value in flat]

        def watched(args: list[Any]) -> list[Any]:
            if self._runs is None:
                return run(args)
            self._advance()
            inputs = self._note(names, args)
            own = len(self._runs)
            forward = self._forward_of(program, inputs) if backward else own
            noted = ObservedRun(program, backward, forward, inputs, {})
            self._runs.append(noted)
            outputs = run(args)
            if not backward:
                self._runs[own] = ObservedRun(program, False, own, inputs, self._note(results, outputs))
                self._pending[own] = program
                if not self._saving:
                    outputs = [*outputs[:returned], *map(_emptied, outputs[returned:])]
            self._advance()
            return outputs

        return _torch.boxed(watched)

    def observe(self, forward: Callable[[], Any], backward: Callable[[Any], object]) -> ObservedStep:
        """Run ``output = forward()`` and ``backward(output)``, and say what that did.

        The forward is run alone too, with no program keeping anything for its backward: what is not
        released then while the output is there is held by something else.
        """
        kept: list[Any] = []

        def step() -> Any:
            output = forward()
            self._pause()
            backward(output)
            return output

        def alone() -> None:
            kept.append(forward())
            self._pause()

        whole = self._watch(step)
        self._saving = False
        try:
            bare = self._watch(alone)
        finally:
            self._saving = True
        end = len(bare.runs)
        if [_returned(run) for run in bare.runs] != [_returned(run) for run in whole.runs[:end]]:
            return whole
        storages = list(whole.storages)
        for number, seen in enumerate(bare.storages):
            if seen.released is not None and storages[number].released is not None:
                storages[number] = replace(storages[number], dropped=seen.released)
        return replace(whole, storages=tuple(storages), bare_gaps=bare.gaps[:end])

    def _watch(self, step: Callable[[], object]) -> ObservedStep:
        self._runs, self._storages, self._position = [], [], 0
        self._pending.clear()
        self._held.clear()
        try:
            events = _torch.record_timeline(step, _MARK)
            self._sweep()
            runs = tuple(self._runs)
            storages = tuple(replace(known, dropped=known.released) for known in self._storages)
            gaps = _gaps(events, len(runs))
            return ObservedStep(runs, gaps, storages, gaps[:0])
        finally:
            self._runs = None
            self._held.clear()

    def _pause(self) -> None:
        """The model has returned: no run, but what was released before is told from what is later."""
        assert self._runs is not None
        self._advance()
        self._runs.append(None)
        self._advance()

    def _advance(self) -> None:
        """Go from a gap into a run or out of it."""
        self._sweep()
        _torch.mark(_MARK)
        self._position += 1

    def _sweep(self) -> None:
        for key, (storage, number) in list(self._held.items()):
            if storage.expired():
                self._storages[number] = replace(self._storages[number], released=self._position)
                del self._held[key]

    def _note(self, names: Sequence[str], values: Sequence[Any]) -> dict[str, int]:
        found = {}
        for name, value in zip(names, values, strict=True):
            if name and isinstance(value, torch.Tensor) and value.layout is torch.strided:
                found[name] = self._number(value.untyped_storage())
        return found

    def _number(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key not in self._held:
            self._held[key] = _torch.weak_storage(storage), len(self._storages)
            self._storages.append(ObservedStorage(storage.nbytes()))
        return self._held[key][1]

    def _forward_of(self, program: int, inputs: dict[str, int]) -> int:
        """The forward run whose backward begins: of those of the program that wait for theirs, the one
        that most of the values saved come from, the latest of equals."""
        runs = self._runs or []
        waiting = [position for position, owner in self._pending.items() if owner == program]
        saved = set(inputs.values())

        def shared(position: int) -> int:
            run = runs[position]
            assert run is not None
            return len(saved & {*run.inputs.values(), *run.outputs.values()})

        found = max(waiting, key=lambda position: (shared(position), position))
        del self._pending[found]
        return found


def _returned(run: ObservedRun | None) -> dict[str, int]:
    return dict(run.outputs) if run is not None else {}


def _emptied(value: Any) -> Any:
    return value.new_empty(0) if isinstance(value, torch.Tensor) else value


def _gaps(events: Sequence[int | None], runs: int) -> tuple[Gap, ...]:
    """Every other stretch between marks (``None``): the runs themselves are simulated."""
    stretches: list[list[int]] = [[]]
    for event in events:
        if event is None:
            stretches.append([])
        else:
            stretches[-1].append(event)
    if len(stretches) != 2 * runs + 1:
        raise RuntimeError(f"{len(stretches)} stretches were recorded around {runs} runs")
    gaps = []
    for stretch in stretches[::2]:
        held = peak = 0
        for event in stretch:
            held += event
            peak = max(peak, held)
        gaps.append(Gap(held, peak))
    return tuple(gaps)
