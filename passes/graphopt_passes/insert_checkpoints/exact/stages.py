"""The problem as linear rows over binaries, one stage of the backward after another.

The backward is cut into stages, each of one slot or of several neighbouring ones. ``held`` says which
storages are there as a stage begins (at the first: which are handed over), ``run`` which operators run
again in it::

    read b in stage j:              held[j, b] + run[j, maker(b)] >= 1
    input b of i:                   held[j, b] + run[j, maker(b)] >= run[j, i]
    there as the next begins:       held[j, b] + run[j, maker(b)] >= held[j + 1, b]
    bytes at each position                                        <= target
    least   sum of seconds(i) * run[j, i]

This is the formulation of Checkmate (Jain et al. 2020) with the forward's and the backward's order given.
Two things make it smaller. What runs again inside a stage does so in any order: instead of a variable for
what each operator may free, bytes are counted where they do not depend on that order. And a stage may hold
several slots: then ``run`` says "at least once", and what is read later in the stage or held at its end
without being made in it is held throughout. With one slot to a stage the rows describe the problem up to
the order inside a slot; with several they are a relaxation, so that its least seconds remain a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["Row", "Stages", "last_needs"]


class Row(NamedTuple):
    """``sum(factor * variable) >= least``, where ``unless`` (a variable) is given only if that is 1.

    Factors are bytes in rows of memory, otherwise 1 and -1.
    """

    variables: tuple[int, ...]
    factors: tuple[int, ...]
    least: int
    unless: int = -1


def last_needs(model: StepModel) -> list[int]:
    """The last slot that reads each storage, or anything that is made from it; -1 for none."""
    last = [-1] * len(model.size)
    for k, slot in enumerate(model.slots):
        for b in slot.reads:
            last[b] = k
    for i in reversed(range(len(model.operators))):
        if model.again[i]:
            until = max((last[b] for b in model.outputs[i] if not model.free[b]), default=-1)
            for b in model.inputs[i]:
                last[b] = max(last[b], until)
    return last


@dataclass
class _Stage:
    """Slots from ``start`` to before ``end``; variables for operators that run again in it, and for
    storages that are held all through it."""

    start: int
    end: int
    run: dict[int, int] = field(default_factory=dict)
    through: dict[int, int] = field(default_factory=dict)


@dataclass
class Stages:
    """Rows for ``model`` within ``target`` bytes above the static base.

    ``starts``: the first slot of each stage, rising from 0. ``at``: the slots inside stages of several at
    which bytes are counted, ``ahead``: the operators of the forward at which they are; all if ``None``.
    ``kept_stays``: what is handed over is held until nothing reads it any more, which the evaluator asks for
    and the problem itself does not.

    ``held[k, b]``: the variable for storage b as slot k, the first of a stage, begins; ``run[k, i]``: that
    for operator i in the stage that begins with slot k. ``impossible`` says that some position cannot be
    within the target under any plan.
    """

    model: StepModel
    target: int
    starts: Sequence[int]
    at: Set[int] | None = None
    ahead: Set[int] | None = None
    kept_stays: bool = False
    costs: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    held: dict[tuple[int, int], int] = field(default_factory=dict)
    run: dict[tuple[int, int], int] = field(default_factory=dict)
    impossible: bool = False

    def __post_init__(self) -> None:
        self._last = last_needs(self.model)
        self._hold()
        borders = pairwise([*self.starts, len(self.model.slots)])
        self._stages = {start: self._stage(start, end) for start, end in borders}
        for stage in self._stages.values():
            self._flow(stage)
            self._levels(stage)
        self._entry()
        if self.kept_stays:
            self._stay()

    def _variable(self, cost: float = 0.0) -> int:
        self.costs.append(cost)
        return len(self.costs) - 1

    def _hold(self) -> None:
        model = self.model
        for k in self.starts:
            for b, until in enumerate(self._last):
                handed = k > 0 or model.savable[b] or not model.again[model.maker[b]]
                if until >= k and not model.free[b] and handed:
                    self.held[k, b] = self._variable()

    def _stage(self, start: int, end: int) -> _Stage:
        model, stage = self.model, _Stage(start, end)
        for i, outputs in enumerate(model.outputs):
            if model.again[i] and any(self._last[b] >= start and not model.free[b] for b in outputs):
                stage.run[i] = self.run[start, i] = self._variable(model.seconds[i])
        return stage

    def _sources(self, stage: _Stage, b: int) -> tuple[int, ...]:
        """Variables of which one is 1 where the storage is there in the stage."""
        found = (self.held.get((stage.start, b)), stage.run.get(self.model.maker[b]))
        return tuple(variable for variable in found if variable is not None)

    def _onward(self, stage: _Stage) -> dict[int, int]:
        """Variables for what is held as the next stage begins."""
        if stage.end == len(self.model.slots):
            return {}
        return {
            b: self.held[stage.end, b] for b in range(len(self.model.size)) if (stage.end, b) in self.held
        }

    def _flow(self, stage: _Stage) -> None:
        model, free = self.model, self.model.free
        slots = model.slots[stage.start : stage.end]
        for b in sorted({b for slot in slots for b in slot.reads if not free[b]}):
            sources = self._sources(stage, b)
            self.rows.append(Row(sources, (1,) * len(sources), 1))
        for i, runs in stage.run.items():
            for b in model.inputs[i]:
                if not free[b]:
                    self._follows(runs, self._sources(stage, b))
        for b, onward in self._onward(stage).items():
            self._follows(onward, self._sources(stage, b))

    def _follows(self, what: int, sources: tuple[int, ...]) -> None:
        self.rows.append(Row((*sources, what), (1,) * len(sources) + (-1,), 0))

    def _levels(self, stage: _Stage) -> None:
        """Bytes at the slots of a stage, and until the next."""
        model, at_next = self.model, self._onward(stage)
        last = model.slots[stage.end - 1]
        reads = {b for b in last.reads if not model.free[b]}
        fixed = model.output_bytes + last.during + sum(model.size[b] for b in reads)
        self._bytes(fixed, [(v, model.size[b]) for b, v in at_next.items() if b not in reads])
        self._bytes(model.output_bytes + last.gap, [(v, model.size[b]) for b, v in at_next.items()])
        later = reads
        for k in reversed(range(stage.start, stage.end - 1)):
            reads = {b for b in model.slots[k].reads if not model.free[b]}
            if self.at is None or k in self.at:
                self._inner(stage, k, reads, later - reads, at_next)
            later = later | reads

    def _inner(
        self, stage: _Stage, k: int, reads: Set[int], later: Set[int], at_next: Mapping[int, int]
    ) -> None:
        """At slot k before the last of its stage: what is needed later and not made here is held."""
        model = self.model
        fixed = model.output_bytes + model.slots[k].during + sum(model.size[b] for b in reads)
        terms = []
        for b in sorted(later):
            fixed += model.size[b]
            runs = stage.run.get(model.maker[b])
            if runs is not None:
                terms.append((runs, -model.size[b]))
        others = ((b, v) for b, v in at_next.items() if b not in reads and b not in later)
        terms += [(self._held_through(stage, b, v), model.size[b]) for b, v in others]
        self._bytes(fixed, terms)

    def _held_through(self, stage: _Stage, b: int, onward: int) -> int:
        """A variable that is 1 where the storage is held at the end of the stage and not made in it."""
        runs = stage.run.get(self.model.maker[b])
        if runs is None:
            return onward
        if b not in stage.through:
            through = stage.through[b] = self._variable()
            self.rows.append(Row((through, onward, runs), (1, -1, 1), 0))
        return stage.through[b]

    def _bytes(self, fixed: int, terms: Sequence[tuple[int, int]], unless: int = -1) -> None:
        room = self.target - fixed
        if unless < 0 and room < sum(min(size, 0) for _, size in terms):
            self.impossible = True
        if sum(max(size, 0) for _, size in terms) > room:
            merged: dict[int, int] = {}
            for variable, size in terms:
                merged[variable] = merged.get(variable, 0) - size
            self.rows.append(Row(tuple(merged), tuple(merged.values()), -room, unless))

    def _entry(self) -> None:
        """The forward, and the moment at which the backward begins."""
        model = self.model
        handed = {b: v for (k, b), v in self.held.items() if k == 0}
        sizes = [(v, model.size[b]) for b, v in handed.items()]
        self._bytes(model.output_bytes + model.opening, sizes)
        count = len(model.operators)
        fixed = [0] * (count + 2)
        for b, maker in enumerate(model.maker):
            if model.only_saved[b]:
                continue
            fixed[maker] += model.size[b]
            fixed[count if model.free[b] else model.last_read[b] + 1] -= model.size[b]
        level = 0
        for position in range(count):
            level += fixed[position]
            if self.ahead is not None and position not in self.ahead:
                continue
            there = [
                (v, model.size[b])
                for b, v in handed.items()
                if model.maker[b] <= position and (model.only_saved[b] or model.last_read[b] < position)
            ]
            self._bytes(level + model.workspace[position], there)

    def _stay(self) -> None:
        model = self.model
        last_read = [-1] * len(model.size)
        for k, slot in enumerate(model.slots):
            for b in slot.reads:
                last_read[b] = k
        for k, stage in self._stages.items():
            for b in range(len(model.size)) if k else ():
                if last_read[b] >= k and (0, b) in self.held:
                    self._follows(self.held[0, b], (self.held[k, b],))
            for i, runs in stage.run.items() if k else ():
                for b in model.inputs[i]:
                    if last_read[b] < k and (0, b) in self.held:
                        self.rows.append(Row((self.held[k, b], self.held[0, b], runs), (1, -1, -1), -1))

    def inside(self, k: int) -> None:
        """Add what an operator that runs again before slot k finds there, whatever ran before it.

        For stages of one slot: its operands, and what is held both as the slot begins and at the slot.
        """
        model, slot = self.model, self.model.slots[k]
        reads = {b for b in slot.reads if not model.free[b]}
        stage = self._stages[k]
        onward = self._onward(stage)
        terms = {b: self.held[k, b] for b in reads if (k, b) in self.held}
        terms |= {b: self._held_through(stage, b, v) for b, v in onward.items() if b not in reads}
        for i, runs in stage.run.items():
            inputs = {b for b in model.inputs[i] if not model.free[b]}
            fixed = model.output_bytes + slot.before + model.workspace_again[i]
            fixed += sum(model.size[b] for b in (*inputs, *model.outputs[i]))
            others = [
                (v, model.size[b]) for b, v in terms.items() if b not in inputs and b not in model.outputs[i]
            ]
            self._bytes(fixed, others, runs)
