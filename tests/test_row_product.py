"""A row's product with its norm, gate or residual: the operator, its kernel as machine code, its launches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt_kernels.emit.carried_ops import carried_ops
from graphopt_kernels.quantized.int4 import Int4
from graphopt_kernels.quantized.int8 import rounded_to_int8
from graphopt_kernels.quantized.settled import ahead_of
from graphopt_kernels.row_product import (
    RowLaunch,
    RowProblem,
    check_row_launch,
    launch_row_product,
    row_kernels,
    row_launch,
    row_launches,
    row_problem,
    row_product_reference,
    row_product_supports,
)
from tests.interpreted import interpreted
from tests.row_product_kernels import exactly

BF16, FP16, FP32, INT8, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
INT4 = torch.uint8
SHAPES = (
    (6144, 4096, True, False),
    (4096, 4096, False, False),
    (14336, 4096, True, True),
    (4096, 14336, False, False),
)
operator = torch.ops.graphopt.row_product


def given(
    rows: int = 1, gate: str = "silu", dtype: torch.dtype = FP32, packed: str = ""
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    k = 128 if packed == "int4" else 32
    weight, scales = torch.randn(12, k) / 6, None
    if packed == "int8":
        weight, scales = rounded_to_int8(weight)
    elif packed == "int4":
        weight, scales = Int4(64).pack(weight, {}).values()
    else:
        weight = weight.to(dtype)
    columns = 6 if gate else 12
    return (
        torch.randn(rows, k).to(dtype), weight, scales, torch.randn(12).to(dtype), torch.rand(k).to(dtype),
        True, 1e-5, 1.0, torch.randn(rows, columns).to(dtype), gate,
    )  # fmt: skip


def test_kernels_compute_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    errors = interpreted("row_product_kernels.py")["errors"]
    assert all(error < (5e-7 if name.startswith("5") else 4e-4) for name, error in errors.items()), errors


@pytest.mark.parametrize("packed", ["", "int8", "int4"])
@pytest.mark.parametrize("gate", ["", "silu", "gelu", "gelu_tanh"])
def test_it_computes_what_the_parts_do_and_passes_opcheck(gate: str, packed: str) -> None:
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


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, torch.ones(1, 64), r"the weight is [12, 64] bytes of two codes, for rows of [64]"),
        (2, None, "codes of int4 need words int32[N, K / group]"),
        (2, torch.ones(12), "codes of int4 need words int32[N, K / group]"),
        (
            2,
            torch.ones(12, 3, dtype=torch.int32),
            "words are [12, 3]: expected [12, 1] or [12, 2] or [12, 4]",
        ),
        (4, torch.ones(64), "norm is [64]: expected [128]"),
    ],
)
def test_other_arguments_of_int4_are_refused(at: int, value: Any, text: str) -> None:
    arguments = list(given(packed="int4"))
    arguments[at] = value
    reason = row_product_supports(*arguments)
    assert reason is not None and reason.text == text, reason


def compiled_digits(problem: RowProblem, launch: RowLaunch) -> Any:
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.quantized import row_digits_triton

    types = {
        **dict.fromkeys(("x_ptr", "bias_ptr", "norm_ptr", "added_ptr", "out_ptr"), "*bf16"),
        "codes_ptr": "*i32", "scales_ptr": "*i32" if problem.group else "*fp32", "N": "i32", "K": "i32",
        "GROUPS": "i32", "eps": "fp32", "offset": "fp32",
    }  # fmt: skip
    steps = -(-problem.inner // launch.inner)
    constants = {
        "BITS": problem.bits, "GROUP": problem.group, "HALF": 64 if problem.group else 0, "BIASED": False,
        "NORMED": problem.normed, "WEIGHED": problem.normed, "ADDED": not problem.normed,
        "GATE": "silu" if problem.gated else "", "STEPS": steps,
        "EVEN": steps * launch.inner == problem.inner, "FAST": True, "BLOCK_N": launch.rows,
        "WARPS": launch.warps, "EARLY": True,
    }  # fmt: skip
    by_16 = [name for name in types if name.endswith("_ptr") or name in "NK"]
    return compile_function_for_sm90(
        row_digits_triton.row_digits_kernel, types, constants, warps=launch.warps, aligned=by_16
    )


@pytest.mark.parametrize(("codes", "group"), [(INT4, 128), (INT4, 64), (INT8, 0)], ids=str)
def test_digits_are_multiplied_as_bytes(codes: torch.dtype, group: int) -> None:
    pytest.importorskip("triton")
    for columns, inner, normed, gated in SHAPES[2 if group != 64 else 3 :]:
        problem = RowProblem(columns, inner, BF16, codes, normed, gated, group)
        launch = next(launch for launch in row_launches(problem) if launch.kind == "digits")
        assert check_row_launch(problem, launch) is None
        code = compiled_digits(problem, launch)
        assert not code.spills, launch
        steps = -(-inner // launch.inner)
        assert code.widths("LDG")[128] >= launch.rows * steps
        numbers = launch.rows * steps * 32 // (problem.bits // 4)
        products = sum(n for op, n in code.instructions.items() if op.startswith("IDP.4A"))
        # Two digits of four codes at a time, and the sums of digits.
        assert numbers // 2 <= products <= numbers // 2 + 16 * steps
        floats = sum(n for op, n in code.instructions.items() if op.startswith(("I2F", "F2F.")))
        assert floats <= launch.rows * steps * (2 if group == 64 else 1) + 2 * steps + 1


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
        launches = row_launches(problem)
        assert row_launch(problem) in launches
        launch = next(launch for launch in launches if launch.kind == "floats")
        assert check_row_launch(problem, launch) is None
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
        (RowLaunch(8, 1024, 4, "digits"), "digits are for int4 and int8, and rows of bfloat16 and float16"),
        (RowLaunch(8, 512, 4, "d"), "kind is 'd': a weight of torch.bfloat16 takes floats or digits"),
    ):
        reason = check_row_launch(problem, launch)
        assert reason is not None and reason.text == text
    problem = RowProblem(4096, 65536, BF16, INT4, True, True, 128)
    for launch, text in (
        (RowLaunch(8, 4096, 4), "kind is 'floats': a weight of torch.uint8 takes digits"),
        (RowLaunch(8, 2048, 4, "digits"), "a step is 512 bytes of a row for each warp"),
        (RowLaunch(1, 4096, 4, "digits"), "a program has both rows of a gate"),
        (RowLaunch(32, 4096, 4, "digits"), "what a lane has on its way does not fit its registers"),
        (RowLaunch(8, 2048, 2, "digits"), "more than 16 steps are not written out"),
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
@pytest.mark.parametrize("codes", [BF16, FP16, INT8, FP8, INT4], ids=str)
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
        if codes is INT4:
            group = next((size for size in (64, 128, 32) if k % size == 0), 0)
            if not group:
                continue
            weight, scales = Int4(group).pack(weight, {}).values()
        elif codes in (INT8, FP8):
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
        kernels = row_kernels()
        assert kernels is not None
        problem = row_problem(x, weight, scales, normed, gate)
        for launch in (launch for launch in row_launches(problem) if launch.kind == "digits"):
            given = (x, weight, scales, bias, norm, 1e-5, 0.5, added, gate)
            found = launch_row_product(kernels, problem, launch, *given)
            assert (found.double() - exact).norm() <= limit * exact.norm(), (k, n, gate, launch)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_digits_of_what_is_no_number_are_none(bad: float) -> None:
    weight, words = Int4(128).pack(torch.randn(64, 4096, device="cuda"), {}).values()
    x = torch.randn(1, 4096, device="cuda", dtype=BF16)
    x[0, 1234] = bad
    found = operator(x, weight, words, None, None, False, 0.0, 0.0, None, "")
    assert found.isnan().all()
