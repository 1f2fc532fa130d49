"""fuse-norm and fuse-norm-gradient: which norms they see, that gradients stay, what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.candidate import NearMiss
from graphopt.program import Level, Program, Signature
from graphopt.testing import check_pass, semantic_programs
from graphopt_passes.fuse_norm import FuseNorm
from graphopt_passes.fuse_norm_gradient import FuseNormGradient
from tests.programs import context, host, semantic

WIDTH = 24
EVERYWHERE = FuseNorm(everywhere=True)
Norm = Callable[[Tensor, Tensor], Tensor]


def llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def squared_by_product(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)).type_as(x) * weight


def t5(x: Tensor, weight: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + 1e-6)).to(weight.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + weight.float())).type_as(x)


def rounded_last(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (weight.float() * wide).to(torch.bfloat16)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def called(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), weight, 1e-6)


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weight, weight, 1e-6)


def bare_layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,)) + weight


class Residual(nn.Module):
    """A residual stream that a norm reads and that passes it by."""

    def __init__(self, norm: Norm, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm
        self.first = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.inner = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.weight = nn.Parameter(torch.randn(WIDTH, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.inner(self.norm(x, self.weight))
        return x.float().square().mean()


def norms(program: Program) -> list[torch.fx.Node]:
    host().kernels()  # registers the operators
    return list(program.nodes(torch.ops.graphopt.row_norm.default))


NARROW = [llama, squared_by_product, t5, gemma, rounded_last, called, layer_norm, bare_layer_norm]


@pytest.mark.parametrize("norm", NARROW, ids=lambda f: f.__name__)
def test_norms_as_models_write_them_are_one_call(norm: Norm) -> None:
    model, x = Residual(norm, torch.bfloat16), torch.randn(2, 5, WIDTH).bfloat16()
    (program,) = semantic_programs(model, (x,), [EVERYWHERE])
    (node,) = norms(program)
    centered, offset, rounds, dtype = node.args[4:]
    assert centered is norm.__name__.endswith("layer_norm")
    assert offset == (1.0 if norm is gemma else 0.0)
    assert rounds is (norm in (llama, squared_by_product, t5))
    assert dtype is torch.bfloat16
    assert not list(program.nodes(torch.ops.aten.rsqrt.default))


def optimized(norm: Norm, emit: str) -> tuple[nn.Module, Tensor, graphopt.optimized.Optimized]:
    model, x = Residual(norm), torch.randn(2, 5, WIDTH)
    pipeline = [EVERYWHERE, FuseNormGradient()]
    return model, x, graphopt.optimize(model, (x,), pipeline=pipeline, emit=emit, on_error="raise")


@pytest.mark.parametrize("norm", [plain, called, layer_norm, bare_layer_norm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_values_and_gradients_stay(norm: Norm, emit: str) -> None:
    model, x, fast = optimized(norm, emit)
    expected = model(x)
    right = torch.autograd.grad(expected, list(model.parameters()))
    found = fast(x)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, list(model.parameters())), right, strict=True):
        torch.testing.assert_close(a, b)


def test_the_pass_keeps_what_any_pass_must() -> None:
    check_pass(EVERYWHERE, Residual(plain), (torch.randn(2, 5, WIDTH),))


@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_the_gradient_that_passes_by_is_added_in_the_kernel(emit: str) -> None:
    _, _, fast = optimized(plain, emit)
    (program,) = (program for program in fast.programs if program.level is Level.JOINT)
    (backward,) = program.nodes(torch.ops.graphopt.row_norm_backward.default)
    assert backward.args[6] is not None
    # For a code generator the forward is written out, to be fused with what is around it.
    assert len(norms(program)) == (emit == "eager")
    assert bool(list(program.nodes(torch.ops.aten.rsqrt.default))) == (emit == "inductor")


def refusals(norm: Norm, x: Tensor, step: FuseNorm = EVERYWHERE) -> list[str]:
    model = Residual(norm, x.dtype)
    found = list(step.propose(semantic(model, x), context()))
    assert found and all(isinstance(item, NearMiss) for item in found), found
    return [item.reason.text for item in found]


def two_axes(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-6) * weight


def scaled_by_rows(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-2:]) * weight


def read_inside(x: Tensor, weight: Tensor) -> Tensor:
    inside = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return inside * weight + inside


def unknown_offset(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (weight + x.mean())


def own_eps(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), weight)


def spread(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x.transpose(0, 1), (WIDTH,), weight, None, 1e-6).transpose(0, 1)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (two_axes, "the mean is not over the last dimension"),
        (scaled_by_rows, "it normalizes over several dimensions"),
        (read_inside, "the value of aten.mul.Tensor is read by another call as well"),
        (unknown_offset, "what is added to the weight is not a known number"),
        (own_eps, "eps is not a known number"),
        (spread, "rows are spread over memory"),
    ],
)
def test_what_is_no_norm_of_rows_stays_and_the_report_says_why(norm: Norm, reason: str) -> None:
    assert reason in refusals(norm, torch.randn(3, 5, WIDTH))


def test_where_it_gains_nothing_it_stays() -> None:
    x = torch.randn(3, 5, WIDTH)
    assert "no kernel runs on cpu, where the operator gains nothing" in refusals(layer_norm, x, FuseNorm())
    assert "no kernel takes float64" in refusals(layer_norm, x.double())


def alone(x: Tensor, weight: Tensor, before: bool = False, after: bool = False) -> Tensor:
    x = x.sin() if before else x
    y = torch.ops.graphopt.row_norm(x, weight, None, 1e-6, False, 0.0, False, x.dtype)[0]
    return (y.cos() if after else y).view(1, -1) @ weight.new_ones(y.numel(), 1)


@pytest.mark.parametrize("width", [1024, 2048, 8192])
@pytest.mark.parametrize("neighbours", [{}, {"before": True}, {"after": True}], ids=str)
def test_a_forward_of_its_own_stays_where_nothing_fuses_with_it(
    width: int, neighbours: dict[str, bool]
) -> None:
    """On a GPU that is not there: nothing is run."""
    host().kernels()
    with torch._subclasses.FakeTensorMode():
        x, weight = (torch.empty(*shape, width, device="cuda") for shape in ((4,), ()))
        gm = make_fx(lambda x, w: alone(x, w, **neighbours))(x, weight)
    program = Program("g0", Level.JOINT, gm, Signature((), ()))
    found = list(FuseNormGradient().propose(program, replace(context(), emit="inductor")))
    assert len(found) == (0 if width == 2048 and not neighbours else 1)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_norm_that_is_one_call_already_is_worth_it_too(mode: str) -> None:
    program = semantic(Residual(layer_norm), torch.randn(3, 5, WIDTH))
    (found,) = EVERYWHERE.propose(program, context(mode))
    assert isinstance(found, graphopt.Candidate) and found.delta.seconds < 0
