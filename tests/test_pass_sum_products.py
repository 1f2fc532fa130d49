"""sum-products: sums of matrix products that are added up in place, their gradients, and what stays apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.program import Program
from graphopt.testing import check_pass
from graphopt_kernels.sum_products import sum_products, sum_products_reference, sum_products_supports
from graphopt_passes.fuse_norm import FuseNorm
from graphopt_passes.sum_products import SumProducts
from tests.programs import host
from tests.steps import assert_close, budgeted, run_step

WIDTH = 32
X = torch.randn(2, 8, WIDTH, requires_grad=True)
SUM, ADD = "graphopt.sum_products.default", "aten.add.Tensor"


def operands(*depths: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    lefts = [torch.randn(6, depth, dtype=dtype) for depth in depths]
    return lefts, [torch.randn(5, depth, dtype=dtype).t() for depth in depths]


# --- the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [(4,), (4, 7), (3, 0, 5), (4, 4, 4, 4)], ids=str)
def test_it_computes_its_reference(depths: tuple[int, ...]) -> None:
    lefts, rights = operands(*depths)
    torch.testing.assert_close(sum_products(lefts, rights), sum_products_reference(lefts, rights))
    assert host().kernels()["sum-products"].reference is sum_products_reference


def test_it_is_an_operator_like_others() -> None:
    lefts, rights = operands(3, 4, dtype=torch.float64)
    for tensor in (*lefts, *rights):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.graphopt.sum_products.default, (lefts, rights))
    assert torch.autograd.gradcheck(lambda a, b, c, d: sum_products([a, b], [c, d]), (*lefts, *rights))


def test_errors_are_no_larger_than_those_of_separate_operators() -> None:
    lefts, rights = operands(64, 16, 16, dtype=torch.bfloat16)
    exact = sum_products_reference([x.double() for x in lefts], [x.double() for x in rights])
    ours, theirs = (
        float((f(lefts, rights).double() - exact).norm()) for f in (sum_products, sum_products_reference)
    )
    assert ours <= 1.1 * theirs


def test_what_is_not_finite_comes_through() -> None:
    lefts, rights = operands(4, 4)
    lefts[0][1, 1], lefts[1][2, 2] = torch.nan, torch.inf
    found, expected = sum_products(lefts, rights), sum_products_reference(lefts, rights)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("lefts", "rights", "reason"),
    [
        ([], [], "0 left and 0 right operands: expected as many, one at least"),
        ([(2, 3)], [(4, 2)], "[2, 3] times [4, 2] is no product of matrices"),
        ([(2, 3), (2, 3)], [(3, 2), (3, 4)], "products are of different shapes"),
    ],
    ids=["none", "no product", "shapes"],
)
def test_operands_that_do_not_fit_are_refused(lefts: Any, rights: Any, reason: str) -> None:
    made = [[torch.ones(shape) for shape in shapes] for shapes in (lefts, rights)]
    assert str(sum_products_supports(*made)) == reason
    if lefts:
        with pytest.raises(ValueError, match="sum_products: "):
            sum_products(*made)


def test_operands_of_other_types_are_refused() -> None:
    lefts, rights = [torch.ones(2, 2), torch.ones(2, 2).double()], [torch.ones(2, 2)] * 2
    reason = "an operand is torch.float64 or torch.float32, not torch.float32 as the first"
    assert str(sum_products_supports(lefts, rights)) == reason


def test_its_price_is_that_of_its_products() -> None:
    cost = host().cost_model("roofline").build(host().device("h200"))
    graph = torch.fx.Graph()
    places = [graph.placeholder(name) for name in "abcdo"]
    shapes = [(8192, 2048), (8192, 512), (2048, 1024), (512, 1024), (8192, 1024)]
    for place, shape in zip(places, shapes, strict=True):
        place.meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    node = graph.call_function(torch.ops.graphopt.sum_products.default, (places[:2], places[2:4]))
    node.meta["val"] = torch.empty(shapes[4], dtype=torch.bfloat16, device="meta")
    price = cost.node(node)
    assert price.flops == 2 * 8192 * 1024 * (2048 + 512)
    assert price.seconds >= price.flops / cost.device.matmul_flops["bfloat16"]


# --- the pass -------------------------------------------------------------------------------------


class Siblings(nn.Module):
    """Layers that read one value, normalized."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH, eps=1e-6)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 8 * (n + 1)) for n in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = self.norm(x)
        return torch.stack([F.silu(layer(h)).square().mean() for layer in self.layers]).sum() + x.mean()


def joint(fast: graphopt.Optimized) -> Program:
    (program,) = [p for p in fast.programs if p.level is graphopt.Level.JOINT]
    return program


