"""Deep programs: blocks found by structure, rows of blocks that run again, no worse than by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from graphopt.candidate import Frontier
from graphopt.cost import CostModel
from graphopt.passes import PassContext
from graphopt.program import Program
from graphopt_passes.insert_checkpoints import InsertCheckpoints
from graphopt_passes.insert_checkpoints.chain import find_chain
from graphopt_passes.insert_checkpoints.evaluate import Evaluator
from graphopt_passes.insert_checkpoints.incremental import Incremental
from graphopt_passes.insert_checkpoints.model import StepModel, build_model
from graphopt_passes.insert_checkpoints.realise import saved_storages, to_schedule
from graphopt_passes.insert_checkpoints.rows import row_plans
from tests.test_insert_checkpoints import captured


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + hidden


class Deep(nn.Module):
    """``skip``: the blocks of a second row read what those of the first made, last made first."""

    def __init__(self, width: int, depth: int, skip: bool = False) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block(width) for _ in range(depth))
        self.up = nn.ModuleList(Block(width) for _ in range(depth if skip else 0))
        self.last = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = []
        for block in self.down:
            x = block(x)
            made.append(x)
        for block in self.up:
            x = block(x * made.pop())
        return self.last(x).square().mean()


DEPTH = 36


@pytest.fixture(scope="module")
def deep() -> tuple[Program, CostModel, StepModel]:
    torch.manual_seed(0)
    program, cost = captured(Deep(16, DEPTH), torch.randn(512, 16))
    return program, cost, build_model(program, cost, "eager")


def baseline(model: StepModel) -> tuple[Incremental, int]:
    plan = Incremental(model)
    plan.load(saved_storages(model, model.baseline.saved))
    return plan, plan.peak


def test_blocks_are_cut_where_one_value_crosses(deep: tuple[Program, CostModel, StepModel]) -> None:
    _, _, model = deep
    chain = find_chain(model)
    assert chain is not None
    kinds = [block.kind for block in chain.blocks]
    most = max(set(kinds), key=kinds.count)
    assert kinds.count(most) >= DEPTH - 2
    for k, block in enumerate(chain.blocks):
        if block.kind == most:
            assert len(chain.handed(k, k + 1)) == 1
    # Together they are the whole step, each slot in one of them.
    assert [block.start for block in chain.blocks[1:]] == [block.stop for block in chain.blocks[:-1]]
    assert (chain.blocks[0].start, chain.blocks[-1].stop) == (0, len(model.operators))
    assert chain.blocks[0].last_slot == len(model.slots)
    assert chain.blocks[-1].first_slot == 0
    assert [block.last_slot for block in chain.blocks[1:]] == [b.first_slot for b in chain.blocks[:-1]]
    for block in chain.blocks:
        assert all(block.start <= model.maker[b] < block.stop for b in block.storages())


def test_a_block_by_itself_is_a_step(deep: tuple[Program, CostModel, StepModel]) -> None:
    _, _, model = deep
    chain = find_chain(model)
    assert chain is not None
    part = chain.step(10)
    plan, evaluate = Incremental(part), Evaluator(part)
    for saved in (frozenset(range(len(part.size))), frozenset[int]()):
        plan.load(saved)
        item = evaluate(saved)
        assert (plan.peak, plan.retained) == (item.peak, item.retained)
    handed = sum(model.size[b] for b in chain.handed(10, 11))
    assert plan.retained == handed


def test_nothing_repeats_nothing_is_offered() -> None:
    torch.manual_seed(0)
    widths = [8, 16, 24, 32, 40]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    program, cost = captured(
        nn.Sequential(*layers, nn.Tanh(), nn.Linear(widths[-1], 1), nn.Flatten(0)), torch.randn(32, 8)
    )
    assert find_chain(build_model(program, cost, "eager")) is None


def test_plans_of_rows_are_counted_as_the_simulator_counts_them(
    deep: tuple[Program, CostModel, StepModel],
) -> None:
    program, cost, model = deep
    chain = find_chain(model)
    assert chain is not None
    plan, top = baseline(model)
    found = list(row_plans(chain, model.seconds, [int(top * share) for share in (0.6, 0.3, 0.15, 0.1)]))
    assert len(found) >= 3
    released = 0
    for saved, let_go in found:
        plan.load(saved, let_go)
        item = plan.snapshot()
        released += len(item.released)
        profile = cost.memory([(program, to_schedule(model, item.saved, item.released))])
        assert (item.forward_peak, item.backward_peak) == (
            profile.phase_peak("forward"),
            profile.phase_peak("backward"),
        )
    assert released > 0


def test_rows_are_near_the_room_that_they_are_planned_for(
    deep: tuple[Program, CostModel, StepModel],
) -> None:
    _, _, model = deep
    chain = find_chain(model)
    assert chain is not None
    plan, top = baseline(model)
    for share in (0.7, 0.5, 0.35, 0.25):
        (start,) = row_plans(chain, model.seconds, [int(top * share)])
        plan.load(*start)
        assert plan.peak <= 1.1 * share * top


def test_no_worse_than_checkpoints_at_every_square_root(deep: tuple[Program, CostModel, StepModel]) -> None:
    """Chen et al. 2016: of 36 blocks the inputs of 5 are kept."""
    program, cost, model = deep
    chain = find_chain(model)
    assert chain is not None
    plan, _ = baseline(model)
    blocks = len(chain.blocks)
    every = round(math.sqrt(DEPTH))
    plan.load({b for k in range(every, blocks, every) for b in chain.handed(k - 1, k)})
    by_hand = plan.snapshot()
    (frontier,) = InsertCheckpoints(solver="none").propose(program, PassContext(cost, "train"))
    assert isinstance(frontier, Frontier)
    fitting = [point.seconds for point in frontier.points if point.peak_bytes <= by_hand.peak]
    assert fitting and min(fitting) <= by_hand.seconds
    cheap = [point.peak_bytes for point in frontier.points if point.seconds <= by_hand.seconds]
    assert min(cheap) <= by_hand.peak
    # Rows within rows go far below it.
    assert min(point.peak_bytes for point in frontier.points) < 0.8 * by_hand.peak


def test_skips_across_the_whole_depth_are_planned_too() -> None:
    torch.manual_seed(0)
    program, cost = captured(Deep(16, 8, skip=True), torch.randn(256, 16))
    model = build_model(program, cost, "eager")
    chain = find_chain(model)
    assert chain is not None
    plan, top = baseline(model)
    for saved, let_go in row_plans(chain, model.seconds, [top // 2, top // 3]):
        plan.load(saved, let_go)
        item = plan.snapshot()
        profile = cost.memory([(program, to_schedule(model, item.saved, item.released))])
        assert item.peak == profile.peak_bytes


def test_blocks_that_need_no_gradients_are_no_rows() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = Deep(16, 8), nn.Linear(16, 1)
            self.body.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.body.down:
                x = block(x)
            for _ in range(6):
                x = self.last.weight * torch.sin(x)
            return self.last(x).square().mean()

    # The backward ends before it comes to the frozen blocks.
    program, _ = captured(Head(), torch.randn(64, 16))
    assert program.signature.by_role("tangent")
