"""Numbers, gradients, the kernel without a GPU, and what the pass does and leaves alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.testing import check_pass, semantic_programs
from graphopt_causal_conv import operator
from graphopt_causal_conv.fuse import FuseCausalConvolution

EVERYWHERE = FuseCausalConvolution(everywhere=True)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


class Mixer(nn.Module):
    """Two layers as Mamba has them."""

    def __init__(self, width: int = 8, taps: int = 4, *, bias: bool = True, silu: bool = True, **options):
        super().__init__()
        torch.manual_seed(0)
        options = {"padding": taps - 1, "groups": width, **options}
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, taps, bias=bias, **options) for _ in "ab")
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            y = convolution(x)[..., : x.shape[-1]]
            x = F.silu(y) if self.silu else y
        return x.square().mean()


def example(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    torch.manual_seed(1)
    batch, channels, length, taps = shape
    made = torch.randn(batch, channels, length), torch.randn(channels, 1, taps), torch.randn(channels)
    return [value.to(dtype).requires_grad_() for value in made]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_check_against_finite_differences(silu: bool, reverse: bool, bias: bool) -> None:
    x, w, b = example(2, 3, 5, 4, dtype=torch.float64)
    b = b if bias else None

    def function(*given: Tensor) -> Tensor:
        x, w, *rest = given
        return torch.ops.causal_conv.forward(x, w, rest[0] if rest else None, silu, reverse)

    given = tuple(value for value in (x, w, b) if value is not None)
    assert torch.autograd.gradcheck(function, given)
    right = operator.reference(x, w, b, silu, reverse)
    for a, c in zip(
        torch.autograd.grad(function(*given).sin().sum(), given),
        torch.autograd.grad(right.sin().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(a, c)


def test_rows_shorter_than_the_filter_and_none() -> None:
    for length in (0, 1, 2):
        x, w, b = example(2, 3, length, 4)
        y = torch.ops.causal_conv.forward(x, w, b, True, False)
        assert y.shape == x.shape
        gradients = torch.autograd.grad(y.sum(), (x, w, b))
        assert [g.shape for g in gradients] == [x.shape, w.shape, b.shape]


def test_the_operator_passes_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = (*example(2, 3, 7, 4, dtype=dtype), True, False)
        torch.library.opcheck(torch.ops.causal_conv.forward.default, given)


@needs_triton
def test_the_kernel_computes_what_the_reference_does() -> None:
    script = """
import itertools, torch
from graphopt_causal_conv import kernel, operator
torch.manual_seed(0)
shapes = (2, 3, 37, 4), (1, 2, 1100, 3), (1, 1, 2, 5)
for (b, c, l, k), (silu, reverse), dtype in itertools.product(
    shapes, ((False, False), (True, False), (False, True)), (torch.float32, torch.float16)
):
    x, w = torch.randn(b, c, l).to(dtype), torch.randn(c, 1, k).to(dtype)
    for bias in (None, torch.randn(c).to(dtype)):
        found = operator.convolve(kernel, x, w, bias, silu, reverse)
        right = operator.reference(x, w, bias, silu, reverse)
        near = 4e-3 if dtype is torch.float16 else 2e-6
        torch.testing.assert_close(found, right, atol=near, rtol=near)
    spread = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(
        operator.convolve(kernel, spread, w, None, silu, reverse),
        operator.convolve(kernel, x, w, None, silu, reverse), atol=0, rtol=0,
    )
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_compiles_for_sm_90_without_spills(dtype: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from graphopt_causal_conv.kernel import forward_kernel

    constants = {"TAPS": 4, "BLOCK": 1024, "BIAS": True, "SILU": True, "REVERSE": False}
    pointers = dict.fromkeys(("data", "weight", "bias", "result"), f"*{dtype}")
    types = {**pointers, "channels": "i32", "length": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=forward_kernel, signature=types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert "st.local" not in compiled.asm["ptx"]
    assert compiled.metadata.shared == 0


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_each_convolution_becomes_one_call(silu: bool, bias: bool) -> None:
    model, x = Mixer(silu=silu, bias=bias), torch.randn(2, 8, 16)
    (program,) = semantic_programs(model, (x,), [EVERYWHERE])
    calls = list(program.nodes(torch.ops.causal_conv.forward))
    assert [call.args[3:] for call in calls] == [(silu, False)] * 2
    assert not list(program.nodes(torch.ops.aten.conv1d))


def test_the_pass_keeps_what_any_pass_must() -> None:
    checked = check_pass(EVERYWHERE, Mixer(), (torch.randn(2, 8, 16),))
    assert "causal_conv.forward" in checked.text.partition("# after")[2]


@pytest.mark.parametrize(
    ("model", "step", "reason"),
    [
        (Mixer(groups=4), EVERYWHERE, "it is not depthwise"),
        (Mixer(stride=2, padding=11), EVERYWHERE, "its filter skips values"),
        (Mixer(padding=4), EVERYWHERE, "what is kept of it is not causal"),
        (Mixer(taps=17), EVERYWHERE, "the kernel takes filters of 1 to 16 elements, got 17"),
        (Mixer(), FuseCausalConvolution(), "no kernel runs on cpu, where the call gains nothing"),
    ],
    ids=["groups", "stride", "padding", "taps", "cpu"],
)
def test_what_it_leaves_alone_and_why(model: nn.Module, step: FuseCausalConvolution, reason: str) -> None:
    x = torch.randn(2, 8, 16)
    report = graphopt.optimize(model, (x,), pipeline=[step], emit="eager", on_error="raise").report
    assert {miss.reason.text for miss in report.near_misses} == {reason}
    assert report.steps[0].status == "no-op"


def test_lengths_that_change_stay_symbols() -> None:
    torch._dynamo.reset()
    model = Mixer()
    fast = graphopt.optimize(
        model, (torch.randn(2, 8, 16),), pipeline=[EVERYWHERE], emit="eager", dynamic_shapes=True
    )
    for length in (16, 23, 9):
        x = torch.randn(2, 8, length)
        found, right, wanted = fast(x), model(x), list(model.parameters())
        torch.testing.assert_close(found, right)
        for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(right, wanted), strict=True):
            torch.testing.assert_close(a, b)
    semantic = [program for program in fast.programs if program.level is graphopt.Level.SEMANTIC]
    assert len(semantic) == 1 and semantic[0].has_symbolic_sizes


def test_the_planner_goes_by_the_price_of_the_kernel() -> None:
    from graphopt.plugins import default_host

    spec = default_host().costs()["causal_conv::forward"]
    (program,) = semantic_programs(Mixer(), (torch.randn(2, 8, 16),), [EVERYWHERE])
    call = next(program.nodes(torch.ops.causal_conv.forward))
    found = spec.price(call, default_host().device("h100"))
    assert found.flops == 2 * 4 * 2 * 8 * 16
    assert (found.bytes_read, found.bytes_written) == (4 * (256 + 32 + 8), 4 * 256)
