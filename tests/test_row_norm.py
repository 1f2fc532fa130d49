"""RMSNorm and LayerNorm of rows: numbers against float64 and torch, gradients, kernels, refusals."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt_kernels import row_norm as operators
from graphopt_kernels import row_norm_launch as launching
from graphopt_kernels.emit.machine_code import compile_function_for_sm90

ops = torch.ops.graphopt
ROWS, WIDTH = 7, 24
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    centered: bool,
    offset: float = 0.0,
) -> torch.Tensor:
    return ops.row_norm(x, weight, bias, 1e-5, centered, offset, False, x.dtype)[0]


def expected(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    centered: bool,
    offset: float = 0.0,
) -> torch.Tensor:
    scale = None if weight is None else weight + offset
    if centered:
        return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)
    y = F.rms_norm(x, x.shape[-1:], scale, 1e-5)
    return y if bias is None else y + bias


def operands(
    dtype: torch.dtype = torch.float64, weight: bool = True, bias: bool = True
) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    vectors = [torch.randn(WIDTH, dtype=dtype, requires_grad=True) if has else None for has in (weight, bias)]
    return [torch.randn(3, ROWS, WIDTH, dtype=dtype, requires_grad=True), *vectors]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("weight", "bias"), [*itertools.product((False, True), repeat=2)])
@pytest.mark.parametrize("centered", [False, True])
def test_values_and_gradients_are_those_of_torch(
    centered: bool, weight: bool, bias: bool, offset: float
) -> None:
    given = operands(weight=weight, bias=bias)
    leaves = [t for t in given if t is not None]
    settings: Any = {"centered": centered, "offset": offset if weight else 0.0}
    found, right = norm(*given, **settings), expected(*given, **settings)
    torch.testing.assert_close(found, right)
    grad = torch.randn_like(right)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(right, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("centered", [False, True])
def test_a_sum_is_normalized_and_given_as_well(centered: bool) -> None:
    x, weight, bias = operands()
    residual = torch.randn_like(x).requires_grad_()
    leaves = [x, residual, weight, bias]
    found, total, *_ = ops.add_row_norm(x, residual, weight, bias, 1e-5, centered, 0.0, False, x.dtype)
    right = expected(x + residual, weight, bias, centered=centered)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(total, x + residual)
    # The sum has a reader of its own: its gradient passes by the norm.
    loss = (found * 2).sin().sum() + total.cos().sum()
    other = (right * 2).sin().sum() + (x + residual).cos().sum()
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_sum_has_a_gradient_where_only_it_is_read() -> None:
    x, weight, bias = operands()
    residual = torch.randn_like(x).requires_grad_()
    _, total, *_ = ops.add_row_norm(x, residual, weight, bias, 1e-5, True, 0.0, False, x.dtype)
    a, b, c = torch.autograd.grad(total.sum(), [x, residual, weight], allow_unused=True)
    assert torch.equal(a, torch.ones_like(x)) and torch.equal(b, a) and c is None


@pytest.mark.parametrize("centered", [False, True])
def test_gradients_check_against_finite_differences(centered: bool) -> None:
    given = operands()
    assert torch.autograd.gradcheck(lambda *leaves: norm(*leaves, centered=centered), given)


def test_rounding_before_the_weight_is_that_of_models_that_cast_back() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    wide = x.float()
    right = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    found = ops.row_norm(x, weight, None, 1e-6, False, 0.0, True, x.dtype)[0]
    assert torch.equal(found, right)


@pytest.mark.parametrize("centered", [False, True])
def test_bfloat16_errs_no_more_than_separate_operators(centered: bool) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(256, 320).double(), torch.randn(320).double(), torch.randn(320).double()]
    narrow = [t.bfloat16() for t in exact]
    grad = torch.randn(256, 320).bfloat16()

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in narrow]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves, grad.to(dtype))]

    def separate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True) if centered else wide
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) + bias

    truth = run(lambda *t: expected(*t, centered=centered), torch.float64)
    eager = run(separate, torch.bfloat16)
    ours = run(lambda *t: norm(*t, centered=centered), torch.bfloat16)
    for value, reference, right in zip(ours, eager, truth, strict=True):
        errors = [float((t.double() - right).norm() / right.norm()) for t in (value, reference)]
        assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_gradients_that_are_needed_are_computed(frozen: int) -> None:
    given = operands()
    leaves = [t for index, t in enumerate(given) if index != frozen]
    given[frozen] = given[frozen].detach()  # type: ignore[union-attr]
    ours = torch.autograd.grad(norm(*given, centered=True).sin().sum(), leaves)
    theirs = torch.autograd.grad(expected(*given, centered=True).sin().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_no_rows_and_infinities_are_as_in_torch() -> None:
    weight, bias = torch.randn(WIDTH, requires_grad=True), torch.randn(WIDTH, requires_grad=True)
    x = torch.empty(0, WIDTH, requires_grad=True)
    for a in torch.autograd.grad(norm(x, weight, bias, centered=True).sum(), [weight, bias]):
        assert torch.equal(a, torch.zeros(WIDTH))
    for value in (float("inf"), float("-inf"), float("nan")):
        x = torch.randn(4, WIDTH)
        x[1, 3] = value
        for centered in (False, True):
            torch.testing.assert_close(
                norm(x, weight, bias, centered=centered),
                expected(x, weight, bias, centered=centered),
                equal_nan=True,
            )


@pytest.mark.parametrize("centered", [False, True])
def test_the_operators_pass_opcheck(centered: bool) -> None:
    x, weight, bias = operands(torch.float32)
    settings = (1e-5, centered, 0.0, False, torch.float32)
    check: Any = torch.library.opcheck
    check(ops.row_norm.default, (x, weight, bias, *settings))
    check(ops.row_norm.default, (x, weight, None, *settings))
    check(ops.add_row_norm.default, (x, torch.randn_like(x), weight, bias, *settings))
    plain = [t.detach() for t in (x, weight, bias)]
    _, mean, rstd = ops.row_norm(*plain, *settings)
    for passed, mask in itertools.product(
        (None, torch.randn_like(x).detach()), ([True] * 3, [False, True, False])
    ):
        check(
            ops.row_norm_backward.default,
            (torch.randn_like(x).detach(), *plain, mean, rstd, passed, centered, 0.0, mask),
        )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_they_compute_the_same(backend: str) -> None:
    torch._dynamo.reset()
    given = operands(torch.float32)

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.row_norm(x.tanh(), weight, bias, 1e-5, True, 0.0, False, torch.float32)[0] * 3

    found, right = torch.compile(function, backend=backend, fullgraph=True)(*given), function(*given)
    torch.testing.assert_close(found, right)
    for a, b in zip(
        torch.autograd.grad(found.sum(), given), torch.autograd.grad(right.sum(), given), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": torch.ones(())}, "takes rows, got a number"),
        ({"input": torch.ones(3, 6, dtype=torch.int64)}, "takes floating-point rows, got torch.int64"),
        ({"weight": torch.ones(5)}, r"the weight has shape \[5\]: expected \[6\]"),
        ({"bias": torch.ones(2, 6)}, r"the bias has shape \[2, 6\]: expected \[6\]"),
        ({"bias": torch.ones(6, dtype=torch.int64)}, "takes a floating-point bias, got torch.int64"),
        (
            {"residual": torch.ones(3, 5)},
            r"the residual is torch.float32 \[3, 5\]: expected torch.float32 \[3, 6\]",
        ),
    ],
)
def test_what_it_does_not_take_it_says(change: dict[str, torch.Tensor], reason: str) -> None:
    given = {"input": torch.ones(3, 6), "residual": None, "weight": torch.ones(6), "bias": None} | change
    if given["residual"] is None:
        given["residual"] = given["input"]
    assert re.fullmatch(reason, str(operators.add_row_norm_supports(*given.values())))
    if given["input"].dim():
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [t if t is None else mode.from_tensor(t) for t in given.values()]
            with pytest.raises(ValueError, match=f"add_row_norm: {reason}"):
                ops.add_row_norm(*fakes, 1e-5, True, 0.0, False, torch.float32)


@needs_triton
def test_the_kernels_compute_what_the_references_do() -> None:
    """In the interpreter, which must be on before triton is imported: in a process of its own."""
    script = """
        import itertools
        import torch
        from graphopt_kernels import row_norm_launch as launching, row_norm_reference as references
        from graphopt_kernels.row_norm_launch import Launch

        torch.manual_seed(0)
        kernels = launching.norm_kernels()
        for dtype, (rows, width), centered, (ahead, held) in itertools.product(
            (torch.float32, torch.float16), ((7, 37), (5, 16), (1, 9)), (False, True),
            ((False, True), (True, False)),
        ):
            launch = Launch(max(16, 1 << (width - 1).bit_length()), 2, 1, 1, ahead, held, 1 if ahead else 3)
            chosen = dict(launch=launch, processors=2)
            x, added, passed, grad = (torch.randn(rows, width, dtype=dtype) for _ in range(4))
            for weight, bias, offset, rounds in (
                (torch.randn(width), None, 1.0, False),
                (torch.randn(width).to(dtype), torch.randn(width), 0.0, True),
                (None, None, 0.0, False),
            ):
                # The interpreter's division and square root are numpy's: results differ in the last place.
                near = dict(atol=2e-3, rtol=2e-3) if dtype is torch.float16 else {}
                settings = (weight, bias, 1e-5, centered, offset, rounds, dtype)
                for residual in (None, added):
                    found = launching.forward_rows(kernels, x, residual, *settings, **chosen)
                    summand = torch.zeros_like(x) if residual is None else residual
                    right = references.add_row_norm_reference(x, summand, *settings)
                    for number, (a, b) in enumerate(zip(found, right)):
                        if number != 1 or residual is not None:
                            torch.testing.assert_close(a, b, **near)
                _, mean, rstd = references.row_norm_reference(x, *settings)
                for beside, mask in itertools.product(
                    (None, passed), ([True, True, True], [True, False, False], [False, True, False])
                ):
                    arguments = (grad, x, weight, bias, mean, rstd, beside, centered, offset, mask)
                    found = launching.backward_rows(kernels, *arguments, **chosen)
                    for a, b in zip(found, references.row_norm_backward_reference(*arguments)):
                        torch.testing.assert_close(a, b, **near)
        # Means far from zero, and first elements far from the mean.
        x = torch.randn(6, 1000)
        x[1] += 100
        x[2, 0] = 3000
        x[3] = 100 + x[3] / 10
        x[3, 0] = 400
        x[4] = 7
        x = x.half()
        launch = Launch(1024, 2, 1, 0, False, False)
        found, _, mean, rstd = launching.forward_rows(
            kernels, x, None, None, None, 1e-5, True, 0.0, False, torch.float32, launch=launch, processors=2
        )
        right, right_mean, right_rstd = references.row_norm_reference(
            x.double(), None, None, 1e-5, True, 0.0, False, torch.float64
        )
        # In deviations of the row.
        assert float(((mean - right_mean) * right_rstd).abs().max()) < 1e-4 and float(mean[4]) == 7
        torch.testing.assert_close(rstd.double(), right_rstd, atol=0, rtol=2e-4)
        torch.testing.assert_close(found.double(), right, atol=1e-4, rtol=2e-4)
        # NaN and infinities, the first element of a row or another.
        x = torch.randn(6, 37).half()
        x[0, 0], x[1, 5], x[2, 0], x[3, 5] = [float("inf")] * 2 + [float("nan")] * 2
        launch = Launch(64, 2, 1, 0, False, False)
        found = launching.forward_rows(
            kernels, x, None, None, None, 1e-5, True, 0.0, False, torch.float32, launch=launch, processors=2
        )
        assert found[0].isnan().all(1).tolist() == 4 * [True] + 2 * [False]
        assert found[0].isnan().any(1).tolist() == 4 * [True] + 2 * [False]
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


