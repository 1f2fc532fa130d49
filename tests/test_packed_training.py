"""Adapters of low rank, trained beside packed weights that are frozen: gradients, and how they start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import QuantizationError
from graphopt.packing import low_rank_correction, pack_weights, packed_weights
from graphopt.plugins import default_host

SCHEMES = ("int4{group=64}", "nf4", "int2", "int3{group=32,outliers=0.5}")
WIDTH, RANK = 128, 4


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


class Adapted(nn.Module):
    """A linear that is frozen, and two thin ones beside it (LoRA, https://arxiv.org/abs/2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.gate = Adapted(nn.Linear(WIDTH, 2 * WIDTH), RANK)
        self.out = Adapted(nn.Linear(2 * WIDTH, WIDTH, bias=False), RANK)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.nn.functional.gelu(self.gate(self.norm(x)))
        return x + torch.tanh(self.out(hidden))


def network(scheme: str | None, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(depth)))
    for name, parameter in model.named_parameters():
        if ".up." in name:
            # Zero at first, as LoRA starts, would hide the gradient of the other.
            nn.init.normal_(parameter, std=0.05)
    if scheme is not None:
        found = default_host().scheme(scheme)
        names = [name for name, _ in model.named_parameters() if name.endswith("base.weight")]
        pack_weights(model, dict.fromkeys(names, (found, "rows")))
    return model


def exact(model: nn.Sequential) -> nn.Sequential:
    """In float64, with the weights that the packed ones stand for."""
    other = network(None, len(model))
    with torch.no_grad():
        for block, packed in zip(other, model, strict=True):
            for name in ("gate", "out"):
                base: Any = getattr(packed, name).base
                getattr(block, name).base.weight.copy_(base.weight)
    return other.double()


