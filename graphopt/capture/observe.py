"""Watch one step of several programs: what is made and released between them, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.timeline import Timeline
from graphopt.observed import Gap, ObservedRun, ObservedStep, ObservedStorage

__all__ = ["Observer"]

Boxed = Callable[[list[Any]], list[Any]]


@dataclass
class _Kept:
    """What a forward keeps for its backward: ``bytes`` that nothing else holds, 0 for others' memory."""

    weak: Any
    bytes: int
    released: int | None = None


@dataclass
class Observer:
    """Wraps the halves of programs; while ``observe`` runs a step it notes each of their runs.

    ``timeline`` tells the memory that lies between them. ``keeps_graph``: a backward ran, watched or
    not, that kept its graph for another; what it released, and whose backward a later one is, is not told.
    """

    timeline: Timeline
    keeps_graph: bool = False
    _runs: list[ObservedRun | None] | None = None
    _saving: bool = True
    _known: tuple[ObservedRun | None, ...] = ()
    _position: int = 0
    _pending: dict[int, int] = field(default_factory=dict)
    _storages: list[ObservedStorage] = field(default_factory=list)
    _held: dict[int, tuple[Any, int]] = field(default_factory=dict)
    _kept: dict[int, list[_Kept]] = field(default_factory=dict)

    def around(
        self, program: int, half: fx.GraphModule, run: Boxed, *, backward: bool, returned: int
    ) -> Boxed:
        """``run``, the code of one half of a program, watched. ``returned``: see ``emit.eager.Around``."""
        names = [node.name for node in half.graph.nodes if node.op == "placeholder"]
        output = next(node for node in reversed(half.graph.nodes) if node.op == "output")
        flat = torch.utils._pytree.tree_leaves(output.args[0])
        results = [value.name if isinstance(value, fx.Node) else "" for value in flat]
        arriving = [name if "tangents" in name else "" for name in names]

        def watched(args: list[Any]) -> list[Any]:
            self.keeps_graph |= backward and _torch.keeps_graph()
            if self._runs is None:
                return run(args)
            self._advance()
            own = len(self._runs)
            if backward:
                forward = self._forward_of(program, args)
                inputs = self._note(arriving, args)
                self._runs.append(ObservedRun(program, True, forward, inputs, {}))
                outputs = run(args) if self._saving else _standing_in(flat, args)
            else:
                inputs = self._note(names, args)
                self._runs.append(ObservedRun(program, False, own, inputs, {}))
                outputs = run(args)
                self._runs[own] = ObservedRun(program, False, own, inputs, self._note(results, outputs))
                self._pending[own] = program
                if self._saving:
                    outputs = [*outputs[:returned], *self._keep(own, outputs[returned:])]
                else:
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
        self._follow(whole)
        try:
            bare = self._watch(alone)
        finally:
            self._follow(None)
        return _dropping(whole, bare)

    def observe_step(self, step: Callable[[], object], reset: Callable[[], object]) -> ObservedStep:
        """Run ``reset()`` and ``step()``, forwards and backwards in any order, and say what the step did.

        Both are run once more with no program keeping anything for its backward; backwards then yield zeros.
        """
        reset()
        whole = self._watch(step)
        reset()
        self._follow(whole)
        try:
            bare = self._watch(step)
        except IndexError:
            # Led by gradients, which were not there, it took another way.
            return whole
        finally:
            self._follow(None)
        return _dropping(whole, bare)

    def _follow(self, whole: ObservedStep | None) -> None:
        """Keep nothing for backwards, which are those of ``whole``, from now on; ``None``: keep all."""
        self._saving = whole is None
        self._known = () if whole is None else whole.runs

    def _watch(self, step: Callable[[], object]) -> ObservedStep:
        self._runs, self._storages, self._position = [], [], 0
        self._pending.clear()
        self._held.clear()
        self._kept.clear()
        try:
            stretches = self.timeline.record(step)
            self._sweep()
            for own, kept in self._kept.items():
                forward = self._runs[own]
                assert forward is not None
                gone = tuple((item.released, item.bytes) for item in kept)
                self._runs[own] = replace(forward, abandoned=gone)
            runs = tuple(self._runs)
            storages = tuple(replace(known, dropped=known.released) for known in self._storages)
            gaps = _gaps(stretches, len(runs))
            return ObservedStep(runs, gaps, storages, gaps[:0])
        finally:
            self._runs = None
            self._held.clear()
            self._kept.clear()

    def _pause(self) -> None:
        """The model has returned: no run, but what was released before is told from what is later."""
        assert self._runs is not None
        self._advance()
        self._runs.append(None)
        self._advance()

    def _advance(self) -> None:
        """Go from a gap into a run or out of it."""
        self._sweep()
        self.timeline.mark()
        self._position += 1

    def _sweep(self) -> None:
        for key, (storage, number) in list(self._held.items()):
            if storage.expired():
                self._storages[number] = replace(self._storages[number], released=self._position)
                del self._held[key]
        for kept in self._kept.values():
            for item in kept:
                if item.released is None and item.weak.expired():
                    item.released = self._position

    def _keep(self, own: int, values: Sequence[Any]) -> list[Any]:
        """Follow the ``values`` that forward ``own`` keeps for its backward; what autograd is given to hold.

        What it read or returned is others' memory too: of that the tensor alone is followed.
        """
        kept = self._kept[own] = []
        given = list(values)
        seen = set(self._held)
        for k, value in enumerate(values):
            if not _has_storage(value):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                kept.append(_Kept(_torch.weak_storage(storage), storage.nbytes()))
            elif not kept:
                given[k] = value.detach()
                kept.append(_Kept(_torch.weak_tensor(given[k]), 0))
        return given

    def _note(self, names: Sequence[str], values: Sequence[Any]) -> dict[str, int]:
        found = {}
        for name, value in zip(names, values, strict=True):
            if name and _has_storage(value):
                found[name] = self._number(value.untyped_storage())
        return found

    def _number(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key not in self._held:
            self._held[key] = _torch.weak_storage(storage), len(self._storages)
            self._storages.append(ObservedStorage(storage.nbytes()))
        return self._held[key][1]

    def _forward_of(self, program: int, args: Sequence[Any]) -> int:
        """The forward run whose backward begins: of those of the program that wait for theirs, the one
        that most of the values saved come from, the latest of equals."""
        runs = self._runs or []
        if not self._saving:
            known = self._known[len(runs)]
            return known.forward if known is not None else 0
        waiting = [position for position, owner in self._pending.items() if owner == program]
        if not waiting and self.keeps_graph:
            return next(k for k, run in enumerate(runs) if run is not None and run.program == program)
        keys = [x.untyped_storage()._cdata for x in args if _has_storage(x)]
        saved = {self._held[key][1] for key in keys if key in self._held}

        def shared(position: int) -> int:
            run = runs[position]
            assert run is not None
            return len(saved & {*run.inputs.values(), *run.outputs.values()})

        found = max(waiting, key=lambda position: (shared(position), position))
        del self._pending[found]
        self._kept.pop(found, None)
        return found


def _dropping(whole: ObservedStep, bare: ObservedStep) -> ObservedStep:
    """``whole``, and where its storages go while no program keeps anything, if ``bare`` went the same way."""
    end = len(bare.runs)
    if [_ways(run) for run in bare.runs] != [_ways(run) for run in whole.runs[:end]]:
        return whole
    storages = list(whole.storages)
    for number, seen in enumerate(bare.storages):
        if seen.released is not None and storages[number].released is not None:
            storages[number] = replace(storages[number], dropped=seen.released)
    return replace(whole, storages=tuple(storages), bare_gaps=bare.gaps[:end])


def _standing_in(results: Sequence[Any], args: list[Any]) -> list[Any]:
    """Zeros in place of what a backward yields."""
    args.clear()
    found: list[torch.Tensor | None] = []
    for result in results:
        value = result.meta.get("val") if isinstance(result, fx.Node) else None
        if isinstance(value, torch.Tensor):
            size, stride = [[_torch.hint(n) for n in numbers] for numbers in (value.shape, value.stride())]
            made = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
            found.append(made.zero_())
        else:
            found.append(None)
    return found


def _has_storage(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def _ways(run: ObservedRun | None) -> tuple[object, ...]:
    """What tells runs apart."""
    return () if run is None else (run.program, run.backward, run.forward, run.inputs, run.outputs)


def _emptied(value: Any) -> Any:
    return value.new_empty(0) if isinstance(value, torch.Tensor) else value


def _gaps(stretches: Sequence[Gap], runs: int) -> tuple[Gap, ...]:
    """Every other stretch between marks: the runs themselves are simulated."""
    if len(stretches) != 2 * runs + 1:
        raise RuntimeError(f"{len(stretches)} stretches were recorded around {runs} runs")
    return tuple(stretches[::2])
