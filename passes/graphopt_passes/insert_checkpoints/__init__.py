"""insert-checkpoints: choose what is kept for the backward and what is computed again.

Before, everything that the backward reads is handed over::

    forward:   %5 = aten.mm(%x, %w)   %6 = aten.gelu(%5)   saves %5, %6
    backward:  %9 = aten.mm(%g, %6)   ...

After, within a smaller budget, ``%6`` runs again right before its reader::

    forward:   %5 = aten.mm(%x, %w)   %6 = aten.gelu(%5)   saves %5
    backward:  %6 = aten.gelu(%5)     <recompute>
               %9 = aten.mm(%g, %6)   ...

Sources: Chen et al. 2016 (recomputation), Griewank and Walther (checkpointing), minimum cuts as
starting points as in torch's partitioner, Jain et al. 2020 (mixed-integer programs); the search itself is
on the true peak of the step.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from graphopt.candidate import Frontier, FrontierPoint, NearMiss, Reason
from graphopt.emit.fused_point import device_type, fused_point
from graphopt.emit.fusion import Kind, kind_of
from graphopt.errors import PassError
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt.replay import is_random_state
from graphopt.schedule import DeferredSchedule
from graphopt_passes.insert_checkpoints.bound import peak_floor, seconds_bound
from graphopt_passes.insert_checkpoints.chain import find_chain
from graphopt_passes.insert_checkpoints.evaluate import Evaluator
from graphopt_passes.insert_checkpoints.exact import chosen_solver, plans
from graphopt_passes.insert_checkpoints.incremental import Incremental, Snapshot
from graphopt_passes.insert_checkpoints.model import StepModel, build_model, pinned
from graphopt_passes.insert_checkpoints.portfolio import blends, fused_seeds, kept_with, seeds, steps_between
from graphopt_passes.insert_checkpoints.realise import Realiser, saved_storages
from graphopt_passes.insert_checkpoints.rows import row_plans
from graphopt_passes.insert_checkpoints.search import Start, search

__all__ = ["InsertCheckpoints"]

_Item = TypeVar("_Item")
_Priced = TypeVar("_Priced", Snapshot, FrontierPoint)

_NARROWEST = 0.03
"""The least peak that a chain of blocks is planned for, as a share of that without recomputation."""

_DEEP = 300
"""Slots from which on a program that repeats is not searched from scratch as well."""

_SMALL = 100
"""Slots up to which a program is searched as usual, whatever share of that the context asks for. What a
search takes falls with the slots from there on, so the least share of larger ones falls with their square."""

_SAMPLE, _LEAST_SAMPLE, _SAMPLED_NODES = 48, 16, 12_000
"""How many points of a frontier are priced as fused kernels, where that many nodes in all are looked at."""

_FUSED_TARGETS = 24
"""Targets of a search whose points are only a part of what is priced as fused kernels."""


@dataclass(frozen=True)
class InsertCheckpoints(Pass):
    """``objective``: what a recomputation costs, predicted ``"seconds"`` or ``"flops"``.

    ``targets``: how many peaks between the least and the largest are aimed at. ``effort``: how many
    plans may be tried for each. 0 chooses by the size of the program. ``solver``: what finds further plans,
    ``"milp"`` (scipy), ``"cp-sat"`` (OR-Tools, an extra), ``"auto"`` or ``"none"``, in ``solver_seconds`` at
    most for each program of up to 400 operators.
    """

    name: ClassVar[str] = "insert-checkpoints"
    level: ClassVar[Level] = Level.JOINT
    summary: ClassVar[str] = "recompute in the backward what would not fit, at the least added time"

    objective: str = "seconds"
    targets: int = 0
    effort: int = 0
    solver: str = "auto"
    solver_seconds: float = 2.0

    def __post_init__(self) -> None:
        if self.objective not in ("seconds", "flops"):
            raise PassError(
                f"insert-checkpoints: objective={self.objective!r}: expected 'seconds' or 'flops'"
            )
        for option in ("targets", "effort"):
            value = getattr(self, option)
            if not isinstance(value, int) or value < 0:
                raise PassError(f"insert-checkpoints: {option}={value!r}: expected a whole number, 0 or more")
        chosen_solver(self.solver)
        if not isinstance(self.solver_seconds, int | float) or not 0 <= self.solver_seconds < math.inf:
            raise PassError(
                f"insert-checkpoints: solver_seconds={self.solver_seconds!r}: expected a number, 0 or more"
            )

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if ctx.mode != "train":
            return
        model = build_model(program, ctx.cost, ctx.emit)
        yield from self._pinned(program, model)
        prices = model.seconds if self.objective == "seconds" else _flops_first(model)
        plan = Incremental(model, prices)
        everything = saved_storages(model, model.baseline.saved)
        if ctx.emit == "eager" and not (ctx.bounded and ctx.searching):
            # Op by op nothing that runs again saves time. Fused, it may. A plan that is replayed has its own.
            whole = _point(model, Realiser(model), _tried(plan, everything))
            yield Frontier(self.name, (whole,), peak_floor(model), seconds_bound(model))
            return
        if not ctx.searching:
            yield Frontier(self.name, tuple(_fused(plan, ctx, Realiser(model), [everything])[:1]))
            return
        family = [everything, *seeds(model, prices, 24)]
        # What code generators make of values that are computed again more than once is not modelled.
        repeat = ctx.emit == "eager"
        slots = max(len(model.slots), 1)
        share = min(1.0, max(ctx.effort, (_SMALL / slots) ** 2))
        known = [_tried(plan, saved) for saved in family]
        starts: list[Start] = [(saved, frozenset()) for saved in family]
        if repeat:
            starts += self._solved(dataclasses.replace(model, seconds=prices), known, share)
        rows = _rows(plan, known, max(40, min(120, 40_000 // slots))) if repeat else []
        own = [(start, 0) for start in (*starts[len(family) :], *rows[:1])]
        # Where blocks repeat there are better plans to start from than search finds in a deep program.
        deep = bool(rows) and slots >= _DEEP
        # The work is about the product of both.
        part = share**0.5
        targets = self.targets or max(8, int(part * min(96 if repeat else _FUSED_TARGETS, 20_000 // slots)))
        effort = self.effort or max(8, int(part * min(144, (12_000 if deep else 24_000) // slots)))
        if not deep:
            highest = max(known, key=lambda item: item.peak)
            apart = _thinned(starts[1 : len(family)], max(4, 4_000 // slots))
            own = [((highest.saved, frozenset()), 10**9), *((start, 0) for start in apart), *own]
            starts += [(saved, frozenset()) for saved in blends(model, family, 8)]
        starts += rows
        own = [(start, limit or 8 * effort) for start, limit in own]
        room = ctx.room_bytes if repeat else None
        front = search(plan, starts, targets=targets, effort=effort, own=own, repeat=repeat, room=room)
        realise = Realiser(model)
        if ctx.emit == "eager":
            items = _undominated((*front.items, *known))
            points = tuple(_point(model, realise, item) for item in items)
            yield Frontier(self.name, points, peak_floor(model), seconds_bound(model), effort=share)
            return
        # Fused kernels hold less and cost less than their operators: price a sample again.
        count = max(_LEAST_SAMPLE, min(_SAMPLE, _SAMPLED_NODES // len(program.graph.nodes)))
        sample = [everything, *_for_kernels(plan, prices, count)]
        sample += _least_retained(plan, steps_between(model, prices, family), count // 4)
        sample += [item.saved for item in _thinned(front.items, count // 4)]
        yield Frontier(self.name, tuple(_undominated(_fused(plan, ctx, realise, sample))), effort=share)

    def _pinned(self, program: Program, model: StepModel) -> Iterable[NearMiss]:
        """Operators of the forward that could run again by their place in the program, but must not."""
        for node in program.find(model.operators):
            if (why := pinned(node)) and not is_random_state(node):
                yield NearMiss(self.name, node.name, 1, 1, Reason(why, (node.name,)))

    def _solved(self, model: StepModel, known: Sequence[Snapshot], share: float) -> list[Start]:
        """What a solver finds between the least peak that is known and that of the first plan."""
        least = min(item.peak for item in known)
        seconds = self.solver_seconds * share
        found = plans(Evaluator(model), least, known[0].peak, chosen_solver(self.solver), seconds)
        return [(saved, frozenset()) for saved in dict.fromkeys(item.saved for item in found)]


def _tried(plan: Incremental, saved: Set[int]) -> Snapshot:
    plan.load(saved)
    plan.settle()
    return plan.snapshot()


def _rows(plan: Incremental, known: Sequence[Snapshot], count: int) -> list[Start]:
    """Plans of the program as a chain of blocks, least peak first; none where nothing repeats."""
    chain = find_chain(plan.model)
    if chain is None:
        return []
    rooms = [int(known[0].peak * _NARROWEST ** (step / count)) for step in range(1, count)]
    return list(row_plans(chain, plan.prices, rooms))


def _point(model: StepModel, realise: Realiser, item: Snapshot) -> FrontierPoint:
    saved, released = item.saved, item.released
    return FrontierPoint(
        DeferredSchedule(lambda: realise(saved, released)),
        item.forward_peak,
        item.backward_peak,
        item.retained,
        model.gradient_bytes,
        item.seconds,
        item.flops,
        f"{item.again} operators again" if item.again else "no recomputation",
    )


def _for_kernels(plan: Incremental, prices: Sequence[float], count: int) -> list[frozenset[int]]:
    """About ``count`` sets that may be worth handing over where all but library calls is computed in the
    kernel that reads it."""
    model = plan.model
    nodes = {node.name: node for node in model.program.graph.nodes}
    where = device_type(model.program)
    alone = [kind_of(nodes[name], where) is Kind.LIBRARY for name in model.operators]
    by_price, by_byte = fused_seeds(model, prices, alone, count // 4)
    found = [*by_price, *by_byte]
    for saved in dict.fromkeys((*by_price, *by_byte)):
        _tried(plan, saved)
        again = list(plan.recomputed())
        if any(alone[i] for i in again):
            break
        found += kept_with(model, saved, again, alone)
    found += _thinned(list(steps_between(model, prices, by_byte, 3)), count // 2)
    return list(dict.fromkeys(found))


def _fused(
    plan: Incremental, ctx: PassContext, realise: Realiser, sets: Iterable[frozenset[int]]
) -> list[FrontierPoint]:
    """Points of the given saved sets as the code generator will run them; the first is the
    reference that added seconds count from."""
    model = plan.model
    points: list[FrontierPoint] = []
    plain = list(dict.fromkeys(sets))
    for saved in dict.fromkeys([*plain, *(_with_statistics(plan, saved) for saved in plain)]):
        point = _point(model, realise, _tried(plan, saved))
        priced = fused_point(model.program, point.schedule, ctx.cost, flops=point.flops, label=point.label)
        points.append(priced)
    start = points[0].seconds
    return [dataclasses.replace(point, seconds=point.seconds - start) for point in points]


def _with_statistics(plan: Incremental, saved: frozenset[int]) -> frozenset[int]:
    """The saved set and whatever small results of large reductions are made again under it.

    Row statistics of a norm or a softmax take next to no bytes. Kept, they leave an elementwise
    kernel behind that may write over its input; made again, they cost another pass over it.
    """
    model = plan.model
    item = _tried(plan, saved)
    small = {
        b
        for i in plan.recomputed()
        for b in model.outputs[i]
        if model.savable[b] and model.size[b] * 64 <= max((model.size[x] for x in model.inputs[i]), default=0)
    }
    return item.saved | small


def _least_retained(
    plan: Incremental, sets: Iterable[frozenset[int]], count: int
) -> list[frozenset[int]]:
    """Those of the sets that no other beats in retained bytes and price: what counts in a chain
    of programs, where all wait for the last with what they retain."""
    best: list[Snapshot] = []
    tried = (_tried(plan, saved) for saved in dict.fromkeys(sets))
    for item in sorted(tried, key=lambda item: (item.retained, item.price)):
        if not best or item.price < best[-1].price:
            best.append(item)
    return [item.saved for item in _thinned(best, count)]


def _thinned(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most ``count`` of the items, evenly spread, both ends included."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def _undominated(found: Iterable[_Priced]) -> list[_Priced]:
    """By rising peak, those that no other beats in peak, retained bytes and price at once.

    Beside other programs what is retained counts as much as the program's own peak.
    """
    kept: list[_Priced] = []
    # What is kept so far, without what is no better than another in price and retained bytes: by rising
    # price, retained bytes fall.
    prices: list[float] = []
    retained: list[int] = []
    for item in sorted(found, key=lambda p: (_peak(p), _price(p), p.retained)):
        price = _price(item)
        at = bisect.bisect_right(prices, price)
        if at and retained[at - 1] <= item.retained:
            continue
        kept.append(item)
        end = start = bisect.bisect_left(prices, price)
        while end < len(prices) and retained[end] >= item.retained:
            end += 1
        prices[start:end], retained[start:end] = [price], [item.retained]
    return kept


def _peak(item: Snapshot | FrontierPoint) -> int:
    return max(item.forward_peak, item.backward_peak)


def _price(item: Snapshot | FrontierPoint) -> float:
    return item.price if isinstance(item, Snapshot) else item.seconds


def _flops_first(model: StepModel) -> list[float]:
    """FLOPs count; seconds only break ties."""
    total = max(sum(model.flops), 1)
    span = sum(model.seconds) or 1.0
    return [f / total + 1e-4 * s / span for f, s in zip(model.flops, model.seconds, strict=True)]