def gradients(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    run(x).square().mean().backward()
    assert x.grad is not None
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 12 and all(grad is not None for grad in trained.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {"x": x.grad.clone(), **{name: grad.clone() for name, grad in trained.items() if grad is not None}}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_of_packed_weights_get_the_gradients_of_float64(scheme: str) -> None:
    model, x = network(scheme), torch.randn(4, 8, WIDTH)
    assert len(packed_weights(model)) == 6
    assert not any(name.endswith("base.weight") for name, _ in model.named_parameters())
    reference = exact(model)
    expected = gradients(reference, reference, x.double())
    found = gradients(model, model, x)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        error = (grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("scheme", SCHEMES[:3])
def test_they_get_them_under_a_budget_with_layers_computed_again(scheme: str) -> None:
    x = torch.randn(16, 32, WIDTH)
    model = network(scheme)
    reference = exact(model)
    expected = gradients(reference, reference, x.double())
    given = (x.clone().requires_grad_(),)
    whole = graphopt.optimize(network(scheme), given, emit="eager", on_error="raise")
    fast = graphopt.optimize(
        model, given, emit="eager", on_error="raise", budget="75%", allow=("insert-checkpoints",)
    )
    (step,) = (step for step in fast.report.steps if step.id == "insert-checkpoints")
    assert step.status == "applied", step
    assert fast.report.predicted.peak_bytes < 0.76 * whole.report.predicted.peak_bytes
    # Packed weights are read by products, in the layers that are computed again as well.
    targets = [str(node.target) for program in fast.programs for node in program.nodes()]
    name = scheme.split("{")[0]
    assert sum(f"linear_{name}" in target for target in targets) >= 6, targets
    found = gradients(model, fast, x)
    for key, grad in found.items():
        error = (grad.double() - expected[key]).norm() / expected[key].norm()
        assert error < 1e-5, (key, error)


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    model = network("int2", depth=2)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    x = torch.randn(64, WIDTH)
    target = torch.tanh(x @ (torch.randn(WIDTH, WIDTH) / WIDTH**0.5))
    fast = graphopt.optimize(model, (x,), emit="eager", on_error="raise")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (fast(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())


# --- how adapters start -------------------------------------------------------------------------


def weight_of(n: int = 96, k: int = 128) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n, k) / k**0.5 + torch.randn(n, 3) @ torch.randn(3, k) / k**0.5


@pytest.mark.parametrize("text", ["int2", "int4", "nf4"])
def test_matrices_of_low_rank_make_good_what_packing_takes(text: str) -> None:
    scheme, weight = default_host().scheme(text), weight_of()
    errors = []
    for rank in (1, 8, 96):
        found = low_rank_correction(weight, scheme, rank)
        unpacked = scheme.unpack(scheme.pack(found.base, {}), 96, 128, torch.float32)
        both = unpacked + found.up @ found.down
        square = weight.square().sum()
        assert found.up.shape == (96, rank) and found.down.shape == (rank, 128)
        assert torch.equal(found.base, weight)
        left, before = (float((weight - near).square().sum() / square) for near in (both, unpacked))
        assert left == pytest.approx(found.error, rel=1e-3, abs=1e-9)
        assert before == pytest.approx(found.error_before, rel=1e-4)
        errors.append(found.error)
    assert errors[0] > errors[1] > errors[2] and errors[1] < found.error_before and errors[2] < 1e-9


def test_more_turns_are_no_worse_and_other_numbers_are_packed() -> None:
    scheme, weight = default_host().scheme("int2"), weight_of()
    once, often = (low_rank_correction(weight, scheme, 8, turns=turns) for turns in (1, 5))
    assert often.error < 0.95 * once.error and often.error_before == once.error_before
    assert not torch.equal(often.base, weight) and often.base.dtype is weight.dtype
    both = scheme.unpack(scheme.pack(often.base, {}), 96, 128, torch.float32) + often.up @ often.down
    error = float((weight - both).square().sum() / weight.square().sum())
    assert error == pytest.approx(often.error, rel=1e-3)


def test_columns_count_by_their_inputs() -> None:
    scheme, weight = default_host().scheme("int2"), weight_of()
    squares = torch.full((128,), 1e-2)
    squares[:16] = 100.0
    squares[20] = 0.0
    x = torch.randn(500, 128) * squares.sqrt()
    known = {"second-moment": squares}
    off = []
    for found in (
        low_rank_correction(weight, scheme, 8, statistics=known), low_rank_correction(weight, scheme, 8),
    ):  # fmt: skip
        unpacked = scheme.unpack(scheme.pack(weight, known), 96, 128, torch.float32)
        off.append(float((x @ (weight - unpacked - found.up @ found.down).t()).norm()))
    assert off[0] < 0.7 * off[1]


def test_the_document_does_what_it_says() -> None:
    text = (Path(__file__).parent.parent / "docs" / "quantization.md").read_text(encoding="utf-8")
    block = text.split("## Training beside packed weights")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"__name__": "document"}
    exec(compile(block, "quantization.md", "exec"), names)
    assert len(packed_weights(names["model"])) == 2
    trained = {name for name, p in names["model"].named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[0] for name in trained} == {"0.up", "0.down", "2.up", "2.down"}
    assert all(p.grad is not None for p in names["model"].parameters() if p.requires_grad)


def test_a_module_starts_near_the_weights_that_it_had() -> None:
    scheme, layer, x = default_host().scheme("int2"), nn.Linear(128, 96), torch.randn(5, 128)
    wanted = layer(x).detach()
    found = low_rank_correction(layer.weight, scheme, 16, turns=3)
    adapted = Adapted(layer, 16)
    with torch.no_grad():
        layer.weight.copy_(found.base)
        adapted.down.weight.copy_(found.down)
        adapted.up.weight.copy_(found.up)
    pack_weights(adapted, {"base.weight": (scheme, "rows")})
    assert (adapted(x) - wanted).norm() < 0.85 * (adapted.base(x) - wanted).norm()


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((96, 128), {"rank": 0}, "rank is 0: expected 1 to 96 for a weight [96, 128]"),
        ((96, 128), {"rank": 97}, "rank is 97: expected 1 to 96 for a weight [96, 128]"),
        ((96, 128), {"rank": 4, "turns": 0}, "turns is 0: expected 1 or more"),
        ((96, 100), {"rank": 4}, "cannot pack a weight as int2: groups of 64 do not divide 100 inputs"),
        ((96,), {"rank": 4}, "a weight of shape (96,) is no matrix: expected [N, K]"),
        (
            (96, 128), {"rank": 4, "statistics": {"second-moment": torch.ones(3)}},
            "second-moment has shape (3,): expected (128,)",
        ),
    ],
    ids=["none", "more", "turns", "groups", "vector", "statistics"],
)  # fmt: skip
def test_what_cannot_be_corrected_is_refused(shape: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(QuantizationError, match=re.escape(reason)):
        low_rank_correction(torch.randn(shape), default_host().scheme("int2"), **options)


def test_a_weight_with_a_nan_is_refused() -> None:
    weight = weight_of()
    weight[1, 2] = float("nan")
    with pytest.raises(QuantizationError, match="cannot pack a weight as nf4: it holds NaN"):
        low_rank_correction(weight, default_host().scheme("nf4"), 4)
