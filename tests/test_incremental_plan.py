"""A plan that is changed in small steps costs what the evaluator says, to the byte, whatever came before."""

from __future__ import annotations

import random
import time
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from graphopt_passes.insert_checkpoints.evaluate import Evaluator
from graphopt_passes.insert_checkpoints.incremental import CELLS, Incremental
from graphopt_passes.insert_checkpoints.model import StepModel, build_model
from graphopt_passes.insert_checkpoints.realise import saved_storages
from tests.test_insert_checkpoints import Residual, Skipping, captured


class Split(nn.Module):
    """Operators with several results, of which the backward reads some; a skip over the whole depth."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for layer, norm in zip(self.layers, self.norms, strict=True):
            left, right = layer(norm(x)).chunk(2, dim=-1)
            values, _ = torch.sort(left * torch.sigmoid(right), dim=-1)
            x = x + torch.nn.functional.dropout(values, 0.2)
        return (x * first).logsumexp(-1).sum()


NETWORKS = {
    "residual": lambda: (Residual(16, 5), torch.randn(64, 16)),
    "skipping": lambda: (Skipping(16, 6), torch.randn(64, 16)),
    "split": lambda: (Split(16, 4), torch.randn(64, 16)),
}


def model_of(network: str) -> StepModel:
    torch.manual_seed(0)
    program, cost = captured(*NETWORKS[network]())
    return build_model(program, cost, "eager")


def state(plan: Incremental) -> Any:
    """Everything that later changes depend on."""
    return (
        plan.snapshot(),
        plan.live.tolist(),
        plan.weights.tolist(),
        plan.forward_live.tolist(),
        [list(slots) for slots in (*plan.uses, *plan.births, *plan.drops)],
        list(plan.held),
        dict(plan.waits),
        plan.first_use.tolist(),
        plan.is_kept.tolist(),
        plan.recomputed(),
    )


def assert_as_evaluated(plan: Incremental, evaluate: Evaluator) -> None:
    item = evaluate({b for b, held in enumerate(plan.held) if held}, plan.released)
    found = plan.snapshot()
    assert found.saved == item.saved
    assert found.released == item.released
    assert (found.forward_peak, found.backward_peak, found.retained) == (
        item.forward_peak,
        item.backward_peak,
        item.retained,
    )
    assert plan.recomputed() == item.recomputed
    assert (found.flops, found.again) == (item.flops, len(item.recomputed))
    assert found.seconds == pytest.approx(item.seconds, rel=1e-9)
    assert plan.forward_live.tolist() == item.forward_live.tolist()
    assert all(plan.first_use[b] == item.slot_of(int(item.first_use[b])) for b in plan.kept)


def random_change(plan: Incremental, draw: random.Random) -> None:
    count, slots = len(plan.model.size), len(plan.model.slots)
    waits = sorted((b, cell // CELLS) for found in plan.waits.values() for b, cell, _ in found)
    let_go = draw.sample(waits, min(len(waits), draw.randrange(3)))
    if draw.random() < 0.3:
        # Of something that may well not be there.
        let_go.append((draw.randrange(count), draw.randrange(slots)))
    chosen = draw.sample(range(count), 4)
    released = sorted(plan.released)
    plan.change(
        give=chosen[: draw.randrange(3)],
        save=[b for b in chosen[2 : 2 + draw.randrange(3)] if plan.model.savable[b]],
        release=let_go,
        hold=draw.sample(released, min(len(released), draw.randrange(2))),
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_every_change_costs_what_the_evaluator_says(network: str) -> None:
    model = model_of(network)
    evaluate, plan = Evaluator(model), Incremental(model)
    everything = sorted(saved_storages(model, model.baseline.saved))
    draw = random.Random(0)
    released = 0
    for _ in range(20):
        plan.load({b for b in everything if draw.random() < 0.4})
        plan.settle()
        assert_as_evaluated(plan, evaluate)
        for _ in range(25):
            mark, before = plan.mark(), state(plan)
            for _ in range(draw.randrange(1, 3)):
                random_change(plan, draw)
                assert_as_evaluated(plan, evaluate)
            if draw.random() < 0.4:
                plan.undo(mark)
                assert state(plan) == before
        released += len(plan.released)
    assert released >= 10


def test_a_plan_is_the_same_by_whatever_way_it_was_reached() -> None:
    model = model_of("skipping")
    everything = sorted(saved_storages(model, model.baseline.saved))
    draw = random.Random(1)
    plan = Incremental(model)
    for _ in range(30):
        plan.load({b for b in everything if draw.random() < 0.4})
        for _ in range(4):
            random_change(plan, draw)
        found = plan.snapshot()
        afresh = Incremental(model)
        afresh.load(found.saved, found.released)
        assert afresh.snapshot() == found


def test_prices_count_beside_seconds_and_flops() -> None:
    model = model_of("residual")
    plan = Incremental(model, [2.0] * len(model.operators))
    plan.load(set())
    found = plan.snapshot()
    assert found.again > 0
    assert found.price == plan.price == 2.0 * found.again
    assert found.seconds == pytest.approx(sum(model.seconds[i] for i in plan.recomputed()))
    assert found.flops == sum(model.flops[i] for i in plan.recomputed())


def test_excess_is_what_exceeds_the_target_for_each_operator() -> None:
    model = model_of("residual")
    plan = Incremental(model)
    plan.load(set())
    assert plan.excess(plan.peak) == 0
    assert plan.excess(plan.peak - 1) >= 1
    cells = (plan.live + model.output_bytes - 1000).clip(0) * plan.weights
    assert plan.excess(1000) == int(cells.sum()) + int((plan.forward_live - 1000).clip(0).sum())


@pytest.mark.slow
def test_a_change_of_a_large_program_takes_far_less_than_a_millisecond() -> None:
    """At about 6,000 nodes: give a storage up, look at peak, excess and price, take it back."""
    torch.manual_seed(0)
    program, cost = captured(Residual(8, 400), torch.randn(16, 8))
    model = build_model(program, cost, "eager")
    plan = Incremental(model)
    plan.load(saved_storages(model, model.baseline.saved))
    taken = []
    for b in [b for b in sorted(plan.kept) if model.again[model.maker[b]]]:
        start = time.process_time()
        mark = plan.mark()
        plan.change(give=[b])
        assert plan.peak > 0 and plan.price > 0
        plan.excess(plan.peak)
        plan.undo(mark)
        taken.append(time.process_time() - start)
    # A tenth of that is what it takes on an idle machine.
    assert median(taken) < 1e-3