SPILLED = {(14336, True): 192}
"""Bytes of a thread that the backward of LayerNorm keeps in memory where rows fill the registers."""


@needs_triton
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("width", [128, 2048, 4096, 5120, 7168, 14336])
def test_the_kernels_compile_for_sm_90_without_spills(width: int, centered: bool) -> None:
    from graphopt_kernels import row_norm_triton

    rows = dict.fromkeys(
        ("data", "added", "result", "total", "grad", "passed", "d_data", "weight", "bias"), "*bf16"
    )
    sums = dict.fromkeys(("means", "scales", "d_weights", "d_biases"), "*fp32")
    numbers = {"rows": "i32", "eps": "fp32", "offset": "fp32"}
    half, shift = torch.bfloat16, torch.bfloat16 if centered else None

    def compiled(kernel: Any, launch: launching.Launch, **constants: Any) -> Any:
        fields = launch._asdict()
        given = {name.upper(): fields[name] for name in ("block", "rows", "ahead", "stages", "held")}
        return compile_function_for_sm90(
            kernel,
            {**rows, **sums, **numbers},
            {"CENTERED": centered, "WEIGHTED": True, "WIDTH": width, **given, **constants},
            warps=launch.warps,
            aligned=(*rows, *sums),
        )

    for added in (False, True):
        asked = launching.ForwardProblem(16384, width, half, half, half, shift, added, centered, not centered)
        launch = launching.forward_launch(asked)
        flags = {"ADDED": added, "BIASED": centered, "ROUNDED": not centered}
        code = compiled(row_norm_triton.forward_kernel, launch, **flags)
        assert not code.spills, code
        assert code.shared + code.asked <= 16384
        assert code.widths("LDG")[128] >= 2 and code.widths("STG")[128] >= 1
        # While one program waits for its rows, another computes; the longest rows fill the registers.
        assert code.registers * 32 * launch.warps * 2 <= 65536 or launch.block == launching.WIDEST
    for passed in (False, True):
        given = launching.BackwardProblem(16384, width, half, half, passed, centered, True, True, centered)
        launch = launching.backward_launch(given)
        biased = centered and launch.block < launching.WIDEST
        flags = {"PASSED": passed, "D_DATA": True, "D_WEIGHT": True, "D_BIAS": biased}
        code = compiled(row_norm_triton.backward_kernel, launch, **flags)
        assert code.stack + code.local <= SPILLED.get((width, centered), 0), code
        assert code.asked + 1024 <= 227 * 1024 // launch.programs
        loads = code.widths("LDGSTS" if launch.stages > 1 else "LDG")
        assert loads[128] >= 2 and code.widths("STG")[128] >= 1


