"""order-backward: run the operators of the backward in the order that holds least at the peak.

Before::

    %d1 = aten.mm(%g, %w2)        %x, %h, %g are held
    %d2 = aten.mul(%d1, %m)
    %w2_grad = aten.mm(%h, %g)    frees %h, %g

After::

    %w2_grad = aten.mm(%h, %g)    frees %h
    %d1 = aten.mm(%g, %w2)        frees %g
    %d2 = aten.mul(%d1, %m)

Operators are the same and read the same, so results are bitwise equal; random operators, other effects and
writes in place keep their order. Two steps are looked at: the one that hands everything over, and the one
that hands nothing over, which no recomputation gets below. An order is taken only where one of them holds
less at most and the other no more; so ``insert-checkpoints``, which comes after it, searches on the better
order. The forward is ordered as well. Sources: see ``listing`` and ``improve``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.budget import format_bytes
from graphopt.candidate import Candidate, CostDelta, Declined
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt_passes.order_backward.improve import lowered
from graphopt_passes.order_backward.reduce import Ordered, Reduced

__all__ = ["OrderBackward"]


@dataclass(frozen=True)
class OrderBackward(Pass):
    """``least_gain``: the share of a peak that an order must take off it. Below a hundredth the search of
    checkpoints, which finds other plans for another order, may lose as much as it wins."""

    name: ClassVar[str] = "order-backward"
    level: ClassVar[Level] = Level.JOINT
    summary: ClassVar[str] = "run backward and forward in an order that holds less at the peak"
    before: ClassVar[dict[str, str]] = {
        "insert-checkpoints": "schedules are chosen for the order that will run",
        "offload": "values are moved beside the operators that will run",
    }

    least_gain: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.least_gain, int | float) or not 0 <= self.least_gain < 1:
            raise PassError(
                f"order-backward: least_gain={self.least_gain!r}: expected a share of the peak, 0 or more "
                "and below 1"
            )

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if ctx.mode != "train":
            return
        at = f"{self.name}@{program.name}"
        if ctx.emit != "eager":
            yield Declined(at, "the code generator orders its kernels itself")
            return
        reduced = Reduced(program, ctx.cost)
        if loose := reduced.unscheduled:
            yield Declined(at, f"{loose[0]} has an effect, and neither half has a place for it")
            return
        halves = (reduced.forward, reduced.backward)
        orders = [_order(half) for half in halves]
        before, after = _peaks(halves, map(_given, halves)), _peaks(halves, orders)
        gains = [old - new for old, new in zip(before, after, strict=True)]
        if not any(gain > self.least_gain * old for gain, old in zip(gains, before, strict=True)):
            yield Declined(
                at,
                f"no order was found that holds {self.least_gain:.1%} less than {format_bytes(before[0])}, "
                f"or than {format_bytes(before[1])} with nothing handed over",
            )
            return
        names = [reduced.nodes_of(half, order) for half, order in zip(halves, orders, strict=True)]
        freed = reduced.peak(*(half.names for half in halves)) - reduced.peak(*names)
        if freed < 0:
            yield Declined(at, f"the order that was found holds {format_bytes(-freed)} more at the peak")
            return
        moved = [new for old, name in zip(halves, names, strict=True) for new in _moved(old, name)]
        yield Candidate(
            at,
            self.name,
            tuple(moved),
            CostDelta(peak_bytes=-freed),
            _Reorder((*names[0], *names[1])),
        )


def _order(half: Ordered) -> list[int]:
    """First the least peak with nothing handed over more than now, then that of the step with nothing handed
    over, not to lose what was won."""
    given = _given(half)
    order = lowered(half.kept, half.again, half.again.peak(given), given)
    return lowered(half.again, half.kept, half.kept.peak(order), order)


def _given(half: Ordered) -> Sequence[int]:
    return range(half.kept.count)


def _peaks(halves: Iterable[Ordered], orders: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Bytes held at most where everything is handed over, and where nothing is; outputs, which the caller
    holds throughout, left out of the backward's."""
    pairs = list(zip(halves, orders, strict=True))
    return max(h.kept.peak(order) for h, order in pairs), max(h.again.peak(order) for h, order in pairs)


def _moved(half: Ordered, names: tuple[str, ...]) -> list[str]:
    return [new for old, new in zip(half.names, names, strict=True) if old != new]


@dataclass(frozen=True)
class _Reorder:
    """Puts the calls of a program in the order of ``names``. What is not named, such as the state of a random
    generator, comes right before its first reader; what nobody reads, last."""

    names: tuple[str, ...]

    def __call__(self, edit: Edit) -> None:
        known = {node.name: node for node in edit.graph.nodes}
        order = [node for node in known.values() if node.op == "placeholder"]
        done = set(order)
        output = [node for node in known.values() if node.op == "output"]
        rest = [node for node in known.values() if node not in done and node not in output]
        for node in (*(known[name] for name in self.names), *rest, *output):
            stack = [node]
            while stack:
                missing = [source for source in stack[-1].all_input_nodes if source not in done]
                if missing:
                    stack.extend(reversed(missing))
                    continue
                top = stack.pop()
                if top not in done:
                    done.add(top)
                    order.append(top)
        for left, right in itertools.pairwise(order):
            left.append(right)
