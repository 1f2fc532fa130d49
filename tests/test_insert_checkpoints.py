"""insert-checkpoints: exact arithmetic, optimal on small networks, bounds that hold."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import random
from collections import Counter

import pytest
import torch
from torch import nn

import graphopt
from graphopt.candidate import Frontier
from graphopt.cost import CostModel
from graphopt.passes import PassContext
from graphopt.program import Level, Program
from graphopt.schedule import DeferredSchedule
from graphopt_passes.insert_checkpoints import InsertCheckpoints
from graphopt_passes.insert_checkpoints.bound import peak_floor, seconds_bound
from graphopt_passes.insert_checkpoints.evaluate import Evaluator
from graphopt_passes.insert_checkpoints.model import build_model
from graphopt_passes.insert_checkpoints.portfolio import minimum_cut
from graphopt_passes.insert_checkpoints.realise import saved_storages, to_schedule
from tests.programs import host


class Residual(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(x))
        return x.square().mean()


def captured(model: nn.Module, *inputs: torch.Tensor) -> tuple[Program, CostModel]:
    optimized = graphopt.optimize(model, inputs, emit="eager", on_error="raise")
    program = next(p for p in optimized.programs if p.level is Level.JOINT)
    return program, host().cost_model("roofline").build(host().device("cpu"))


@pytest.fixture(scope="module")
def small() -> tuple[Program, CostModel]:
    torch.manual_seed(0)
    return captured(Residual(16, 3), torch.randn(64, 16))


def test_the_search_and_the_simulator_agree_to_the_byte(small: tuple[Program, CostModel]) -> None:
    program, cost = small
    model = build_model(program, cost, "eager")
    evaluate = Evaluator(model)
    savable = [b for b in range(len(model.size)) if model.savable[b] and not model.free[b]]
    for count in (0, 1, 3, len(savable)):
        item = evaluate(frozenset(savable[:count]))
        profile = cost.memory([(program, to_schedule(model, item.saved))])
        assert (item.forward_peak, item.backward_peak) == (
            profile.phase_peak("forward"),
            profile.phase_peak("backward"),
        )
        assert item.retained == profile.retained_bytes


class Skipping(nn.Module):
    """Residual sums between normalised layers: what runs again reaches far back."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x)) + x)
        return (x * start).square().mean()


def test_what_is_released_after_a_slot_counts_as_the_simulator_counts_it() -> None:
    torch.manual_seed(0)
    program, cost = captured(Skipping(16, 4), torch.randn(64, 16))
    model = build_model(program, cost, "eager")
    evaluate = Evaluator(model)
    everything = saved_storages(model, model.baseline.saved)
    draw = random.Random(0)
    released = 0
    for _ in range(40):
        item = evaluate({b for b in everything if draw.random() < 0.3})
        for _ in range(4):
            waits = item.waits()
            chosen = draw.sample(waits, min(len(waits), 3))
            item = evaluate(item.saved, item.released | {(b, slot) for b, slot, _, _ in chosen})
        schedule = to_schedule(model, item.saved, item.released)
        profile = cost.memory([(program, schedule)])
        assert item.forward_peak == profile.phase_peak("forward")
        assert item.backward_peak == profile.phase_peak("backward")
        makers = {model.operators[i] for i in item.recomputed}
        ran = [name for name in schedule.recomputed if name in makers]
        assert ran == [model.operators[i] for i in item.recomputed]
        released += len(item.released)
    assert released > 40


def test_a_chain_made_again_holds_one_layer_at_a_time() -> None:
    """Sums of a residual stream run again in the order of the forward; none of them waits for its own
    gradient where the peak is at stake, though no product runs again."""
    torch.manual_seed(0)
    program, cost = captured(Skipping(16, 6), torch.randn(1024, 16))
    (frontier,) = InsertCheckpoints(objective="flops").propose(program, PassContext(cost, "train"))
    assert isinstance(frontier, Frontier)
    free = [point for point in frontier.points if not point.flops]
    often = [Counter(point.schedule.recomputed).most_common(1) for point in free]
    assert any(count > 1 for counted in often for _, count in counted)