def count(program: Program, target: str) -> int:
    return sum(str(node.target) == target for node in program.nodes())


def optimized(model: nn.Module, *inputs: Tensor, emit: str = "eager", norms: bool = False) -> Any:
    pipeline = [*([FuseNorm(everywhere=True)] if norms else []), SumProducts()]
    return graphopt.optimize(copy.deepcopy(model), inputs, pipeline=pipeline, emit=emit, on_error="raise")


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_gradients_of_siblings_are_one_sum(layers: int) -> None:
    model = Siblings(layers)
    check_pass(SumProducts(), model, (X,), dtypes=(torch.float64,))
    fast = optimized(model, X)
    assert_close(run_step(fast, (X,)), run_step(model, (X,)))
    (node,) = [node for node in joint(fast).nodes() if str(node.target) == SUM]
    assert len(node.args[0]) == len(node.args[1]) == layers


def test_what_else_is_added_stays_outside() -> None:
    class Passed(Siblings):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh()
            return sum(F.silu(layer(h)).mean() for layer in self.layers) + h.square().mean()  # type: ignore[return-value]

    model = Passed()
    fast = optimized(model, X)
    assert_close(run_step(fast, (X,)), run_step(model, (X,)))
    assert count(joint(fast), SUM) == 1
    assert len(next(n for n in joint(fast).nodes() if str(n.target) == SUM).args[0]) == 3


def test_sums_in_the_forward_count_as_well() -> None:
    def parallel(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x @ a + x.sin() @ b + x).square().mean()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return parallel(x, self.a, self.b)

    x = torch.randn(4, WIDTH, requires_grad=True)
    fast = optimized(Net(), x)
    torch.testing.assert_close(fast(x), parallel(x, *(p for p in fast.parameters())))
    assert count(joint(fast), SUM) >= 1


def test_the_peak_is_predicted() -> None:
    budgeted(
        Siblings,
        (torch.randn(2, 8, WIDTH),),
        pipeline=[SumProducts(), "insert-checkpoints"],
        recomputes=False,
    )


@pytest.mark.parametrize("norms", [False, True])
def test_code_generators_make_sums_on_the_way_to_their_own_kernels(norms: bool) -> None:
    """Only where a library reads the sum is it worth adding up in place."""
    model = Siblings()
    fast = optimized(model, X, emit="inductor", norms=norms)
    assert_close(run_step(fast, (X,)), run_step(model, (X,)))
    programs = [p for p in fast.programs if p.level is graphopt.Level.JOINT]
    assert sum(count(p, SUM) for p in programs) == norms
    declined = [d.why for d in fast.report.declined if "sum-products" in d.candidate]
    assert bool(declined) is not norms
    assert all("no predicted gain" in why for why in declined)


def reasons(function: Callable[..., Tensor], *inputs: Tensor) -> list[str]:
    class Net(nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return function(*given)

    fast = optimized(Net(), *inputs)
    assert count(joint(fast), SUM) == 0
    return [miss.reason.text for miss in fast.report.near_misses if miss.rule == "sum-products"]


def square() -> list[Tensor]:
    return [torch.randn(4, 4, requires_grad=True) for _ in range(4)]


def test_products_of_other_shapes_stay_apart() -> None:
    c, d = torch.randn(2, 4, requires_grad=True), torch.randn(4, 8, requires_grad=True)

    def summed(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return (a @ b + (c @ d).view(4, 4)).sin().sum()

    assert reasons(summed, *square()[:2], c, d) == ["products are of different shapes"]


def test_regions_that_the_model_checkpoints_stay() -> None:
    def region(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        def inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
            return (a @ b + c @ d).sin()

        return torch.utils.checkpoint.checkpoint(inner, a, b, c, d, use_reentrant=False).sum()

    assert "it lies in a region that the model checkpoints itself" in reasons(region, *square())


def test_products_that_are_read_elsewhere_are_no_part_of_a_sum() -> None:
    def read(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        y = a @ b
        return (y + c @ d).sin().sum() + y.cos().sum()

    assert reasons(read, *square()) == []
    scaled = lambda a, b, c, d: torch.add(a @ b, c @ d, alpha=2).sin().sum()  # noqa: E731
    assert reasons(scaled, *square()) == []
    twice = lambda a, b, c, d: (lambda y: y + y)(a @ b).sin().sum()  # noqa: E731
    assert reasons(twice, *square()) == []


def test_without_the_kernel_nothing_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: spec for name, spec in host().kernels().items() if name != "sum-products"}
    monkeypatch.setattr(type(host()), "kernels", lambda self: known)
    summed = lambda a, b, c, d: (a @ b + c @ d).sin().sum()  # noqa: E731
    assert reasons(summed, *square()) == ["the kernel sum-products is not installed"]
