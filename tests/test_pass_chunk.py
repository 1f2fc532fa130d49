"""chunk: which regions are found, what is offered, numbers, gradients, bytes, why places are left alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.budget import Budget
from graphopt.candidate import Candidate, NearMiss
from graphopt.capture.semantic import semantic_program
from graphopt.capture.structure import line_of
from graphopt.program import InputSpec, Program
from graphopt.session import Session
from graphopt.step_cost import every_schedule, step_curve
from graphopt_passes.chunk import Chunk
from graphopt_passes.chunk.region import Region, regions
from graphopt_passes.insert_checkpoints import InsertCheckpoints
from tests.programs import context, semantic
from tests.semantic import Captured, capture
from tests.steps import run_step

BATCH, LENGTH, WIDTH = 4, 32, 16


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(F.gelu(self.wide(self.norm(x))))


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.inner(self.norm(x)).view(batch, length, 3, 2, width // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return x + self.outer(mixed.transpose(1, 2).reshape(batch, length, width))


class Layers(nn.Module):
    """Transformer layers on an input that needs no gradient; the loss is a mean over all."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def found(module: Callable[..., Any], *inputs: torch.Tensor, axis: str = "batch") -> list[list[str]]:
    """The regions along an axis that make new values, by the names of their calls."""
    program = semantic(module, *inputs)
    return [_names(r) for r in regions(program, line_of(program.graph), axis) if r.inner]


def _names(region: Region) -> list[str]:
    return [node.name for node in region.nodes]


def proposals(
    module: Callable[..., Any], *inputs: torch.Tensor, **options: Any
) -> tuple[list[Candidate], list[NearMiss]]:
    settings: dict[str, Any] = {"least_elements": 256, **options}
    items = list(Chunk(**settings).propose(semantic(module, *inputs), context()))
    candidates = [item for item in items if isinstance(item, Candidate)]
    misses = [item for item in items if isinstance(item, NearMiss)]
    assert len(candidates) + len(misses) == len(items)
    return candidates, misses


def reasons(module: Callable[..., Any], *inputs: torch.Tensor, **options: Any) -> list[str]:
    return [miss.reason.text for miss in proposals(module, *inputs, **options)[1]]


def rows(width: int = WIDTH) -> torch.Tensor:
    return torch.randn(BATCH, LENGTH, width)


def test_a_region_along_the_batch_holds_whole_layers() -> None:
    (region,) = found(Layers(Attention(), Mlp(), Attention(), Mlp()), rows())
    assert sum(name.startswith("scaled_dot_product") for name in region) == 2
    assert region[0] == "layer_norm" and region[-1] == "square"


def test_a_region_along_the_positions_goes_from_one_attention_to_the_next() -> None:
    layers = Layers(Attention(), Mlp(), Attention(), Mlp())
    first, second, third = found(layers, rows(), axis="positions")
    assert first == ["layer_norm", "linear"]
    assert {"linear_1", "layer_norm_1", "gelu", "add_1", "layer_norm_2", "linear_4"} <= set(second)
    assert "gelu_1" in third and not any("attention" in name for name in (*second, *third))


def test_each_number_of_slices_is_one_family_over_all_places() -> None:
    candidates, _ = proposals(Layers(Attention(), Mlp(), Attention(), Mlp()), rows(), ratio=1.0)
    families = {c.family for c in candidates}
    assert families == {
        f"chunk@*/{axis}/{k}"
        for axis, most in (("batch", 4), ("positions", 16))
        for k in (2, 4, 8, 16)
        if k <= most
    }
    placed = [c for c in candidates if c.family == "chunk@*/positions/4"]
    assert len(placed) == 2
    assert all(c.alternative and c.exactness == "reassociated" and c.delta.peak_bytes < 0 for c in placed)
    assert "chunk@layer_norm/batch/4" in {c.id for c in candidates}


def _halves(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a.sin() * b, b.cos()], -1).exp()


