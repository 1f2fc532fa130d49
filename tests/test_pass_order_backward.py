"""order-backward: the same numbers to the bit, less held at the peak, or the reason why not."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.candidate import Candidate, Declined
from graphopt.capture.joint import save_everything
from graphopt.errors import PassError
from graphopt.order import has_effect
from graphopt.program import Level, Program
from graphopt.testing import check_pass
from graphopt_passes.order_backward import OrderBackward
from graphopt_passes.order_backward.half import Half
from graphopt_passes.order_backward.improve import lowered
from graphopt_passes.order_backward.listing import listed
from graphopt_passes.order_backward.reduce import Reduced
from tests.programs import context
from tests.steps import assert_same, run_step
from tests.test_random_graphs import ROWS, WIDTH, Net


class Branches(nn.Module):
    """Reads one value in branches, each with a large transient: run side by side, all are held at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = [(x * k).repeat(1, 8) for k in range(1, 6)]
        return torch.stack([value.sum() for value in wide]).sum()


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = nn.functional.dropout(self.first(x).exp(), 0.3, self.training)
        right = nn.functional.dropout(self.second(x).tanh(), 0.3, self.training)
        return (left * right).sum() + torch.stack([(x * k).repeat(1, 9).sum() for k in range(4)]).sum()


def joint(model: nn.Module, *inputs: torch.Tensor) -> Program:
    torch._dynamo.reset()
    fast = graphopt.optimize(model, inputs, pipeline=["normalize"], emit="eager", on_error="raise")
    return next(program for program in fast.programs if program.level is Level.JOINT)


def brute_force(half: Half) -> int:
    orders = (
        order
        for order in itertools.permutations(range(half.count))
        if all(order.index(j) < k for k, i in enumerate(order) for j in half.before[i])
    )
    return min(half.peak(order) for order in orders)


def drawn(seed: int, count: int) -> Half:
    """A random half: an operator makes one buffer and reads up to three of those before it."""
    draw = random.Random(seed)
    entry = 2
    reads: list[tuple[int, ...]] = []
    for i in range(count):
        reads.append(tuple(draw.sample(range(entry + i), min(entry + i, draw.choice((1, 1, 2, 3))))))
    size = tuple(draw.choice((1, 2, 4, 8, 16)) for _ in range(entry + count))
    lasting = frozenset(b for b in range(entry, entry + count) if draw.random() < 0.2)
    return Half(
        size, tuple(reads), tuple((entry + i,) for i in range(count)),
        tuple(draw.choice((0, 0, 3)) for _ in range(count)),
        tuple(frozenset(b - entry for b in read if b >= entry) for read in reads),
        frozenset(range(entry)), lasting,
    )  # fmt: skip


