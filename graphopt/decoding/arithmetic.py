"""What steps of a decoder are predicted to take, and how long parts of prompts may be for it to fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from graphopt import _torch
from graphopt.budget import format_bytes
from graphopt.capture.semantic import semantic_program
from graphopt.cost import Cost
from graphopt.decoding.capture import Uncached, source_shapes
from graphopt.decoding.decoder import MOVED, step_bounds_of
from graphopt.decoding.distance_bias import biased_by
from graphopt.decoding.insert import StepGraph
from graphopt.decoding.options import Generate
from graphopt.decoding.reading import shown_tensors
from graphopt.decoding.recurrence import recurrences_in, shortened
from graphopt.decoding.sites import Site
from graphopt.decoding.states import kept_tensors
from graphopt.decoding.unroll import STRETCH
from graphopt.errors import BudgetError, InputsError, brief
from graphopt.program import InputSpec, Program
from graphopt.schedule import Schedule

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["Arithmetic", "Before", "NoRoom"]

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


AT_ONCE = 512
"""Tokens of a prompt that are to go at once where stores are chosen for the budget: of fewer, prompts would
take many steps, of more, stores would lose much for little time."""


class NoRoom(BudgetError):
    """Not even one token fits the budget beside the stores. ``room``: bytes of stores that do, beside a step
    of some tokens."""

    def __init__(self, message: str, *, room: int, least_bytes: int, budget_bytes: int, hint: str) -> None:
        self.room = room
        super().__init__(message, least_bytes=least_bytes, budget_bytes=budget_bytes, hint=hint)


@dataclass(frozen=True)
class Before:
    """A program that runs once for each source: ``what`` it does, for people, what it is given. ``anyway``:
    without stores it runs as well."""

    name: str
    what: str
    gm: torch.fx.GraphModule
    weights: Mapping[str, torch.Tensor]
    shapes: Shapes
    anyway: bool = False


class Arithmetic:
    """Predicted bytes and seconds of steps of a decoder: ``step`` over ``sites``, rewritten as ``general``,
    ``prompts``, rewritten as ``stretch``: for several rows, where ``general`` is for one;
    ``before``: programs that run once for each source, before the first step, with shapes and dtypes of what
    they are given besides weights, by placeholder."""

    def __init__(
        self,
        uncached: Uncached,
        sites: tuple[Site, ...],
        step: StepGraph,
        general: Program,
        prompts: StepGraph | None,
        stretch: Program | None,
        session: Session,
        options: Generate,
        weight_bytes: int,
        cache_bytes: int,
        before: Sequence[Before] = (),
    ) -> None:
        self.uncached, self.sites, self.step = uncached, sites, step
        self.general, self.prompts, self.stretch = general, prompts, stretch
        self.cost, self.options = session.cost, options
        self.weight_bytes, self.cache_bytes = weight_bytes, cache_bytes
        self.before = before
        device = session.cost.device
        self.base = weight_bytes + cache_bytes + device.workspace_bytes + device.allocator_slack_bytes

    def baseline(self) -> Cost:
        """A token without a cache: the whole sequence again."""
        batch, length = self.options.max_batch, self.options.max_tokens
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict.fromkeys(
            self.uncached.inputs, ((batch, length), torch.int64)
        )
        shapes |= source_shapes(self.uncached, batch)
        weights = self.uncached.weights
        try:
            program = _sized("uncached", shortened(self.uncached.gm, 1), weights, shapes)
            loops = bool(recurrences_in(self.uncached.gm.graph))
            more = program
            if loops:
                more = _sized("uncached", shortened(self.uncached.gm, 2), weights, shapes)
        except (RuntimeError, IndexError) as error:
            raise InputsError(
                f"the model does not take sequences of max_tokens={length} positions: {brief(error)}"
            ) from error
        base = self.base - self.cache_bytes
        cost = self._cost(program, base, 0)
        if loops:
            # Each row of a loop costs what the second one does.
            twice, rest = self._cost(more, base, 0), length - 1
            seconds, flops = cost.seconds or 0.0, cost.flops or 0
            seconds += rest * ((twice.seconds or 0.0) - seconds)
            cost = replace(cost, seconds=seconds, flops=flops + rest * ((twice.flops or 0) - flops))
        peaks = [self._once(before, base).peak_bytes for before in self.before if before.anyway]
        return replace(cost, peak_bytes=max(cost.peak_bytes, *peaks)) if peaks else cost

    def fitted(self, budget: int | None) -> tuple[int, Cost]:
        """The most tokens of a prompt at once whose step fits, and what one token takes, at the peak of
        all."""
        single, moved = self._step(1), self._moved(self.cache_bytes)
        chunk = min(self.options.max_tokens, *step_bounds_of(self.sites), self.options.max_tokens)
        if self.stretch is not None:
            chunk = min(STRETCH, self.options.max_tokens)
        peak = self._step(chunk).peak_bytes
        if budget is not None and peak > budget:
            fitting = [(1, single.peak_bytes)]
            size = chunk // 2 if self.stretch is None else 1
            while size > 1:
                # Halves from above: steps are few, and the largest that fits takes the fewest.
                found = self._step(size).peak_bytes
                if found <= budget:
                    fitting.append((size, found))
                    break
                size //= 2
            chunk, peak = fitting[-1]
            if peak > budget:
                self._refuse(max(peak, moved), budget)
        if budget is not None and moved > budget:
            self._refuse(moved, budget, "moving sequences")
        for before in self.before:
            once = self._once(before, self.base).peak_bytes
            if budget is not None and once > budget:
                self._refuse(once, budget, before.what)
            peak = max(peak, once)
        peak = max(peak, single.peak_bytes, moved)
        return chunk, Cost(peak, self.weight_bytes, single.seconds, single.flops, self.cache_bytes)

    def _moved(self, cache_bytes: int) -> int:
        """The peak while sequences change places, as those of beams do."""
        if self.options.max_batch == 1:
            return 0
        return self.base - self.cache_bytes + cache_bytes + min(MOVED, cache_bytes)

    def _room(self, budget: int) -> int:
        """Bytes of stores that fit: beside a step of ``AT_ONCE`` tokens, or of fewer where that would take
        more than half of the stores."""
        count = min(self.options.max_tokens, *step_bounds_of(self.sites), AT_ONCE)
        if self.stretch is not None:
            count = min(STRETCH, self.options.max_tokens)
        while True:
            room = budget - (self._step(count).peak_bytes - self.cache_bytes)
            if count == 1 or 2 * room >= self.cache_bytes:
                break
            count = 1 if self.stretch is not None else count // 2
        if self._moved(room) > budget:
            beside = budget - (self.base - self.cache_bytes)
            room = max(beside - MOVED, beside // 2)
        return room

    def _refuse(self, peak: int, budget: int, what: str = "decoding one token") -> None:
        stores = format_bytes(self.cache_bytes)
        raise NoRoom(
            f"{what} takes {format_bytes(peak)} ({peak} bytes), {format_bytes(budget)} are "
            f"allowed: {format_bytes(self.weight_bytes)} are parameters and buffers, {stores} stores of keys "
            f"and values for max_tokens={self.options.max_tokens} and max_batch={self.options.max_batch}",
            room=self._room(budget),
            least_bytes=peak,
            budget_bytes=budget,
            hint=f"ask for budget={peak} or more, for fewer tokens or sequences, or pack weights "
            "(graphopt.quantize) before",
        )

    def _step(self, count: int) -> Cost:
        batch = self.options.max_batch
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict.fromkeys(
            self.uncached.inputs, ((batch, count), torch.int64)
        )
        shapes["slots"] = ((count,), torch.int64)
        shapes["valid"] = ((batch, self.options.max_tokens), torch.bool)
        shapes["source_end"] = ((1,), torch.int64)
        shapes |= {n: (shape, torch.bool) for n, shape in shown_tensors(self.sites, batch).items()}
        for index, name in biased_by(self.sites).items():
            shapes[name] = ((self.sites[index].spec.heads, self.options.max_tokens), torch.float32)
        kinds = kept_tensors(self.uncached, self.sites, batch, self.options.max_tokens)
        step, run = self.step, self.general
        if self.prompts is not None and self.stretch is not None and count > 1:
            step, run = self.prompts, self.stretch
        shapes |= {name: kinds[key] for name, key in step.stores.items()}
        program = _sized("step", run.gm, step.weights, {name: shapes[name] for name in step.inputs})
        # What the encoder gave is held until all is said.
        read = source_shapes(self.uncached, batch).values()
        held = sum(math.prod(shape) * dtype.itemsize for shape, dtype in read)
        return self._cost(program, self.base + held, self.cache_bytes)

    def _once(self, before: Before, base: int) -> Cost:
        try:
            program = _sized(before.name, before.gm, before.weights, before.shapes)
        except (RuntimeError, IndexError) as error:
            most = self.uncached.source.most if self.uncached.source is not None else 0
            raise InputsError(
                f"{before.what} of max_source={most} rows fails for {self.options.max_batch} sequences: "
                f"{brief(error)}"
            ) from error
        return self._cost(program, base, self.cache_bytes)

    def _cost(self, program: Program, base: int, cache_bytes: int) -> Cost:
        calls = tuple(n.name for n in program.graph.nodes if n.op in ("call_function", "get_attr"))
        profile = self.cost.memory([(program, Schedule(calls))], base_bytes=base)
        prices = [self.cost.node(node) for node in program.nodes()]
        return Cost(
            profile.peak_bytes, self.weight_bytes, sum(p.seconds for p in prices), sum(p.flops for p in
            prices), cache_bytes,
        )  # fmt: skip


def _sized(
    name: str,
    gm: torch.fx.GraphModule,
    weights: Mapping[str, torch.Tensor],
    shapes: Shapes,
) -> Program:
    """``gm`` traced again for inputs of these shapes."""
    traced = _torch.retraced_at(gm, list(weights.values()), list(shapes.values()))
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    roles = ["parameter"] * len(weights) + [
        "buffer" if name.startswith(("store_", "shown_", "bias_", "valid")) else "input" for name in shapes
    ]
    specs = [InputSpec(node.name, role) for node, role in zip(placeholders, roles, strict=True)]
    return semantic_program(name, traced, specs)