SINGLE: dict[str, tuple[Callable[..., Any], str]] = {
    "linear": (lambda x, w: F.linear(x, w).tanh(), "batch"),
    "positions": (lambda x, w: F.linear(x, w).tanh(), "positions"),
    "matmul": (lambda x, w: (x @ w.t()).tanh(), "positions"),
    "matrices": (lambda x, w: (x @ x.transpose(1, 2)).tanh().sum(-1), "batch"),
    "softmax": (lambda x, w: F.softmax(x @ w.t(), -1).log_softmax(1), "batch"),
    "flatten": (lambda x, w: F.linear(x.flatten(0, 1), w).exp().view(4, 8, 6), "batch"),
    "unflatten": (lambda x, w: (x @ w).unflatten(-1, (2, 3)).exp().transpose(1, 2).sum(-1), "batch"),
    "split": (_halves, "positions"),
    "stack": (lambda x, w: torch.stack([x.sin(), x @ w], 0).exp().mean(0), "batch"),
    "select": (lambda x, w: x.exp()[:, 2].sin().unsqueeze(1).exp(), "batch"),
    "slice": (lambda x, w: x.exp()[..., 1:5].sin().exp(), "positions"),
    "variance": (lambda x, w: (x - x.exp().mean(-1, keepdim=True)) * x.var(-1, keepdim=True), "batch"),
    "maximum": (lambda x, w: x.exp().amax(1).sin().exp(), "batch"),
    "expand": (lambda x, w: (x.sum(-1).exp().unsqueeze(-1).expand(4, 8, 6) * x).exp(), "batch"),
    "where": (lambda x, w: torch.where(x > 0, x.exp(), 0.0).sin().masked_fill(x > 1, 2.0), "batch"),
    "uneven": (lambda x, w: F.linear(x, w).tanh().exp(), "positions"),
    "whole": (lambda x, w: (x.exp() * torch.linspace(0, 1, 192).view(4, 8, 6)).sin(), "batch"),
    "broadcast": (lambda x, w: (x.exp() * torch.linspace(0, 1, 48).view(1, 8, 6)).sin(), "batch"),
    "pad": (lambda x, w: F.pad(x.exp(), (1, 2)).sin().cumsum(-1), "positions"),
    "rms": (lambda x, w: F.rms_norm(F.rms_norm(x.exp(), (6,), w[0]), (8, 6)).sin(), "batch"),
}


@pytest.mark.parametrize("name", SINGLE)
def test_operators_are_the_same_slice_by_slice(name: str) -> None:
    """Values and gradients in float64, the rewritten program against the function."""
    function, axis = SINGLE[name]
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    (entry,) = capture(function, x, w)
    program = program_of(entry)
    assert _cut(program, axis, 2 if name != "uneven" else 3), "no region was cut: the test proves nothing"
    results = []
    for out in (function(x, w), program.gm(*entry.inputs)[0]):
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, w), allow_unused=True)))
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def program_of(entry: Captured) -> Program:
    places = [node.name for node in entry.gm.graph.nodes if node.op == "placeholder"]
    return semantic_program("g0", entry.gm, [InputSpec(name, "input") for name in places])


def _cut(program: Program, axis: str, count: int) -> int:
    """Cut every region of a program, whatever it gains; returns how many there were."""
    step = Chunk(chunks=(count,), least_elements=1, ratio=0.0)
    wanted = [c for c in step.propose(program, context()) if isinstance(c, Candidate) and f"/{axis}/" in c.id]
    for candidate in wanted:
        with program.edit("chunk") as edit:
            candidate.apply(edit)
    splits = list(program.nodes(torch.ops.aten.split_with_sizes))
    assert not wanted or len(splits) >= len(wanted)
    return len(wanted)


