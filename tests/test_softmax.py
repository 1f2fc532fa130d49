"""Softmax of rows: numbers against torch and float64, gradients, kernel, refusals."""

from __future__ import annotations

import itertools
import math
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import graphopt_kernels.softmax as module
from graphopt_kernels.emit.machine_code import compile_function_for_sm90
from tests.loss_kernels import interpret

ops = torch.ops.graphopt
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
BOTH = pytest.mark.parametrize("logarithm", [False, True])


def expected(x: torch.Tensor, logarithm: bool, dtype: torch.dtype) -> torch.Tensor:
    return (torch.log_softmax if logarithm else torch.softmax)(x, -1, dtype=dtype)


@BOTH
def test_values_and_gradients_are_those_of_torch(logarithm: bool) -> None:
    torch.manual_seed(0)
    for dtype, result in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        x = (3 * torch.randn(3, 5, 24)).to(dtype).requires_grad_()
        found, right = ops.softmax(x, logarithm, result), expected(x, logarithm, result)
        assert found.dtype is result
        torch.testing.assert_close(found, right)
        grad = torch.randn_like(right)
        (a,), (b,) = (torch.autograd.grad(y, x, grad) for y in (found, right))
        torch.testing.assert_close(a, b)


@BOTH
def test_gradients_check_against_finite_differences(logarithm: bool) -> None:
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.softmax(x, logarithm, torch.float64), (x,))


@BOTH
def test_nan_infinities_hidden_rows_and_no_rows_are_as_in_torch(logarithm: bool) -> None:
    for value in (math.nan, math.inf, -math.inf):
        x = torch.randn(4, 9)
        x[1, 3] = value
        x[2] = value
        right = expected(x, logarithm, torch.float32)
        torch.testing.assert_close(ops.softmax(x, logarithm, torch.float32), right, equal_nan=True)
    for shape in ((0, 9), (3, 0), (2, 0, 5)):
        x = torch.empty(shape, requires_grad=True)
        y = ops.softmax(x, logarithm, torch.float32)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert y.shape == gradient.shape == shape


@BOTH
def test_rows_that_are_spread_over_memory(logarithm: bool) -> None:
    x = torch.randn(6, 5, 9).transpose(0, 2)
    found = ops.softmax(x, logarithm, torch.float32)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected(x, logarithm, torch.float32))


@BOTH
def test_the_operator_passes_opcheck(logarithm: bool) -> None:
    check: Any = torch.library.opcheck
    for dtype in (torch.float32, torch.bfloat16):
        check(ops.softmax.default, (torch.randn(3, 9, requires_grad=True), logarithm, torch.float32))
        check(ops.softmax.default, (torch.randn(3, 9).to(dtype), logarithm, torch.float32))


@BOTH
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_computes_the_same(backend: str, logarithm: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 24, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.softmax(x.tanh(), logarithm, torch.float32).sin()

    found, right = torch.compile(function, backend=backend, fullgraph=True)(x), function(x)
    torch.testing.assert_close(found, right)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), x) for y in (found, right))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("x", "dtype", "reason"),
    [
        (torch.ones(()), torch.float32, "takes rows, got a number"),
        (torch.ones(3, 6, dtype=torch.int64), torch.float32, "takes floating-point rows, got torch.int64"),
        (torch.ones(3, 6), torch.bfloat16, "gives results of torch.float32 or wider, not torch.bfloat16"),
    ],
)
def test_what_it_does_not_take_it_says(x: torch.Tensor, dtype: torch.dtype, reason: str) -> None:
    assert re.fullmatch(reason, str(module.softmax_supports(x, False, dtype)))
    with (
        torch._subclasses.FakeTensorMode() as mode,
        pytest.raises(ValueError, match=f"softmax: {reason}"),
    ):
        ops.softmax(mode.from_tensor(x), False, dtype)


@needs_triton
def test_the_kernel_computes_what_the_reference_does() -> None:
    interpret("""
        import itertools, math
        import torch
        import graphopt_kernels.softmax as module

        torch.manual_seed(0)
        kernels = module._kernels()
        for dtype, (rows, width), logarithm in itertools.product(
            (torch.float32, torch.float16), ((9, 37), (5, 64), (1, 1)), (False, True)
        ):
            x = (3 * torch.randn(rows, width)).to(dtype)
            if rows > 8:
                x[1, 3] = math.nan
                x[2, 3] = math.inf
                x[3, :30] = -math.inf
                x[4] = -math.inf
                x[5] = math.inf
            block = max(16, 1 << (width - 1).bit_length())
            for given, result in ((x, dtype), (x.t().contiguous().t(), torch.float32)):
                found = module.softmax_rows(
                    kernels, given, logarithm, result, launch=module.SoftmaxLaunch(block, 2, 1)
                )
                right = module.softmax_reference(given, logarithm, result)
                near = dict(atol=2e-3, rtol=2e-3) if result is torch.float16 else dict(atol=2e-6, rtol=2e-6)
                torch.testing.assert_close(found, right, equal_nan=True, **near)
    """)


@needs_triton
@pytest.mark.parametrize("width", [128, 4096, 5120, 14336])
def test_the_kernel_compiles_for_sm_90_without_spills(width: int) -> None:
    from graphopt_kernels.softmax_triton import forward_kernel

    launch = module.softmax_launch(width)
    for dtype, logarithm in itertools.product(("bf16", "fp32"), (False, True)):
        pointers = {"data": f"*{dtype}", "result": f"*{dtype}"}
        constants = {"LOG": logarithm, "WIDTH": width, "BLOCK": launch.block, "ROWS": launch.rows}
        code = compile_function_for_sm90(
            forward_kernel,
            {**pointers, "rows": "i32"},
            constants,
            warps=launch.warps,
            aligned=(*pointers, "rows"),
        )
        assert not code.spills, (dtype, code)
        assert code.shared + code.asked <= 2048
        assert set(code.widths("LDG")) == set(code.widths("STG")) == {128}
        # Two programs or more at a time, so that one reads while another computes.
        assert code.registers * 32 * launch.warps * 2 <= 65536
