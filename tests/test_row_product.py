"""A row's product with its norm, gate or residual: the operator, its kernel as machine code, its launches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt_kernels.emit.carried_ops import carried_ops
from graphopt_kernels.quantized.int8 import rounded_to_int8
from graphopt_kernels.quantized.settled import ahead_of
from graphopt_kernels.row_product import (
    RowLaunch,
    RowProblem,
    check_row_launch,
    row_launch,
    row_launches,
    row_product_reference,
    row_product_supports,
)
from tests.interpreted import interpreted
from tests.row_product_kernels import exactly

BF16, FP16, FP32, INT8, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
SHAPES = (
    (6144, 4096, True, False),
    (4096, 4096, False, False),
    (14336, 4096, True, True),
    (4096, 14336, False, False),
)
operator = torch.ops.graphopt.row_product


def given(
    rows: int = 1, gate: str = "silu", dtype: torch.dtype = FP32, packed: bool = False
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    weight, scales = torch.randn(12, 32) / 6, None
    if packed:
        weight, scales = rounded_to_int8(weight)
    else:
        weight = weight.to(dtype)
    columns = 6 if gate else 12
    return (
        torch.randn(rows, 32).to(dtype), weight, scales, torch.randn(12).to(dtype), torch.rand(32).to(dtype),
        True, 1e-5, 1.0, torch.randn(rows, columns).to(dtype), gate,
    )  # fmt: skip


def test_kernels_compute_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    errors = interpreted("row_product_kernels.py")["errors"]
    assert all(error < (5e-7 if name.startswith("5") else 4e-4) for name, error in errors.items()), errors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", ["", "silu", "gelu", "gelu_tanh"])
def test_it_computes_what_the_parts_do_and_passes_opcheck(gate: str, packed: bool) -> None:
    arguments = given(3, gate, packed=packed)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
    torch.testing.assert_close(operator(*arguments).double(), exactly(*wide), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
    assert operator(*given(0, gate)).shape == (0, 6 if gate else 12)


def test_what_is_no_number_stays_none() -> None:
    for bad in (float("nan"), float("inf")):
        x, *rest = given()
        x[0, 3] = bad
        apart = row_product_reference(x, *rest)
        assert torch.equal(operator(x, *rest).isnan(), apart.isnan()) and apart.isnan().any()


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, torch.ones(1, 32, dtype=torch.float64), "takes rows of float32, float16 and bfloat16, got"),
        (0, torch.ones(1, 31), r"the weight is [12, 32], for rows of [31]"),
        (1, torch.ones(12, 32, dtype=INT8), "the weight is torch.int8: takes int8 and float8_e4m3fn with"),
        (1, torch.ones(11, 32), "the weight has 11 rows, which have no halves"),
        (3, torch.ones(6), "bias is [6]: expected [12]"),
        (4, torch.ones(12), "norm is [12]: expected [32]"),
        (5, False, "norm is given, and normed is False"),
        (8, torch.ones(1, 12), "added is [1, 12]: expected [1, 6]"),
        (9, "relu", "gate is 'relu': it takes '', 'silu', 'gelu', 'gelu_tanh'"),
    ],
)  # fmt: skip
def test_other_arguments_are_refused(at: int, value: Any, text: str) -> None:
    arguments = list(given())
    arguments[at] = value
    reason = row_product_supports(*arguments)
    assert reason is not None and reason.text.startswith(text), reason
    with pytest.raises(ValueError, match="row_product: "), torch._subclasses.FakeTensorMode() as mode:
        operator(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments))


def compiled(problem: RowProblem, launch: RowLaunch) -> Any:
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.quantized import bytes_triton

    names = {BF16: "*bf16", INT8: "*i8", FP8: "*fp8e4nv"}
    x = names[problem.dtype]
    types = {
        "x_ptr": x, "codes_ptr": names[problem.codes], "scales_ptr": "*fp32", "bias_ptr": x, "norm_ptr": x,
        "added_ptr": x, "out_ptr": x, "N": "i32", "K": "i32", "STEPS": "i32", "eps": "fp32", "offset": "fp32",
    }  # fmt: skip
    constants = {
        "SCALED": problem.codes is not BF16, "BIASED": False, "NORMED": problem.normed,
        "WEIGHED": problem.normed, "ADDED": not problem.normed, "GATE": "silu" if problem.gated else "",
        "PARTS": 1, "EVEN": True, "AHEAD": ahead_of(problem.inner // launch.inner), "FAST": True,
        "BLOCK_N": launch.rows, "BLOCK_K": launch.inner, "WARPS": launch.warps, "EARLY": True,
    }  # fmt: skip
    by_16 = [name for name in types if name.endswith("_ptr") or name in "NK"]
    return compile_function_for_sm90(
        bytes_triton.row_kernel, types, constants, warps=launch.warps, aligned=by_16
    )


@pytest.mark.parametrize("codes", [BF16, pytest.param(INT8, marks=pytest.mark.slow), FP8], ids=str)
def test_launches_stream_weights_16_bytes_at_a_time(codes: torch.dtype) -> None:
    pytest.importorskip("triton")
    for columns, inner, normed, gated in SHAPES[1:]:
        problem = RowProblem(columns, inner, BF16, codes, normed, gated)
        launch = row_launch(problem)
        assert check_row_launch(problem, launch) is None and launch in row_launches(problem)
        code = compiled(problem, launch)
        assert not code.spills, launch
        assert code.widths("LDG")[128] >= 8
        assert sum(n for op, n in code.instructions.items() if op.startswith("ACQBULK")), (
            "weights before the wait"
        )
        # The length of the row is turned into a number once.
        assert sum(n for op, n in code.instructions.items() if op.startswith(("I2F", "F2F."))) <= 1


def test_launches_that_would_compute_something_else_are_refused() -> None:
    problem = RowProblem(4096, 4096, BF16, BF16, True, True)
    for launch, text in (
        (RowLaunch(12, 1024, 4), "sizes are powers of two"),
        (RowLaunch(8, 128, 4), "a warp reads 512 bytes of a row or more"),
        (RowLaunch(8, 1024, 8), "every warp has a row, and both rows of a gate"),
        (RowLaunch(8, 4096, 4), "what a lane has on its way does not fit its registers"),
    ):
        reason = check_row_launch(problem, launch)
        assert reason is not None and reason.text == text


def test_it_goes_with_programs_that_are_written_out(tmp_path: Path) -> None:
    name, files = carried_ops(["graphopt_kernels.row_product"])
    for path, text in files.items():
        target = tmp_path / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    script = (
        "import sys, torch; sys.modules['graphopt'] = None\n"
        f"sys.path.insert(0, {str(tmp_path)!r}); import {name}\n"
        "x, w = torch.ones(1, 8), torch.ones(6, 8)\n"
        f"y = torch.ops.{name}.row_product(x, w, None, None, None, True, 0.0, 0.0, None, 'silu')\n"
        "assert y.shape == (1, 3) and (y - 64 * torch.sigmoid(torch.tensor(8.0))).abs().max() < 1e-4, y\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [BF16, FP16, INT8, FP8], ids=str)
def test_a_gpu_computes_what_the_parts_do(codes: torch.dtype) -> None:
    from graphopt_kernels.quantized.fp8 import rounded_to_fp8

    for k, n, gate, normed, early in (
        (4096, 512, "silu", True, False), (14336, 96, "", False, True), (1000, 33, "gelu", True, False),
        (768, 64, "gelu_tanh", True, True), (65536, 16, "", True, False),
    ):  # fmt: skip
        torch.manual_seed(k)
        dtype = codes if codes in (BF16, FP16) else BF16
        rows = 2 * n if gate else n
        weight, scales = torch.randn(rows, k, device="cuda") / k**0.5, None
        if codes in (INT8, FP8):
            weight, scales = (rounded_to_int8 if codes is INT8 else rounded_to_fp8)(weight)
        weight = weight.to(codes)
        x = torch.randn(1, 1, k, device="cuda").to(dtype)
        norm = torch.rand(k, device="cuda").to(dtype) if normed else None
        bias, added = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((rows,), (1, 1, n)))
        arguments = (x, weight, scales, bias, norm, normed, 1e-5, 0.5, added, gate)
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
        exact = exactly(*wide)
        for _ in range(2 if early else 1):
            # Asked again of a weight that nobody wrote, its kernel is let in early.
            found = operator(*arguments)
        limit = 0.006 if dtype is BF16 else 0.001
        assert (found.double() - exact).norm() <= limit * exact.norm(), (k, n, gate)
