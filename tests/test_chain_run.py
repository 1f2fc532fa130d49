"""Rows of calls that keep nothing and run again: the same gradients, less memory, nothing left behind."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture.aliasing import alias_map
from graphopt.capture.blocks import find_blocks
from graphopt.capture.segments import split
from graphopt.chain_plan import Rerun
from graphopt.chain_run import ChainRunner, Layout
from graphopt.errors import LoweringError
from graphopt.host_memory import HostMemory, Moved
from graphopt_kernels.dropout_add import dropout_add  # noqa: F401  (registers the operator)
from graphopt_kernels.philox import drawn_seed
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
        written = [_written(self.chain.segments[call.segment].gm) for call in self.chain.calls]
        assert any(written)
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
        for number, value in enumerate(x for x in self.inputs if isinstance(x, torch.Tensor)):
            # Statistics are among the inputs, and written.
            found[f"input {number}"] = value.detach().clone()
            if value.grad is not None:
                found[f"gradient {number}"] = value.grad.clone()
        return found


def _written(gm: torch.fx.GraphModule) -> list[int]:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    written = alias_map(gm.graph).written
    return [k for k, node in enumerate(placeholders) if node in written]


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


class Seeded(nn.Module):
    """Dropout as ``fuse-dropout`` writes it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.graphopt.dropout_add(x, None, self.p, drawn_seed(x.device))  # type: ignore[no-any-return]


def test_dropout_by_a_seed_drops_the_same_when_its_row_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "Dropout", Seeded)
    plain, mine = Run((), 0.3), Run(ROWS["nested"], 0.3)
    same(plain.step(), mine.step())
    assert not torch.equal(plain.loss(), plain.loss())


def test_gradients_of_some_values_and_twice() -> None:
    plain, mine = Run(()), Run(ROWS["nested"])
    wanted: list[tuple[torch.Tensor, ...]] = []
    for run in (plain, mine):
        weights = [x for x in run.inputs if isinstance(x, torch.Tensor) and x.requires_grad][::5]
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
        grads.append([x.grad for x in run.inputs if isinstance(x, torch.Tensor) and x.requires_grad])
        assert all(gradient is not None for gradient in grads[-1])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Shelf(HostMemory):
    """Stands in for pinned memory: takes values away and brings them back at once, and keeps a diary."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.diary: list[str] = []
        self.waiting = 0

    def move(self, value: torch.Tensor) -> Moved:
        self.diary.append("move")
        self.waiting += 1
        host = value.detach().clone()
        return Moved(value.detach(), tuple(value.shape), value.stride(), value.dtype, value.device, host)

    def release(self, moved: Moved) -> None:
        self.diary.append("release")
        moved.value = None

    def prefetch(self, moved: Moved) -> None:
        if moved.value is None:
            assert moved.host is not None
            self.diary.append("prefetch")
            moved.value = moved.host.clone()

    def forget(self, moved: Moved) -> None:
        self.waiting -= moved.host is not None
        moved.host = None

    def _give(self, moved: Moved) -> None:
        self.waiting -= 1
        moved.host = None


def _moving(rows: tuple[Rerun, ...], calls: Sequence[int]) -> tuple[Run, Shelf]:
    """A run that moves every value that the given calls save and that is not a parameter."""
    run = Run(rows)
    shelf = Shelf()
    layouts: dict[int, dict[int, Layout]] = {}
    held = {p.data_ptr() for p in run.inputs if isinstance(p, torch.Tensor) and p.requires_grad}
    inner = run.run.functions

    def noting(k: int) -> Any:
        def call(*args: Any) -> Any:
            count = iter(range(100))

            def pack(value: torch.Tensor) -> torch.Tensor:
                i = next(count)
                if value.data_ptr() not in held:
                    layouts.setdefault(k, {})[i] = Layout(tuple(value.shape), value.stride(), value.dtype)
                return value

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
                return inner[k](*args)

        return call

    reruns, run.run.reruns = run.run.reruns, ()
    run.run.functions = [noting(k) for k in range(len(inner))]
    torch.manual_seed(7)
    before = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in run.inputs]
    run.loss()
    for value, old in zip(run.inputs, before, strict=True):
        if isinstance(value, torch.Tensor):
            value.data.copy_(old)
    run.run = ChainRunner(
        run.chain, inner, reruns, run.run.written, run.run.random, {k: layouts[k] for k in calls}, shelf
    )
    return run, shelf


@pytest.mark.parametrize("rows", [(), (Rerun(2, 4),)], ids=["alone", "beside a row"])
def test_moved_values_come_back_before_they_are_needed(rows: tuple[Rerun, ...]) -> None:
    calls = [1, 2, 6]
    mine, shelf = _moving(rows, calls)
    plain = Run(())
    for _ in range(2):
        shelf.diary.clear()
        same(plain.step(), mine.step())
        values = [len(mine.run.moves[k]) for k in calls]
        order = [(entry, len(list(group))) for entry, group in itertools.groupby(shelf.diary)]
        # One call's values are on their way at a time: the next are moved before they are let go.
        assert order[0] == ("move", values[0] + values[1])
        assert [n for entry, n in order if entry == "prefetch"] == [sum(values)]
        assert shelf.diary.count("release") == sum(values)
        assert shelf.waiting == 0


def test_moved_values_that_nobody_asks_for_give_their_host_memory_back() -> None:
    run, shelf = _moving((), [1, 2])
    loss = run.loss()
    assert shelf.waiting > 0
    del loss
    gc.collect()
    assert shelf.waiting == 0


def test_a_value_that_is_not_what_the_plan_moves_is_an_error() -> None:
    run, _ = _moving((), [1])
    run.run.moves[1] = {i: Layout((1, 2), (2, 1), torch.float32) for i in run.run.moves[1]}
    with pytest.raises(LoweringError, match=r"call 1 saves .* the plan moves float32\[1, 2\]"):
        run.loss()
