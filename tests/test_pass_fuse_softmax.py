"""fuse-softmax: which softmax it sees, that numbers stay, what it leaves alone and why."""

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
from graphopt.pipeline import Pipeline
from graphopt.program import Level, Program, Signature
from graphopt.testing import check_pass, semantic_programs
from graphopt_passes.fuse_softmax import FuseSoftmax
from tests.programs import context, host, semantic

EVERYWHERE = FuseSoftmax(everywhere=True)
Function = Callable[[Tensor], Tensor]


def plain(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def logarithm(x: Tensor) -> Tensor:
    return F.log_softmax(x, dim=2)


def wider(x: Tensor) -> Tensor:
    return x.softmax(-1, dtype=torch.float32)


class Model(nn.Module):
    def __init__(self, function: Function, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.last = (nn.Linear(24, 24, dtype=dtype) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.first(x))
        return self.last(y.to(x.dtype)).square().mean()


def test_a_softmax_may_read_another_that_was_fused_before() -> None:
    def twice(x: Tensor) -> Tensor:
        return F.log_softmax(torch.softmax(x, -1), -1)

    host().kernels()
    (program,) = semantic_programs(Model(twice), (torch.randn(2, 5, 24),), [EVERYWHERE])
    assert [node.args[1] for node in program.nodes(torch.ops.graphopt.softmax.default)] == [False, True]


@pytest.mark.parametrize("function", [plain, logarithm, wider], ids=lambda f: f.__name__)
def test_softmax_of_rows_is_one_call(function: Function) -> None:
    host().kernels()
    (program,) = semantic_programs(
        Model(function, torch.bfloat16), (torch.randn(2, 5, 24).bfloat16(),), [EVERYWHERE]
    )
    (node,) = program.nodes(torch.ops.graphopt.softmax.default)
    assert node.args[1:] == (function is logarithm, torch.float32 if function is wider else torch.bfloat16)


@pytest.mark.parametrize("function", [plain, logarithm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_values_and_gradients_stay(function: Function, emit: str) -> None:
    model, x = Model(function), torch.randn(2, 5, 24)
    fast = graphopt.optimize(model, (x,), pipeline=[EVERYWHERE], emit=emit, on_error="raise")
    found, right = fast(x), model(x)
    torch.testing.assert_close(found, right)
    wanted = list(model.parameters())
    for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(right, wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_the_pass_keeps_what_any_pass_must() -> None:
    check_pass(EVERYWHERE, Model(plain), (torch.randn(2, 5, 24),))


def refusal(function: Callable[..., Any], *given: Any, step: FuseSoftmax = EVERYWHERE) -> str:
    (found,) = step.propose(semantic(function, *given), context())
    assert isinstance(found, NearMiss)
    return found.reason.text


def test_other_softmax_stays_and_the_report_says_why() -> None:
    x = torch.randn(4, 5, 24)
    assert refusal(lambda x: torch.softmax(x, 1), x) == "it is not over the last dimension"
    assert refusal(plain, x.double()) == "no kernel takes float64"
    assert refusal(plain, x.transpose(0, 1)) == "rows are spread over memory"
    wide = torch.randn(1, 1, 16385)
    assert refusal(plain, wide) == "rows of 16385 elements do not fit the registers of a program"
    why = "rows of float32 are rounded to bfloat16 first"
    assert refusal(lambda x: torch.softmax(x, -1, dtype=torch.bfloat16), x) == why
    assert refusal(plain, x, step=FuseSoftmax()) == "no kernel runs on cpu, where the operator gains nothing"


def test_another_dtype_of_the_result_is_not_taken_for_its_own() -> None:
    """As under autocast on CUDA, which is not here."""
    program = semantic(plain, torch.randn(4, 24).bfloat16())
    (node,) = program.nodes(torch.ops.aten.softmax.int)
    node.meta["val"] = node.meta["val"].float()
    (found,) = EVERYWHERE.propose(program, context())
    assert isinstance(found, NearMiss) and found.reason.text == "autocast computes it in another dtype"


def around(x: Tensor, w: Tensor, before: bool, after: bool) -> Tensor:
    y = torch.softmax((x * 2).view(x.shape) if before else x, -1)
    return (F.dropout(y, 0.1) if after else y) @ w


@pytest.mark.parametrize("emit", ["eager", "inductor"])
@pytest.mark.parametrize(("before", "after"), [(False, False), (True, False), (False, True)])
def test_it_stays_where_its_neighbours_are_one_kernel_with_it(before: bool, after: bool, emit: str) -> None:
    """On a GPU that is not there: nothing is run."""
    program = on_a_gpu(lambda x, w: around(x, w, before, after), 4096)
    (found,) = FuseSoftmax().propose(program, replace(context(), emit=emit))
    if emit == "inductor" and (before or after):
        assert isinstance(found, NearMiss)
        assert found.reason.text == "code generators make one kernel of it and what is around it"
    else:
        assert isinstance(found, Candidate) and found.delta.seconds < 0


def on_a_gpu(function: Callable[..., Any], width: int) -> Program:
    with torch._subclasses.FakeTensorMode():
        x, w = (torch.empty(n, width, device="cuda", dtype=torch.bfloat16) for n in (16, width))
        return Program("g0", Level.SEMANTIC, make_fx(function, pre_dispatch=True)(x, w), Signature((), ()))


def test_short_rows_stay() -> None:
    program = on_a_gpu(lambda x, w: torch.softmax(x, -1), 1024)
    (found,) = FuseSoftmax().propose(program, context())
    assert isinstance(found, NearMiss)
    assert found.reason.text == "code generators hold rows of 1024 elements in registers"


def test_attention_comes_first() -> None:
    names = [step.name for step in Pipeline.of("default", host()).steps]
    for name in ("fuse-attention", "window-attention", "grouped-attention"):
        assert names.index(name) < names.index("fuse-softmax")
