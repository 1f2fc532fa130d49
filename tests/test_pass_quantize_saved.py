"""quantize-saved: only when allowed, unbiased where it says so, within its bounds, training all the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.candidate import Candidate
from graphopt.errors import PassError
from graphopt.passes import PassContext, Proposal
from graphopt.plugins import CodecSpec, PluginHost, default_host, hookimpl
from graphopt.program import Level, Program
from graphopt_passes.compress_saved.levels import best_levels, levels_of
from graphopt_passes.compress_saved.lossy import QuantizeSaved
from tests.steps import Step, assert_same, run_step

aten = torch.ops.aten


class Always(QuantizeSaved):
    """Every candidate as one to be applied, whether it pays or not."""

    name = "always-quantize-saved"

    def propose(self, program: Program, ctx: PassContext) -> Iterator[Proposal]:
        for item in super().propose(program, ctx):
            if isinstance(item, Candidate):
                yield replace(item, delta=replace(item.delta, seconds=-1.0), alternative=False)
            else:
                yield item


class Block(nn.Module):
    """Products, a norm and an activation."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.act = nn.LayerNorm(32), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.down(self.act(self.up(y)) * self.gate(y)).square().mean()


X = torch.randn(128, 32, generator=torch.Generator().manual_seed(1))


def packed(model: nn.Module, inputs: Any = (X,), **options: Any) -> graphopt.Optimized:
    torch._dynamo.reset()
    step = Always(**{"least_bytes": 0, **options})
    return graphopt.optimize(
        copy.deepcopy(model), inputs, pipeline=[step], allow=(step.name,), emit="eager", on_error="raise"
    )


def block(act: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return Block(act or nn.GELU())


def calls(fast: graphopt.Optimized, name: str) -> int:
    target = getattr(torch.ops.graphopt, name)
    return sum(len(list(p.nodes(target))) for p in fast.programs if p.level is Level.JOINT)


def distance(ours: Step, theirs: Step) -> float:
    """The largest relative distance of a gradient."""
    found = 0.0
    for name, gradient in theirs.gradients.items():
        mine = ours.gradients[name]
        if gradient is not None and mine is not None:
            found = max(found, float((mine - gradient).norm() / gradient.norm()))
    return found


def test_it_is_left_out_unless_it_is_allowed() -> None:
    model = block()
    torch._dynamo.reset()
    fast = graphopt.optimize(copy.deepcopy(model), (X,), emit="eager", on_error="raise")
    (record,) = [r for r in fast.report.steps if r.id == "quantize-saved"]
    assert (record.status, record.reason) == (
        "skipped",
        "changes results: runs with allow=('quantize-saved',)",
    )
    assert_same(run_step(fast, (X,)), run_step(model, (X,)))


@pytest.mark.parametrize(("codec", "bound"), [("groups-8", 0.02), ("groups-4", 0.3), ("groups-2", 1.5)])
def test_outputs_are_exact_and_gradients_close(codec: str, bound: float) -> None:
    model = block()
    fast = packed(model, codec=codec)
    assert calls(fast, "quantize_groups") == calls(fast, "dequantize_groups") >= 2
    ours, theirs = run_step(fast, (X,)), run_step(model, (X,))
    assert torch.equal(ours.outputs[0], theirs.outputs[0])
    assert torch.equal(ours.random, theirs.random)
    assert 0 < distance(ours, theirs) < bound
    assert_same(ours, run_step(fast, (X,)))


def test_by_default_products_alone_read_what_is_packed() -> None:
    fast = packed(block())
    missed = {miss.at: miss.reason.text for miss in fast.report.near_misses}
    assert any(
        text == "aten.gelu_backward.default is not a product: unbiased=False packs it"
        for text in missed.values()
    )
    assert calls(fast, "pack_levels") == 0


@pytest.mark.parametrize(
    "act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Hardswish()]
)
def test_derivatives_of_activations_are_held_as_levels(act: nn.Module) -> None:
    model = block(act)
    fast = packed(model, unbiased=False)
    assert calls(fast, "pack_levels") == calls(fast, "unpack_levels") == 1
    assert calls(fast, "quantize_groups") >= 2
    ours, theirs = run_step(fast, (X,)), run_step(model, (X,))
    assert torch.equal(ours.outputs[0], theirs.outputs[0])
    assert 0 < distance(ours, theirs) < 0.1


def test_the_sign_that_a_relu_needs_is_held_beside_the_codes() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    fast = packed(model)
    assert calls(fast, "pack_bits") == calls(fast, "quantize_groups") == 1
    ours, theirs = run_step(fast, (X,)), run_step(model, (X,))
    # What flows through the sign is exact; what is a product with the value is not.
    assert torch.equal(*(step.gradients["0.weight"] for step in (ours, theirs)))  # type: ignore[arg-type]
    assert 0 < distance(ours, theirs) < 0.02


def test_memory_is_a_fraction_and_the_peak_predicted() -> None:
    model = nn.Sequential(
        *[m for _ in range(6) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.GELU())], nn.Flatten()
    )
    x = (torch.randn(8, 8, 32, 32),)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).square().mean()

    torch._dynamo.reset()
    plain = graphopt.optimize(Loss(), x, pipeline=[], emit="eager", on_error="raise")
    fast = packed(Loss(), x, unbiased=False)
    saved = [sum(v.bytes for v in module.plan.choices[0].saved) for module in (plain, fast)]
    assert saved[1] < 0.3 * saved[0]
    predicted, measured = fast.plan.predicted.peak_bytes, fast.measure(x, repeats=1).peak_bytes
    assert abs(predicted - measured) <= 64 < plain.plan.predicted.peak_bytes - measured


