"""tile-convolutions: rows that tiles need, numbers, gradients, bytes, what is offered and why not."""

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
from graphopt.candidate import Candidate, NearMiss
from graphopt.capture.semantic import semantic_program
from graphopt.program import InputSpec, Program
from graphopt_passes.tile_convolutions import TileConvolutions
from graphopt_passes.tile_convolutions.windows import Window, window_of
from tests.programs import context, semantic
from tests.semantic import capture
from tests.steps import assert_close, run_step

SMALL: dict[str, Any] = {"least_elements": 16, "again": 10.0}


def proposals(
    module: Callable[..., Any], *inputs: torch.Tensor, mode: str = "infer", **options: Any
) -> tuple[Program, list[Candidate], list[str]]:
    program = semantic(module, *inputs)
    items = list(TileConvolutions(**{**SMALL, **options}).propose(program, context(mode)))
    candidates = [item for item in items if isinstance(item, Candidate)]
    return program, candidates, [item.reason.text for item in items if isinstance(item, NearMiss)]


def _layer(chosen: random.Random, channels: int) -> nn.Module:
    kernel = chosen.choice((1, 2, 3, 5))
    pad = chosen.randint(0, kernel // 2)
    kind = chosen.randrange(8)
    if kind == 0:
        return nn.MaxPool2d(kernel, chosen.choice((1, 2)), pad, chosen.choice((1, 2)))
    if kind == 1:
        return nn.AvgPool2d(kernel, chosen.choice((1, 2)), pad)
    if kind == 2:
        return nn.BatchNorm2d(channels).eval()
    if kind == 3:
        return nn.Conv2d(channels, channels, kernel, padding="same", dilation=2 if kernel % 2 else 1)
    if kind == 4:
        return nn.ZeroPad2d((chosen.randint(0, 2), 1, chosen.randint(0, 2), chosen.randint(-1, 2)))
    if kind == 5:
        return nn.ReLU(inplace=False)
    groups = chosen.choice((1, channels))
    dilation = chosen.choice((1, 1, 2))
    return nn.Conv2d(channels, channels, kernel, chosen.choice((1, 1, 2)), pad, dilation, groups)


class RandomNet(nn.Module):
    """Windows in a row, some of them with a residual around them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chosen = random.Random(seed)
        self.layers = nn.ModuleList(_layer(chosen, 4) for _ in range(chosen.randint(2, 5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        for layer in self.layers:
            y = layer(x)
            x = x + y if y.shape == x.shape else y
        return x.mean((2, 3)).sum(1)


@pytest.mark.parametrize("seed", range(30))
def test_any_tiles_of_any_network_give_the_same_numbers(seed: int) -> None:
    torch.manual_seed(seed)
    net, x = RandomNet(seed).double(), torch.randn(2, 4, 67, 53, dtype=torch.float64)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    expected = net(x)
    (captured,) = capture(net, x)
    names = [node.name for node in captured.gm.graph.nodes if node.op == "placeholder"]
    specs = [InputSpec(name, "input") for name in names]
    options = {**SMALL, "tiles": (2, 3, 5), "again": 100.0}
    known = semantic_program("g0", captured.gm, specs)
    found = TileConvolutions(**options).propose(known, context("infer"))
    candidates = [item for item in found if isinstance(item, Candidate)]
    for candidate in candidates:
        program = semantic_program("g0", copy.deepcopy(captured.gm), specs)
        with program.edit("tile-convolutions") as edit:
            candidate.apply(edit)
        (result,) = program.gm(*captured.inputs)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    # Whether tiles hold less depends on the network; of these seeds most do.
    assert candidates or seed in NOTHING_TO_GAIN


NOTHING_TO_GAIN = {7, 16}

WINDOWS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "convolution": lambda x, w: F.conv2d(x, w, stride=2, padding=1),
    "dilated": lambda x, w: F.conv2d(x, w, padding=2, dilation=2),
    "same": lambda x, w: F.conv2d(x, w, padding="same"),
    "largest": lambda x, w: F.max_pool2d(x, 3, 2, 1),
    "mean": lambda x, w: F.avg_pool2d(x, 2),
    "padding": lambda x, w: F.pad(x, (1, 1, 2, -1)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_rows_that_a_window_needs_are_those_that_change_its_result(name: str) -> None:
    x, w = torch.randn(1, 2, 12, 8), torch.randn(2, 2, 3, 3)
    program = semantic(WINDOWS[name], x, w)
    (node,) = [n for n in program.nodes() if n.meta["val"].dim() == 4]
    window = window_of(node)
    assert isinstance(window, Window)
    grad = x.clone().requires_grad_()
    result = WINDOWS[name](grad, w)
    for row in range(result.shape[2]):
        (reached,) = torch.autograd.grad(result[:, :, row].sum(), grad, retain_graph=True)
        seen = {r for r in range(12) if bool(reached[:, :, r].any())}
        first, last = window.needs(row, row + 1)
        assert seen <= set(range(first, last))
        if name in ("convolution", "same", "mean", "padding"):
            assert seen == set(range(max(first, 0), min(last, 12)))


class Stem(nn.Module):
    """What image classifiers begin with; ``train()`` lets batch norms look at the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.second, self.last = nn.Conv2d(16, 32, 3, 1, 1), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        x = F.max_pool2d(F.relu(self.second(x)), 3, 2, 1)
        return self.last(x.mean((2, 3)))


IMAGE = torch.randn(1, 3, 256, 256)


def test_a_budget_is_met_by_tiles_and_the_prediction_is_exact() -> None:
    torch.manual_seed(0)
    model = Stem().eval()
    with torch.no_grad():
        free = graphopt.optimize(model, (IMAGE,), emit="eager", on_error="raise")
        least = free.frontier()[0]
        tight = graphopt.optimize(model, (IMAGE,), budget=least.peak_bytes, emit="eager", on_error="raise")
        assert tight.plan.choices[0].alternative.startswith("tile-convolutions@max_pool2d/")
        measured = tight.measure().peak_bytes
        assert measured == tight.plan.predicted.peak_bytes == least.peak_bytes
        assert measured < 0.5 * free.measure().peak_bytes
        torch.testing.assert_close(tight(IMAGE), model(IMAGE), rtol=1e-5, atol=1e-6)


def test_norms_of_the_whole_batch_end_a_prefix() -> None:
    program, candidates, missed = proposals(Stem().train(), IMAGE, mode="train")
    assert not any("batch_norm" in name for c in candidates for name in c.nodes)
    assert any("the statistics of a batch norm are of the whole batch" in text for text in missed)
    del program


class Trained(nn.Module):
    """Layers that look at no more than their windows, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), nn.GELU(), nn.Conv2d(8, 8, 3, 1, 1), nn.GELU(), nn.MaxPool2d(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def test_gradients_of_tiles_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    model, x = Trained(), torch.randn(1, 3, 256, 256)
    free = graphopt.optimize(copy.deepcopy(model), (x,), emit="eager", on_error="raise")
    budget = free.frontier()[0].peak_bytes
    tight = graphopt.optimize(copy.deepcopy(model), (x,), budget=budget, emit="eager", on_error="raise")
    assert "tile-convolutions" in tight.plan.choices[0].alternative
    assert tight.measure().peak_bytes <= budget
    expected, found = run_step(model, (x,)), run_step(tight, (x,))
    assert_close(found, expected)


SMALLEST = torch.randn(1, 4, 16, 16)


@pytest.mark.parametrize(
    ("function", "options", "reason"),
    [
        (lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3)).sum(), {"least_elements": 10**6},
         "its largest value has 784 elements: tiling takes 2000000"),
        (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True).sum(), {}, None),
        (lambda x: F.group_norm(F.conv2d(x, torch.ones(4, 4, 3, 3)), 2).sum(), {},
         "no prefix of it holds less in tiles at 1000 % more time or less: it ends where it mixes the rows"),
    ],
)  # fmt: skip
def test_what_is_not_offered_is_reported(
    function: Callable[[torch.Tensor], torch.Tensor], options: dict[str, Any], reason: str | None
) -> None:
    _, candidates, missed = proposals(function, SMALLEST, **options)
    assert not candidates
    assert missed == ([reason] if reason else [])


def test_what_has_no_rows_is_left_alone() -> None:
    def padded(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 1), value=-100).sum() + F.max_pool1d(x, 3).sum()

    assert proposals(padded, torch.randn(8, 4096))[1:] == ([], [])


def test_no_more_is_computed_again_than_is_allowed() -> None:
    _, free, _ = proposals(Stem().eval(), IMAGE, again=10.0, tiles=(16,))
    _, none, missed = proposals(Stem().eval(), IMAGE, again=0.0, tiles=(16,))
    assert free and not none
    assert any("at 0 % more time or less" in text for text in missed)
    with pytest.raises(graphopt.PassError, match="is no share of time"):
        TileConvolutions(again=-1.0)
