"""fuse-row-product: which norms, gates and residuals go with a row's product, and what stays and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.testing import check_pass, semantic_programs
from graphopt_kernels.quantized.int4 import Int4
from graphopt_passes.functionalize import Functionalize
from graphopt_passes.fuse_row_product import FuseRowProduct
from graphopt_passes.normalize import Normalize
from graphopt_passes.read_packed import ReadPacked
from tests.programs import context, host, semantic

EVERYWHERE = FuseRowProduct(everywhere=True)
STEPS = [Normalize(), Functionalize(), ReadPacked(), EVERYWHERE]
BF16 = torch.bfloat16
ops = torch.ops.graphopt


class Layer(nn.Module):
    """A gated network between two residuals, as decoders have them."""

    def __init__(self, gate: str = "silu", hidden: int = 32, inner: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Parameter(torch.rand(hidden))
        self.out, self.both = (nn.Linear(hidden, size, bias=False) for size in (hidden, 2 * inner))
        self.down, self.gate = nn.Linear(inner, hidden), gate

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x = residual + self.out(x)
        wide = x.float()
        normed = self.norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        gate, up = self.both(normed).split(self.down.in_features, -1)
        gate = F.silu(gate) if self.gate == "silu" else F.gelu(gate, approximate=self.gate)
        return x + self.down(gate * up)


class Layers(nn.Module):
    def __init__(self, gate: str = "silu", count: int = 2, hidden: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(gate, hidden, inner) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, x)
        return x


def row(*shape: int, width: int = 32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*(shape or (1, 1)), width).to(BF16)


@pytest.mark.parametrize("gate", ["silu", "none", "tanh"])
def test_every_product_of_a_row_takes_what_is_around_it(gate: str) -> None:
    host().kernels()
    (program,) = semantic_programs(Layers(gate).to(BF16).eval(), (row(),), STEPS)
    found = list(program.nodes(ops.row_product.default))
    assert [node.args[-1] for node in found] == [
        "",
        {"none": "gelu", "tanh": "gelu_tanh"}.get(gate, gate),
        "",
    ] * 2
    assert [node.args[5] for node in found] == [False, True, False] * 2
    assert [node.args[-2] is None for node in found] == [False, True, False] * 2
    assert len(list(program.nodes())) == 6


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_results_are_nearer_to_exact_ones_than_those_of_the_parts(scheme: str | None) -> None:
    sizes = {"hidden": 128, "inner": 256} if scheme == "int4" else {}
    model, x = Layers(**sizes).to(BF16).eval(), row(width=sizes.get("hidden", 32))
    if scheme is not None:
        graphopt.quantize(model, (x,), schemes=(scheme,))
    wide = copy.deepcopy(model)
    exact_model = Layers(**sizes).double().eval()
    with torch.no_grad():
        for own, other in zip(exact_model.layers, wide.layers, strict=True):
            for name in ("out", "both", "down"):
                getattr(own, name).weight.copy_(getattr(other, name).weight)
            own.norm.copy_(other.norm)
            own.down.bias.copy_(other.down.bias)
        exact, plain = exact_model(x.double()), model(x)
        fast = graphopt.optimize(model, (x,), pipeline=STEPS, emit="eager", on_error="raise")
        found = fast(x)
    assert sum("fuse-row-product" in rewrite.id for rewrite in fast.report.rewrites) == 6
    assert found.dtype is BF16 and found.shape == plain.shape
    if scheme is None:
        # Everything but the order of rounding: eager mode rounds every part.
        assert (found.double() - exact).norm() <= 1.1 * (plain.double() - exact).norm()
    else:
        torch.testing.assert_close(found, plain, rtol=0.03, atol=0.03)


def test_the_pass_keeps_what_any_pass_must() -> None:
    check_pass(EVERYWHERE, Layer().to(BF16).eval(), (row(), row()))


def proposed(function: Any, *given: Any, mode: str = "infer", step: FuseRowProduct = EVERYWHERE) -> list[Any]:
    host().kernels()
    return list(step.propose(semantic(function, *given), context(mode)))


def test_training_and_several_rows_keep_what_they_have() -> None:
    weight = torch.randn(64, 32).to(BF16)
    assert proposed(F.linear, row(), weight, mode="train") == []
    assert proposed(F.linear, row(1, 2), weight) == []


def test_what_others_read_stays_beside() -> None:
    weight = torch.randn(64, 32).to(BF16)

    def read_twice(x: Tensor, w: Tensor) -> Any:
        y = F.linear(x, w)
        first, second = y.split(32, -1)
        return F.silu(first) * second, y

    def summed_twice(x: Tensor, w: Tensor, residual: Tensor) -> Any:
        y = F.linear(x, w)
        return y + residual, y

    def scaled(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
        return torch.add(residual, F.linear(x, w), alpha=2)

    def crossed(x: Tensor, w: Tensor) -> Tensor:
        first, second = F.linear(x, w).split(32, -1)
        return F.silu(second) * first

    def uneven(x: Tensor, w: Tensor) -> Tensor:
        first, second = F.linear(x, w).split([16, 48], -1)
        return F.silu(first).sum(-1, True) * second

    residual = torch.randn(1, 1, 64).to(BF16)
    for function, *given in (
        (read_twice,), (summed_twice, residual), (scaled, residual), (crossed,), (uneven,),
    ):  # fmt: skip
        (found,) = proposed(function, row(), weight, *given)
        assert isinstance(found, Candidate)
        assert len(found.nodes) == 1, function.__name__


@pytest.mark.parametrize(
    ("x", "weight", "everywhere", "text"),
    [
        (row().float(), torch.randn(64, 32), True, "rows of float32 are left to libraries"),
        (row(), torch.randn(9, 32).to(BF16), False, "no kernel runs on cpu, where the operator"),
        (row()[..., :20], torch.randn(64, 20).to(BF16), True, "rows of the weight do not begin on 16 bytes"),
        (row(), torch.randn(32, 64).to(BF16).t(), True, "rows of the weight are spread over memory"),
    ],
)  # fmt: skip
def test_other_products_stay_and_the_report_says_why(
    x: Tensor, weight: Tensor, everywhere: bool, text: str
) -> None:
    (found,) = proposed(F.linear, x, weight, step=FuseRowProduct(everywhere=everywhere))
    assert isinstance(found, NearMiss) and found.reason.text.startswith(text)


def test_codes_beyond_the_last_input_are_not_read() -> None:
    codes, words = Int4(32).pack(torch.randn(64, 32), {}).values()

    def product(x: Tensor, codes: Tensor, words: Tensor) -> Tensor:
        found: Tensor = ops.linear_int4(x, codes, words, None, 32)
        return found

    (found,) = proposed(product, row(), codes, words, step=EVERYWHERE)
    assert isinstance(found, NearMiss)
    assert found.reason.text == "rows of 32 are not whole blocks of codes"


def test_a_residual_that_is_written_later_is_not_read_later() -> None:
    def written(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
        y = F.linear(x, w)
        residual.mul_(2)
        return y + residual

    (found,) = proposed(written, row(), torch.randn(64, 32).to(BF16), torch.randn(1, 1, 64).to(BF16))
    assert isinstance(found, NearMiss) and found.reason.text == "what it reads is written by the program"