def test_a_small_net_trains_to_the_same_loss() -> None:
    def final_loss(model: nn.Module) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(80):
            optimizer.zero_grad()
            loss = model(inputs, target)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
            )

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.body(x) - y).square().mean()

    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    target = inputs[:, :1].sin() + inputs[:, 1:2] * inputs[:, 2:3]
    net = Net()
    start = float(net(inputs, target).detach())
    fast = packed(net, (inputs, target), codec="groups-4", unbiased=False)
    exact = final_loss(net)
    assert exact < start / 4, "the net does not train: the test proves nothing"
    assert abs(final_loss(fast) - exact) < 0.05 * start


def test_candidates_say_what_is_lost() -> None:
    found: list[Candidate] = []

    class Watch(Always):
        name = "watch-quantize-saved"

        def propose(self, program: Program, ctx: PassContext) -> Iterator[Proposal]:
            for item in QuantizeSaved.propose(self, program, ctx):
                if isinstance(item, Candidate):
                    found.append(item)
            return iter(())

    torch._dynamo.reset()
    step = Watch(codec="groups-4", unbiased=False, least_bytes=0)
    graphopt.optimize(block(), (X,), pipeline=[step], allow=(step.name,), emit="eager", on_error="raise")
    told = {(c.id.partition("/")[2], c.exactness, c.metric, round(c.delta.error, 4)) for c in found}
    assert told == {
        ("groups", "lossy", "share of the range of 256 neighbours", 0.0667),
        ("levels", "lossy", "difference of the derivative", 0.0594),
    }
    assert all(c.delta.peak_bytes < 0 and c.alternative for c in found)


def test_bad_options_are_refused() -> None:
    with pytest.raises(PassError, match="quantize-saved: activation_bits=3: expected 0, 1, 2 or 4"):
        QuantizeSaved(activation_bits=3)
    with pytest.raises(PassError, match="quantize-saved: least_bytes=-1: expected a whole number, 0 or more"):
        QuantizeSaved(least_bytes=-1)
    with pytest.raises(PassError, match="unknown codec 'groups-5'; did you mean 'groups-8'"):
        packed(block(), codec="groups-5")


def test_a_plugin_may_bring_a_codec() -> None:
    class Halves:
        graphopt_api = 1

        @hookimpl
        def graphopt_codecs(self) -> list[CodecSpec]:
            return [CodecSpec("halves", "to-half", "from-half", 16, 0.0, "nothing", unbiased=False)]

    host = PluginHost([Halves()], entry_points=())
    assert host.codec("halves").bits == 16
    with pytest.raises(graphopt.UnknownNameError, match="unknown codec 'halfs'; did you mean 'halves'"):
        host.codec("halfs")
    assert {f"groups-{bits}" for bits in (2, 4, 8)} <= set(default_host().codecs())


# --- levels --------------------------------------------------------------------------------


def test_levels_are_the_best_of_their_grid() -> None:
    """Against every choice of two thresholds out of a coarse set."""

    def function(x: Any) -> Any:
        return np.tanh(2 * x)

    found = best_levels(function, -2.0, 2.0, 3)
    x = np.linspace(-2, 2, 4001)
    y = function(x)

    def error(thresholds: tuple[float, ...]) -> float:
        piece = np.searchsorted(np.array(thresholds), x)
        means = np.array([y[piece == k].mean() for k in range(3)])
        return float(((means[piece] - y) ** 2).mean())

    ours = error(found.thresholds)
    others = [
        error((a, b)) for a in np.linspace(-1.9, 1.8, 40) for b in np.linspace(-1.8, 1.9, 40) if a < b - 0.05
    ]
    assert ours <= min(others) + 1e-6
    assert abs(found.mean_square - ours) < 1e-4


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_error_of_levels_is_a_bound(bits: int) -> None:
    found = levels_of(aten.gelu_backward.default, (), (), bits)
    assert len(found.levels) == 2**bits == len(found.thresholds) + 1
    x = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    slope = aten.gelu_backward(torch.ones_like(x), x)
    level = torch.tensor(found.levels, dtype=torch.float64)[
        torch.bucketize(x, torch.tensor(found.thresholds, dtype=torch.float64))
    ]
    # The grid's pieces are 1/1024 of the interval wide.
    assert float((level - slope).abs().max()) <= found.error + 0.01


def test_generated_code_rounds_as_operators_do() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16))
    step = Always(least_bytes=0, codec="groups-4")
    found = []
    for emit in ("eager", "inductor"):
        torch._dynamo.reset()
        fast = graphopt.optimize(
            copy.deepcopy(model), (X,), pipeline=[step], allow=(step.name,), emit=emit, on_error="raise"
        )
        found.append(run_step(fast, (X,)))
    exact = run_step(model, (X,))
    assert 0 < distance(found[0], exact) < 0.3
    # A last bit of the product may tip a code over, and an element with it.
    assert distance(found[1], found[0]) < 0.05