def test_schedules_are_worked_out_when_they_are_read(small: tuple[Program, CostModel]) -> None:
    program, cost = small
    (frontier,) = InsertCheckpoints().propose(program, PassContext(cost, "train"))
    assert isinstance(frontier, Frontier)
    point = frontier.points[0]
    assert isinstance(point.source, DeferredSchedule)
    moved = dataclasses.replace(point, seconds=1.0)
    assert moved.schedule is point.schedule
    assert moved.schedule.recomputed
    assert pickle.loads(pickle.dumps(point)).source == point.schedule


def test_nothing_beats_the_frontier_on_a_small_network(small: tuple[Program, CostModel]) -> None:
    """Against every subset of the large storages, at every peak that any of them reaches."""
    program, cost = small
    model = build_model(program, cost, "eager")
    evaluate = Evaluator(model)
    everything = saved_storages(model, model.baseline.saved)
    large = [
        b for b in range(len(model.size)) if model.savable[b] and not model.free[b] and model.size[b] >= 4096
    ]
    rest = everything - set(large)
    assert len(large) <= 12
    all_plans = [
        evaluate(rest | frozenset(chosen))
        for count in range(len(large) + 1)
        for chosen in itertools.combinations(large, count)
    ]
    (frontier,) = InsertCheckpoints().propose(program, PassContext(cost, "train"))
    assert isinstance(frontier, Frontier)
    for plan in all_plans:
        fitting = [p for p in frontier.points if p.peak_bytes <= plan.peak]
        assert fitting, f"nothing on the frontier fits {plan.peak}"
        best = min(p.seconds for p in fitting)
        assert best <= plan.seconds * 1.001 + 1e-9


def test_bounds_hold_for_every_plan_found(small: tuple[Program, CostModel]) -> None:
    program, cost = small
    model = build_model(program, cost, "eager")
    bound, floor = seconds_bound(model), peak_floor(model)
    (frontier,) = InsertCheckpoints().propose(program, PassContext(cost, "train"))
    assert isinstance(frontier, Frontier)
    assert any(bound(p.peak_bytes) > 0 for p in frontier.points)
    for found in frontier.points:
        assert bound(found.peak_bytes) <= found.seconds + 1e-12
        assert floor <= found.peak_bytes


def test_the_frontier_falls_in_seconds_as_the_peak_rises(small: tuple[Program, CostModel]) -> None:
    program, cost = small
    (frontier,) = InsertCheckpoints().propose(program, PassContext(cost, "train"))
    assert isinstance(frontier, Frontier)
    fastest = [
        min(p.seconds for p in frontier.points if p.peak_bytes <= q.peak_bytes) for q in frontier.points
    ]
    assert fastest == sorted(fastest, reverse=True)
    assert frontier.points[0].peak_bytes < max(p.peak_bytes for p in frontier.points)
    assert min(p.seconds for p in frontier.points) == 0.0


def test_a_minimum_cut_recomputes_nothing_dearer_than_its_limit(small: tuple[Program, CostModel]) -> None:
    program, cost = small
    model = build_model(program, cost, "eager")
    limit = sorted(model.seconds)[len(model.seconds) // 2]
    item = Evaluator(model)(minimum_cut(model, model.seconds, limit))
    assert all(model.seconds[i] <= limit for i in item.recomputed)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"objective": "bytes"}, "objective='bytes': expected 'seconds' or 'flops'"),
        ({"targets": -1}, "targets=-1: expected a whole number, 0 or more"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(graphopt.PassError, match=text):
        InsertCheckpoints(**options)  # type: ignore[arg-type]


def test_inference_offers_nothing(small: tuple[Program, CostModel]) -> None:
    program, cost = small
    assert list(InsertCheckpoints().propose(program, PassContext(cost, "infer"))) == []


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x).float()).to(x.dtype) * self.up(x)).sum()


def test_with_fused_kernels_library_calls_alone_decide_what_is_handed_over() -> None:
    """Casts and activations are computed in the kernels that read them: to hand them over costs time."""
    program, cost = captured(Gated(256).bfloat16(), torch.randn(512, 256, dtype=torch.bfloat16))
    (frontier,) = InsertCheckpoints().propose(program, PassContext(cost, "train", emit="inductor"))
    assert isinstance(frontier, Frontier)
    kept = [
        sorted(node.target.name() for node in program.find(point.schedule.saved)) for point in frontier.points
    ]
    assert kept[-1] == ["aten::mm", "aten::mm", "aten::mul.Tensor"]
    assert [] in kept
    assert not any(name == "aten::_to_copy" for names in kept for name in names)
