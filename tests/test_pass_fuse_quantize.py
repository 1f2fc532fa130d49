"""fuse-quantize: which quantization it sees, behind norms and alone, and what it leaves alone and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.program import Level, Program, Signature
from graphopt.testing import check_pass, semantic_programs
from graphopt_passes.fuse_norm import FuseNorm
from graphopt_passes.fuse_quantize import FuseQuantize
from tests.programs import context, host, semantic

EVERYWHERE = FuseQuantize(everywhere=True)
NORMS = FuseNorm(everywhere=True)
FP8, INT8 = torch.float8_e4m3fn, torch.int8
ops = torch.ops.graphopt
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


def float8(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = (y.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-12)
    return (y.float() / scale).clamp(-448, 448).to(FP8), scale


def float8_finfo(y: Tensor) -> tuple[Tensor, Tensor]:
    wide, most = y.float(), torch.finfo(FP8).max
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_min(1e-4) / most
    return (wide / scale).clamp(min=-most, max=most).to(FP8), scale


def float8_unbounded(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = y.float().abs().amax(-1, keepdim=True) / 448.0
    return (y.float() / scale).to(FP8), scale


def int8(y: Tensor) -> tuple[Tensor, Tensor]:
    wide = y.float()
    scale = torch.clamp(wide.abs().amax(-1, True) / 127.0, min=1e-8)
    return torch.round(wide / scale).clamp(-128, 127).to(INT8), scale


def int8_unbounded(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = y.abs().amax(-1, keepdim=True).float() / 127
    return torch.round(y.float() / scale).to(INT8), scale


FORMS = {
    float8: (FP8, 448.0, 1e-12),
    float8_finfo: (FP8, 448.0, 1e-4 / 448),
    float8_unbounded: (FP8, 448.0, 0.0),
    int8: (INT8, 127.0, 1e-8),
    int8_unbounded: (INT8, 127.0, 0.0),
}


def llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, None, 1e-6)


class Model(nn.Module):
    def __init__(self, quantize: Quantize, norm: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quantize, self.norm = quantize, norm
        self.weight = nn.Parameter(torch.randn(24).bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.quantize(x if self.norm is None else self.norm(x, self.weight))


def drawn() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, 24).bfloat16()


@pytest.mark.parametrize("quantize", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("norm", [None, llama, layer_norm], ids=["alone", "llama", "layer_norm"])
def test_quantization_is_one_call_with_the_norm_before_it(quantize: Quantize, norm: Any) -> None:
    host().kernels()
    (program,) = semantic_programs(Model(quantize, norm), (drawn(),), [NORMS, EVERYWHERE])
    target = ops.quantize_rows.default if norm is None else ops.row_norm_quantize.default
    (node,) = program.nodes(target)
    assert node.args[-3:] == FORMS[quantize]
    assert {n.op for n in program.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}
    assert len(list(program.nodes())) == 3


@pytest.mark.parametrize("quantize", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_codes_and_scales_stay(quantize: Quantize, emit: str) -> None:
    model, x = Model(quantize, llama).eval(), drawn()
    with torch.no_grad():
        fast = graphopt.optimize(model, (x,), pipeline=[NORMS, EVERYWHERE], emit=emit, on_error="raise")
        for a, b in zip(fast(x), model(x), strict=True):
            assert a.dtype is b.dtype
            assert torch.equal(a.float(), b.float())


def test_the_pass_keeps_what_any_pass_must() -> None:
    check_pass(EVERYWHERE, Model(int8), (drawn(),))


def test_a_norm_that_others_read_stays_beside() -> None:
    class Both(Model):
        def forward(self, x: Tensor) -> Any:
            y = llama(x, self.weight)
            return (*self.quantize(y), y)

    host().kernels()
    (program,) = semantic_programs(Both(float8), (drawn(),), [NORMS, EVERYWHERE])
    assert len(list(program.nodes(ops.row_norm.default))) == 1
    assert len(list(program.nodes(ops.row_norm_quantize.default))) == 1


def refusal(
    function: Callable[..., Any], *given: Any, mode: str = "infer", step: FuseQuantize = EVERYWHERE
) -> str:
    (found,) = step.propose(semantic(function, *given), context(mode))
    assert isinstance(found, NearMiss), found
    return found.reason.text


def scale_of(y: Tensor, **given: Any) -> Tensor:
    return (y.abs().amax(**{"dim": -1, "keepdim": True, **given}).float() / 448).clamp(min=1e-12)


def test_other_quantization_stays_and_the_report_says_why() -> None:
    x = torch.randn(4, 24)

    def with_scale(
        function: Callable[[Tensor], Tensor], codes: torch.dtype = FP8, high: float = 448.0
    ) -> Any:
        def quantize(y: Tensor) -> Any:
            scale = function(y)
            return (y.float() / scale).clamp(-high, high).to(codes), scale

        return quantize

    assert refusal(with_scale(lambda y: scale_of(y, dim=0)), x) == "the scale is not one of each row"
    assert refusal(with_scale(scale_of, torch.float8_e5m2), x) == "no kernel quantizes to float8_e5m2"
    assert refusal(with_scale(scale_of, high=240.0), x) == "codes are clamped to something else than 448"
    above = "the limit is no known number above 0 and up to 448"
    assert refusal(with_scale(lambda y: (y.abs().amax(-1, True) / 500).clamp(min=1e-12)), x) == above
    assert refusal(float8, x, mode="train") == "the program is trained, and the operator has no gradient"
    assert refusal(float8, x.double().t().contiguous().t()) == "no kernel takes float64"
    assert refusal(float8, torch.randn(24, 4).t()) == "rows are spread over memory"
    wide = "rows of 16385 elements do not fit the registers of a program"
    assert refusal(float8, torch.randn(1, 16385)) == wide
    plain = "no kernel runs on cpu, where the operator gains nothing"
    assert refusal(float8, x, step=FuseQuantize()) == plain

    def narrow(y: Tensor) -> Any:
        scale = (y.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
        return (y / scale).clamp(-448, 448).to(FP8), scale

    assert refusal(narrow, x.bfloat16()) == "scale or quotient are bfloat16"

    def read_twice(y: Tensor) -> Any:
        scale = scale_of(y)
        quotient = y.float() / scale
        return quotient.clamp(-448, 448).to(FP8), scale, quotient

    assert refusal(read_twice, x) == "the value of aten.div.Tensor is an output of the program as well"


def test_what_the_norm_read_must_still_be_there() -> None:
    host().kernels()

    def written(x: Tensor, weight: Tensor) -> Any:
        y = ops.row_norm(x, weight, None, 1e-6, False, 0.0, False, torch.float32)[0]
        x.add_(1)
        return float8(y)

    why = "what the norm reads is written before its result is quantized"
    assert refusal(written, torch.randn(4, 24), torch.randn(24)) == why


@pytest.mark.parametrize("emit", ["eager", "inductor"])
@pytest.mark.parametrize("before", [False, True])
def test_alone_it_stays_behind_what_code_generators_make(before: bool, emit: str) -> None:
    """On a GPU that is not there: nothing is run."""
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(16, 4096, device="cuda", dtype=torch.bfloat16)
        gm = make_fx(lambda x: float8(F.silu(x) if before else x), pre_dispatch=True)(x)
    program = Program("g0", Level.SEMANTIC, gm, Signature((), ()))
    (found,) = FuseQuantize().propose(program, replace(context("infer"), emit=emit))
    if before and emit == "inductor":
        assert isinstance(found, NearMiss)
        assert found.reason.text == "code generators make one kernel of it and what is before it"
    else:
        assert isinstance(found, Candidate) and found.delta.seconds < 0