class Convolutions(nn.Module):
    """A prefix of convolutions, pooling and group norms; channels last in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.silu(self.norm(self.one(x))), 2)
        x = F.gelu(self.two(x)).permute(0, 2, 3, 1)
        return F.adaptive_avg_pool2d(self.head(x).permute(0, 3, 1, 2), 1).flatten(1)


def test_convolutions_pools_and_group_norms_are_cut_along_the_batch() -> None:
    torch.manual_seed(0)
    module, x = Convolutions().double(), torch.randn(6, 3, 16, 16, dtype=torch.float64)
    (entry,) = capture(module, x)
    program = program_of(entry)
    assert _cut(program, "batch", 3) == 1
    out, weights = program.gm(*entry.inputs)[0], list(module.parameters())
    torch.testing.assert_close(out, module(x), rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad(out.sin().sum(), weights)
    theirs = torch.autograd.grad(module(x).sin().sum(), weights)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


# --- why places are left alone ---------------------------------------------------------------


def test_statistics_of_the_batch_end_a_region() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.a(x).relu()).relu().mean()

    (first, *_) = reasons(Normed(), torch.randn(4, 3, 16, 16))
    assert first.endswith("it ends where the statistics of a batch norm are of the whole batch")
    # Outside training the statistics are constants.
    assert proposals(Normed().eval(), torch.randn(4, 3, 16, 16), ratio=0.5)[0]


def test_random_numbers_end_a_region() -> None:
    drops = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, WIDTH))
    assert any(
        text.endswith("it ends where it draws random numbers, slice by slice in another order")
        for text in reasons(Layers(drops), rows())
    )
    assert proposals(Layers(drops).eval(), rows())[0]
    attention = Layers(Attention(dropout=0.1))
    assert not any("scaled_dot" in name for region in found(attention, rows()) for name in region)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: x.exp().sin().cos().relu_().exp(), "its memory is written in place"),
        (lambda x: x.exp().sin().exp().flip(0).cumsum(0).exp(), "it mixes the rows"),
        (lambda x: x.exp().sin().roll(1, 0).exp(), "it may mix the rows"),
        # Norms that have running statistics, and no switch for them of that name.
        (lambda x: F.instance_norm(x.exp().sin()[None])[0].exp(), "it may mix the rows"),
    ],
)
def test_what_ends_a_region_is_said(function: Callable[..., Any], text: str) -> None:
    assert any(text in reason for reason in reasons(function, rows(), ratio=100.0))


def test_too_little_to_gain_is_said() -> None:
    mlp = Layers(Mlp())
    small = "its largest value has 8192 elements: cutting takes 131072"
    assert small in reasons(mlp, rows(), least_elements=65536)
    assert "there are 4 slices at most" in reasons(mlp, rows(), chunks=(8,))
    assert "unrolled it would be more than 10 calls" in reasons(mlp, rows(), most_nodes=10)
    flat = reasons(lambda x: x.exp().sin(), rows())
    assert flat and all(
        text.startswith("its values take 0.5 times what enters and leaves, less than 2") for text in flat
    )


def test_tables_are_not_cut() -> None:
    def look_up(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, table).exp().sin().exp().sum(-1)

    (region,) = found(look_up, torch.randint(0, 9, (4, 8)), torch.randn(9, 6))
    assert not any(name.startswith("embedding") for name in region)


# --- whole steps, op by op -------------------------------------------------------------------


def step(
    make: Callable[[], nn.Module], inputs: Any, *, share: float = 0.1, chunks: tuple[int, ...] = (4,)
) -> graphopt.Optimized:
    """A step under a budget that only slices meet, against eager in float64, its peak as predicted."""
    torch.manual_seed(0)
    plain = make()
    torch._dynamo.reset()
    cut = graphopt.optimize(
        copy.deepcopy(plain), inputs, pipeline=pipeline(*chunks), emit="eager", on_error="raise"
    )
    session = cut._driver.session
    (captured,) = session.current
    whole, sliced = least_peaks(session)
    assert sliced < whole, "slices free nothing: the test proves nothing"
    # As optimize() with that budget, without another capture.
    budget = (session.static_bytes or 0) + int(sliced + share * (whole - sliced))
    session.budget, captured.provisional = Budget.of(budget), True
    session.finish()
    assert cut.plan.choices[0].alternative.startswith("chunk@")
    # A larger batch sums more terms; tolerances are of sums in float32 over a few thousand.
    expected = run_step(copy.deepcopy(plain).double(), tuple(_double(t) for t in inputs))
    mine = run_step(cut, inputs)
    for key, gradient in expected.gradients.items():
        if gradient is not None:
            torch.testing.assert_close(mine.gradients[key].double(), gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine.outputs[0].double(), expected.outputs[0], rtol=1e-5, atol=1e-6)
    cut.zero_grad()
    assert cut.measure(inputs, repeats=1).peak_bytes == cut.plan.predicted.peak_bytes <= budget
    return cut


def pipeline(*chunks: int) -> tuple[Chunk, InsertCheckpoints]:
    return Chunk(chunks=chunks, least_elements=64), InsertCheckpoints(targets=6)


def least_peaks(session: Session) -> tuple[int, int]:
    """The least peak of the program itself, and that of a form of it."""
    (captured,) = session.current
    with every_schedule(session):
        own, forms = captured.forms[""].frontier, captured.frontier
        assert own is not None and forms is not None
        return (
            min(point.peak_bytes for point in own.points),
            min(point.peak_bytes for point in forms.points if point.alternative),
        )


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def test_one_slice_is_alive_at_a_time() -> None:
    """Whole layers along the batch: the peak falls well below that of any recomputation alone."""
    cut = step(lambda: Layers(Attention(), Mlp()), (torch.randn(8, 64, WIDTH),), chunks=(8,))
    whole, sliced = least_peaks(cut._driver.session)
    assert sliced < 0.5 * whole
    # The products of every slice run again on the way back.
    again = [item for item in cut.plan.choices[0].recomputed if "addmm" in item.op]
    assert len(again) >= 8


def test_positions_are_cut_where_there_is_one_sample() -> None:
    cut = step(lambda: Layers(Mlp(), Mlp()), (torch.randn(1, 256, WIDTH),))
    assert "/positions/" in cut.plan.choices[0].alternative


def test_tied_weights_get_the_sum_of_all_their_gradients() -> None:
    class Tied(Layers):
        def __init__(self) -> None:
            super().__init__(Mlp(), Mlp())
            self.layers[1].wide.weight = self.layers[0].wide.weight

    step(Tied, (torch.randn(8, 64, WIDTH),))


def test_inputs_that_need_gradients_get_them() -> None:
    x = torch.randn(8, 64, WIDTH, requires_grad=True)
    step(lambda: Layers(Mlp(), Mlp()), (x,))


def test_regions_under_autocast_compute_in_its_dtype() -> None:
    class Mixed(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.layers(x)
            return y.float().square().mean()

    torch.manual_seed(0)
    plain, x = Mixed(Mlp(), Mlp()), torch.randn(8, 64, WIDTH)
    torch._dynamo.reset()
    cut = graphopt.optimize(copy.deepcopy(plain), (x,), pipeline=pipeline(4), emit="eager", on_error="raise")
    session = cut._driver.session
    lowest = step_curve(session, session.static_bytes or 0)[0][0]
    session.budget, session.current[0].provisional = Budget.of(lowest), True
    session.finish()
    assert cut.plan.choices[0].alternative.startswith("chunk@")
    expected, mine = run_step(plain, (x,)), run_step(cut, (x,))
    for key, gradient in expected.gradients.items():
        if gradient is not None:
            scale = gradient.abs().max()
            # Two roundings to bfloat16 of sums in another order.
            assert (mine.gradients[key] - gradient).abs().max() <= 2**-6 * scale, key
    # A weight that is cast once for all slices is held as it was.
    assert cut.measure((x,), repeats=1).peak_bytes <= lowest


@pytest.mark.slow
def test_compiled_segments_are_cut_where_the_budget_needs_it() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(2) for layer in (Attention(64), Mlp(64))]
    plain, inputs = Layers(*layers), (torch.randn(4, 256, 64),)
    torch._dynamo.reset()
    steps = (Chunk(chunks=(4,), least_elements=1024), InsertCheckpoints())
    cut = graphopt.optimize(
        copy.deepcopy(plain), inputs, pipeline=steps, emit="inductor", on_error="raise", budget="30%"
    )
    assert any(choice.alternative.startswith("chunk@") for choice in cut.plan.choices)
    expected, mine = run_step(plain, inputs), run_step(cut, inputs)
    for key, gradient in expected.gradients.items():
        if gradient is not None:
            torch.testing.assert_close(mine.gradients[key], gradient, rtol=1e-4, atol=1e-6)
    cut.zero_grad()
    assert cut.plan.budget is not None
    assert cut.measure(inputs, repeats=1).peak_bytes <= cut.plan.budget


class Random(nn.Module):
    """A random net of row-wise steps on ``[8, 24, 16]``, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.kinds = [draw.choice("lmnsgrca") for _ in range(6)]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(6))
        self.wide = nn.Linear(WIDTH, 8 * WIDTH)
        self.back = nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.back(F.silu(self.wide(x)))
        for kind, w in zip(self.kinds, self.weights, strict=True):
            y = self._step(kind, x, y, w)
        return y.square().mean()

    def _step(self, kind: str, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if kind == "l":
            return F.linear(y, w).tanh() + x
        if kind == "m":
            return (y.flatten(0, 1) @ w).view_as(x).sigmoid() * y
        if kind == "n":
            return F.layer_norm(y, (WIDTH,), w[0], w[1])
        if kind == "s":
            return F.softmax(y, -1) * x
        if kind == "g":
            a, b = y.chunk(2, -1)
            return torch.cat([a * torch.sigmoid(b), b.exp().clamp(max=3.0)], -1)
        if kind == "r":
            return y - y.mean(1, keepdim=True) * y.amax(-1, keepdim=True)
        if kind == "c":
            return (y.unflatten(-1, (2, -1)).transpose(2, 3).flatten(2) @ w).cos()
        heads = y.view(8, 24, 2, 8).transpose(1, 2)
        return (
            F.scaled_dot_product_attention(heads, heads @ heads.mT @ heads / 64, heads)
            .transpose(1, 2)
            .reshape(x.shape)
        )


@pytest.mark.parametrize("seed", range(2))
def test_random_nets_keep_numbers_and_peak(seed: int) -> None:
    step(lambda: Random(seed), (torch.randn(8, 24, WIDTH),))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 40))
def test_many_random_nets_keep_numbers_and_peak(seed: int) -> None:
    step(lambda: Random(seed), (torch.randn(8, 24, WIDTH),))