def respects(half: Half, order: list[int]) -> bool:
    place = {i: k for k, i in enumerate(order)}
    return len(place) == half.count and all(
        place[j] < place[i] for i in range(half.count) for j in half.before[i]
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_small_half_is_ordered_as_well_as_any_order_is(seed: int) -> None:
    half = drawn(seed, 7)
    order = lowered(half, half, half.peak(range(7)), range(7))
    assert respects(half, order)
    assert half.peak(order) == brute_force(half) >= half.least_peak


@pytest.mark.parametrize("seed", range(20))
def test_orders_respect_what_comes_before_what_and_the_limit(seed: int) -> None:
    half = drawn(seed, 60)
    other = half.alone(frozenset(), frozenset())
    given = range(half.count)
    assert all(respects(half, order) for order in listed(half))
    order = lowered(half, other, other.peak(given), given)
    assert respects(half, order)
    assert half.peak(order) <= half.peak(given)
    assert other.peak(order) <= other.peak(given)
    assert half.least_peak <= half.peak(order)


def test_random_halves_of_many_operators_are_lowered() -> None:
    halves = [drawn(seed, 60) for seed in range(20)]
    found = [half.peak(lowered(half, half, 10**9, range(60))) / half.peak(range(60)) for half in halves]
    assert sum(found) / len(found) < 0.9


@pytest.mark.parametrize("seed", range(6))
def test_the_reduced_halves_hold_what_the_cost_model_says(seed: int) -> None:
    torch.manual_seed(seed)
    program = joint(Net(seed), torch.randn(ROWS, WIDTH, requires_grad=True))
    cost = context().cost
    reduced = Reduced(program, cost)
    profile = cost.memory([(program, save_everything(program))])
    granularity = cost.device.allocation_granularity
    loss = -(-4 // granularity) * granularity
    assert reduced.forward.kept.peak(range(reduced.forward.kept.count)) == profile.phase_peak("forward")
    backward = reduced.backward.kept.peak(range(reduced.backward.kept.count))
    assert backward + loss == profile.phase_peak("backward")


@pytest.mark.parametrize("seed", range(6))
def test_random_orders_compute_the_same_bits(seed: int) -> None:
    """Any order that the halves allow, not only one that holds less."""

    class Shuffled(OrderBackward):
        name = "shuffled"

        def propose(self, program: Program, ctx: Any) -> Any:
            from graphopt.candidate import CostDelta
            from graphopt_passes.order_backward import _Reorder

            reduced, draw = Reduced(program, ctx.cost), random.Random(seed)
            names: list[str] = []
            for half in (reduced.forward, reduced.backward):
                missing = [len(before) for before in half.kept.before]
                ready = [i for i, count in enumerate(missing) if not count]
                order = []
                while ready:
                    order.append(ready.pop(draw.randrange(len(ready))))
                    for later in half.kept.after[order[-1]]:
                        missing[later] -= 1
                        if not missing[later]:
                            ready.append(later)
                names += reduced.nodes_of(half, order)
            yield Candidate("shuffled", "shuffled", tuple(names), CostDelta(), _Reorder(tuple(names)))

    torch.manual_seed(seed)
    model, x = Net(seed).train(), torch.randn(ROWS, WIDTH, requires_grad=True)
    steps = []
    for pipeline in (["normalize"], ["normalize", Shuffled()]):
        torch._dynamo.reset()
        fast = graphopt.optimize(
            copy.deepcopy(model), (x,), pipeline=pipeline, emit="eager", on_error="raise"
        )
        steps.append(run_step(fast, (x,)))
    assert fast.report.steps[-1].status == "applied"
    assert_same(*steps)


def test_branches_side_by_side_run_one_after_the_other() -> None:
    program = joint(Branches(), torch.randn(64, 64, requires_grad=True))
    (found,) = OrderBackward().propose(program, context())
    assert isinstance(found, Candidate)
    assert found.exactness == "exact" and not found.alternative and found.delta.seconds == 0
    cost = context().cost
    before = cost.memory([(program, save_everything(program))]).peak_bytes
    with program.edit("order-backward") as edit:
        found.apply(edit)
    after = cost.memory([(program, save_everything(program))]).peak_bytes
    assert after - before == found.delta.peak_bytes < -0.3 * before


def test_random_draws_keep_their_order_and_numbers() -> None:
    torch.manual_seed(0)
    model, x = Dropped().train(), torch.randn(ROWS, WIDTH, requires_grad=True)
    steps = []
    for pipeline in (["normalize"], ["normalize", "order-backward", "insert-checkpoints"]):
        torch._dynamo.reset()
        fast = graphopt.optimize(
            copy.deepcopy(model), (x,), pipeline=pipeline, emit="eager", on_error="raise"
        )
        steps.append(run_step(fast, (x,)))
    program = next(p for p in fast.programs if p.level is Level.JOINT)
    drawn = [node.name for node in program.nodes() if has_effect(node)]
    assert len(drawn) >= 2
    assert drawn == [n.name for n in joint(model, x).nodes() if has_effect(n)]
    assert {r.id: r.status for r in fast.report.steps}["order-backward"] == "applied"
    assert_same(*steps)


def test_an_ordered_step_is_planned_and_run_within_its_budget() -> None:
    torch.manual_seed(0)
    model, x = Dropped().train(), torch.randn(ROWS, WIDTH, requires_grad=True)
    plain = graphopt.optimize(
        copy.deepcopy(model), (x,), pipeline=["insert-checkpoints"], emit="eager", on_error="raise"
    )
    reference = run_step(plain, (x,))
    torch._dynamo.reset()
    fast = graphopt.optimize(
        copy.deepcopy(model), (x,), budget=plain.plan.predicted.peak_bytes * 3 // 4, emit="eager",
        on_error="raise", pipeline=["order-backward", "insert-checkpoints"],
    )  # fmt: skip
    assert fast.plan.predicted.peak_bytes <= plain.plan.predicted.peak_bytes * 3 // 4
    assert fast.measure((x,), repeats=1).peak_bytes == fast.plan.predicted.peak_bytes
    assert_same(reference, run_step(fast, (x,)))


def test_the_pass_keeps_every_promise_of_passes() -> None:
    check_pass(OrderBackward(), Branches(), (torch.randn(64, 64, requires_grad=True),))


def test_reasons() -> None:
    program = joint(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8))
    (declined,) = OrderBackward().propose(program, context())
    assert isinstance(declined, Declined)
    assert declined.why.startswith("no order was found that holds 1.0% less than ")
    (declined,) = OrderBackward().propose(program, replace(context(), emit="inductor"))
    assert isinstance(declined, Declined)
    assert declined.why == "the code generator orders its kernels itself"
    assert not list(OrderBackward().propose(program, context("infer")))
    with pytest.raises(PassError, match=r"order-backward: least_gain=1: expected a share of the peak"):
        OrderBackward(least_gain=1)
