"""Rows of calls that keep nothing and run again: the same gradients, less memory, nothing left behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture.blocks import find_blocks
from graphopt.capture.segments import split
from graphopt.chain_plan import Rerun
from graphopt.chain_run import ChainRunner
from tests.test_segments import one

DEPTH = 7


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.up = nn.BatchNorm1d(8), nn.Linear(8, 16)
        self.down, self.dropout = nn.Linear(16, 8), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(DEPTH))
        self.outlet = nn.Linear(8, 4)
        self.outlet.weight = nn.Parameter(self.inlet.weight.detach().t().contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return self.outlet(x).square().mean()


X = torch.randn(16, 4)

ROWS = {
    "none": (),
    "one": (Rerun(1, 4),),
    "neighbours": (Rerun(0, 3), Rerun(3, 5), Rerun(5, 6)),
    "nested": (Rerun(0, 7, (Rerun(0, 3, (Rerun(0, 2),)), Rerun(4, 6))),),
    "single": (Rerun(2, 3),),
}


class Run:
    """A net, captured and cut, with compiled segments as they come out of AOTAutograd."""

    def __init__(self, rows: tuple[Rerun, ...], dropout: float = 0.0) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.net = Net(dropout)
        captured = one(self.net, X)
        self.inputs = captured.inputs
        self.chain = split(captured.gm, find_blocks(captured.gm.graph))
        assert len(self.chain.calls) > DEPTH
        # Calls are counted from the first block on.
        first = next(k for k, call in enumerate(self.chain.calls) if self._count(call.segment) > 1)
        compiled = [torch.compile(s.gm, backend="aot_eager", dynamic=False) for s in self.chain.segments]
        written = [
            [i for i, name in enumerate(call.args) if "running" in name or "tracked" in name]
            for call in self.chain.calls
        ]
        self.run = ChainRunner(
            self.chain,
            [compiled[call.segment] for call in self.chain.calls],
            [_moved(row, first) for row in rows],
            written,
            [dropout > 0] * len(self.chain.calls),
        )

    def _count(self, segment: int) -> int:
        return sum(call.segment == segment for call in self.chain.calls)

    def loss(self) -> torch.Tensor:
        (loss,) = torch.utils._pytree.tree_leaves(self.run(list(self.inputs)))
        return loss

    def step(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        loss = self.loss()
        loss.backward()
        found = {"loss": loss.detach(), "random": torch.get_rng_state()}
        found |= {f"{n}.grad": p.grad.clone() for n, p in self.net.named_parameters() if p.grad is not None}
        return found | {n: b.clone() for n, b in self.net.named_buffers()}


def _moved(row: Rerun, by: int) -> Rerun:
    return Rerun(row.start + by, row.stop + by, tuple(_moved(inner, by) for inner in row.inner))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_gradients_statistics_and_random_numbers_are_those_of_one_run(
    rows: tuple[Rerun, ...], dropout: float
) -> None:
    plain, mine = Run((), dropout), Run(rows, dropout)
    for _ in range(2):
        same(plain.step(), mine.step())


def test_gradients_of_some_values_and_twice() -> None:
    plain, mine = Run(()), Run(ROWS["nested"])
    wanted: list[tuple[torch.Tensor, ...]] = []
    for run in (plain, mine):
        weights = [run.net.inlet.weight, run.net.blocks[3].up.weight]
        loss = run.loss()
        first = torch.autograd.grad(loss, weights, retain_graph=True)
        second = torch.autograd.grad(loss, weights)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        wanted.append(first)
    assert all(torch.equal(a, b) for a, b in zip(*wanted, strict=True))


def test_what_is_not_differentiated_leaves_nothing_behind() -> None:
    run = Run(ROWS["nested"])
    loss = run.loss()
    gone = weakref.ref(loss.grad_fn)
    gc.disable()
    try:
        del loss
        assert gone() is None
    finally:
        gc.enable()
    with torch.no_grad():
        assert not run.loss().requires_grad


def test_two_steps_at_once_do_not_mix() -> None:
    plain, mine = Run(()), Run(ROWS["nested"])
    grads: list[Any] = []
    for run in (plain, mine):
        losses = [run.loss(), run.loss()]
        losses[0].backward()
        losses[1].backward()
        grads.append([p.grad for p in run.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