@needs_triton
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("rows", [64, 512])
def test_sums_of_programs_are_read_16_bytes_at_a_time(rows: int, both: bool) -> None:
    from graphopt_kernels.row_norm_triton import columns_kernel

    types = {
        "d_weights": "*fp32",
        "d_biases": "*fp32",
        "d_weight": "*bf16",
        "d_bias": "*bf16",
        "programs": "i32",
    }
    constants = {"D_WEIGHT": True, "D_BIAS": both, "WIDTH": 4096, "COLUMNS": 16, "ROWS": rows}
    code = compile_function_for_sm90(
        columns_kernel, types, constants, warps=rows // 32, aligned=tuple(types)[:4]
    )
    assert not code.spills and code.widths("LDG")[128] == 4 * (1 + both)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stages": 9}, "9 stages are not from 1 to 8, or beside rows that are read ahead"),
        ({"ahead": True}, "3 stages are not from 1 to 8, or beside rows that are read ahead"),
        ({"stages": 8}, r"8 stages take 229376 bytes of shared memory: 212992 are there"),
        ({"programs": 0}, "sums over rows need programs that stay"),
    ],
)
def test_launches_that_cannot_be_are_refused(change: dict[str, Any], reason: str) -> None:
    half = torch.bfloat16
    problem = launching.BackwardProblem(16384, 8192, half, half, False, True, True, True, True)
    launch = launching.backward_launch(problem)
    assert launching.check_launch(problem, launch) is None
    assert str(launching.check_launch(problem, launch._replace(**change))) == reason
    forward = launching.ForwardProblem(16384, 8192, half, half, half, None, False, False, True)
    staged = launching.forward_launch(forward)._replace(stages=2)
    assert str(launching.check_launch(forward, staged)) == "the forward has one stage"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_launches_by_rule_fit_shared_memory(dtype: torch.dtype) -> None:
    for width, passed, centered in itertools.product(
        (64, 2048, 4096, 8192, 16384), (False, True), (False, True)
    ):
        asked = dtype, dtype, passed, centered, True, True, centered
        problem = launching.BackwardProblem(16384, width, *asked)
        assert launching.check_launch(problem, launching.backward_launch(problem)) is None
