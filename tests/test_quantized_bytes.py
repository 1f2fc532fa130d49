"""Weights of a byte: kernels in the interpreter and as machine code, which is launched when, operators."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import graphopt
from graphopt._torch import multiplies_integers
from graphopt.errors import QuantizationError
from graphopt.packing import Scheme, pack_weights
from graphopt.plugins import default_host
from graphopt_kernels.quantized import byte_products
from graphopt_kernels.quantized.byte_digits import can_multiply, product_of_digits
from graphopt_kernels.quantized.byte_launch import (
    LIBRARY,
    Launch,
    Problem,
    check_launch,
    dense_seconds,
    launch_for,
    predicted_seconds,
)
from graphopt_kernels.quantized.dynamic import Fp8Dynamic, Int8Dynamic, linear_dynamic_reference
from graphopt_kernels.quantized.fp8 import Fp8
from graphopt_kernels.quantized.int8 import Int8, rounded_to_int8
from graphopt_kernels.row_quantize import quantize_reference
from tests.interpreted import interpreted

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8 = torch.int8, torch.float8_e4m3fn
H200 = 132
SCHEMES = (Int8(), Fp8(), Int8Dynamic(), Int8Dynamic(smooth=0.5), Fp8Dynamic())
LLAMA = ((4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (128256, 4096))


# --- kernels ------------------------------------------------------------------------------------


def test_kernels_compute_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    found = interpreted("quantized_kernels.py")
    assert all(error < (3e-7 if name == "0: row" else 4e-4) for name, error in found["errors"].items()), found
    assert found["unpacked"] and found["scaled"] < 3e-7
    assert found["smoothed"]
    assert all(all(kinds) for kinds in found["poisoned"].values()), found["poisoned"]


_POOL = {
    "rn.f32": (np.uint32, lambda a: a.view(np.float32), lambda v: v.view(np.uint32)),
    "rn.f16x2": (
        np.uint32,
        lambda a: a.view(np.float16).astype(np.float32),
        lambda v: v.astype(np.float16).view(np.uint32),
    ),
    "rn.bf16x2": (
        np.uint32,
        lambda a: (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
        lambda v: (v.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32),
    ),
}
"""Exact where results are: what is cut off of a bfloat16 is zero."""


def run_ptx(text: str, words: Any) -> list[Any]:
    """Results of the few instructions that codes are turned into numbers with, for the last operand."""
    registers: dict[str, Any] = {}
    last = max(int(n) for n in re.findall(r"\$(\d+)", text))
    registers[f"${last}"] = words

    def value(name: str) -> Any:
        if name in registers:
            return registers[name]
        return np.full_like(words, int(name.removeprefix("0f"), 16 if name.startswith(("0x", "0f")) else 10))

    for statement in text.strip("{} \n").split(";"):
        name, _, rest = statement.strip().partition(" ")
        given = [part.strip() for part in rest.split(",")]
        if not name or name == ".reg":
            continue
        into, *sources = given[0], *map(value, given[1:])
        if name.startswith("mov"):
            result = sources[0]
        elif name.startswith("xor"):
            result = sources[0] ^ sources[1]
        elif name.startswith("and"):
            result = sources[0] & sources[1]
        elif name.startswith("shr"):
            result = sources[0] >> sources[1]
        elif name.startswith("lop3"):
            assert given[-1] == "0xEA", "a & b | c"
            result = (sources[0] & sources[1]) | sources[2]
        elif name.startswith("prmt"):
            both = sources[0].astype(np.uint64) | (sources[1].astype(np.uint64) << np.uint64(32))
            selector, result = int(given[3], 16), np.zeros_like(words)
            for place in range(4):
                byte = (both >> np.uint64(8 * (selector >> (4 * place) & 7))) & np.uint64(255)
                result |= byte.astype(np.uint32) << np.uint32(8 * place)
        else:
            operation, _, kind = name.partition(".")
            _, wide, narrow = _POOL[kind]
            a, b = wide(sources[0]), wide(sources[1])
            result = narrow(a - b if operation == "sub" else a * b)
        registers[into] = result
    return [registers[f"${number}"] for number in range(last)]


@pytest.mark.parametrize(
    ("name", "codes", "dtype"),
    [("_TO_FLOAT32", INT8, FP32), ("_TO_FLOAT16", INT8, FP16), ("_TO_BFLOAT16", INT8, BF16),
     ("_FLOAT8_TO_BFLOAT16", FP8, BF16)],
)  # fmt: skip
def test_instructions_make_the_numbers_that_codes_stand_for(
    name: str, codes: torch.dtype, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    from graphopt_kernels.quantized import bytes_triton

    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    given = torch.stack([every, every.flip(0), every.roll(77), every.roll(128)], 1).contiguous()
    exact = given.view(codes).to(dtype)
    found = run_ptx(getattr(bytes_triton, name).value, given.numpy().view(np.uint32).ravel())
    words = torch.from_numpy(np.stack(found, 1).astype(np.int64)).to(torch.int32)
    numbers = words.contiguous().view(dtype).view(256, 4)
    assert torch.equal(numbers[~exact.isnan()], exact[~exact.isnan()])


def _pointers(problem: Problem, launch: Launch) -> dict[str, str]:
    names = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", INT8: "*i8", FP8: "*fp8e4nv"}
    whole = problem.rounded and problem.codes is INT8
    summed = "*i32" if whole else "*fp32"
    return {
        "x_ptr": names[problem.codes if problem.rounded else problem.dtype],
        "x_scales_ptr": "*fp32",
        "codes_ptr": names[problem.codes],
        "scales_ptr": "*fp32",
        "bias_ptr": names[problem.dtype],
        "norm_ptr": names[problem.dtype],
        "added_ptr": names[problem.dtype],
        "eps": "fp32",
        "offset": "fp32",
        "beside_ptr": names[problem.dtype],
        "exact_ptr": names[problem.dtype],
        "tail_ptr": "*fp32",
        "WIDTH": "i32",
        "out_ptr": names[problem.dtype] if launch.parts == 1 else summed,
        "N": "i32",
        "K": "i32",
        "M": "i32",
        "STEPS": "i32",
    }


@cache
def compiled(problem: Problem, launch: Launch, aligned: bool = True, tail: bool = False) -> Any:
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.quantized import bytes_triton as kernels

    kernel = {
        "row": kernels.row_kernel, "slices": kernels.slices_kernel, "tiles": kernels.tile_kernel,
    }[launch.kind]  # fmt: skip
    types = _pointers(problem, launch)
    constants = {
        "BIASED": True, "ROUNDED": problem.rounded, "TAIL": tail, "PARTS": launch.parts, "EVEN": aligned,
        "FAST": True,
        "BLOCK_M": launch.rows, "BLOCK_N": launch.columns, "BLOCK_K": launch.inner,
        "SLICES": launch.slices, "WARPS": launch.warps, "EARLY": True, "SCALED": True,
        "NORMED": False, "WEIGHED": False, "ADDED": False, "GATE": "",
        "AHEAD": aligned and problem.inner > launch.inner,
    }  # fmt: skip
    by_16 = [name for name in types if name.endswith("_ptr") or (aligned and name in "NK")]
    return compile_function_for_sm90(
        kernel, types, constants, warps=launch.warps, stages=launch.stages, aligned=by_16
    )


def _kinds() -> dict[str, tuple[Problem, Launch]]:
    """Every launch that is chosen for products of a Llama of 8 billion weights, once."""
    found: dict[tuple[Any, ...], tuple[Problem, Launch]] = {}
    for codes, rounded in ((INT8, False), (FP8, False), (INT8, True), (FP8, True)):
        for rows in (1, 16, 64, 256):
            for n, k in LLAMA[:2]:
                problem = Problem(rows, n, k, BF16, codes, rounded)
                launch = launch_for(problem, H200)
                if launch is not LIBRARY:
                    key = (codes, rounded, launch._replace(parts=min(launch.parts, 2)))
                    found.setdefault(key, (problem, key[2]))
    return {
        f"{str(p.codes)[6:]}{' rounded' if p.rounded else ''}, {' '.join(map(str, launch))}": (p, launch)
        for p, launch in found.values()
    }


def _count(code: Any, *starts: str) -> int:
    return sum(n for name, n in code.instructions.items() if name.startswith(starts))


def test_launches_become_the_machine_code_that_they_are_predicted_to_be() -> None:
    """No spills; weights 16 bytes at a time; tensor cores; no conversion at a quarter of the rate."""
    pytest.importorskip("triton")
    kinds = {name: found for name, found in _kinds().items() if found[1].kind != "row"}
    assert {launch.kind for _, launch in kinds.values()} >= {"slices", "tiles"}
    for name, (problem, launch) in kinds.items():
        code = compiled(problem, launch)
        assert not code.spills, name
        assert code.shared + code.asked <= 227 * 1024, name
        groups = launch.kind == "tiles" and launch.warps >= 4
        of_groups = {INT8: "IGMMA", FP8: "QGMMA"}[problem.codes] if problem.rounded else "HGMMA"
        of_warps = "IMMA" if problem.rounded and problem.codes is INT8 else "HMMA"
        assert _count(code, of_groups if groups else of_warps), (name, code.instructions)
        assert code.widths("LDGSTS")[128], name
        slow = [op for op in code.instructions if op.startswith(("I2F.", "F2F.")) and not op.endswith(".RP")]
        assert not slow and not _count(code, "LDG.E.U8", "LDG.E.S8"), (name, slow)


def test_rows_of_one_number_stream_weights_16_bytes_at_a_time() -> None:
    pytest.importorskip("triton")
    for codes in (INT8, FP8):
        for dtype in (BF16, FP32):
            problem = Problem(1, 4096, 4096, dtype, codes)
            for columns in (4096, 14336, 128256):
                launch = launch_for(problem._replace(columns=columns), H200)
                assert launch.kind == "row"
                code = compiled(problem, launch)
                assert not code.spills and code.widths("LDG")[128] >= 8
                assert not _count(code, "I2F", "F2F."), code.instructions
                # One exchange between lanes, in the end.
                assert _count(code, "BAR") <= 1 and _count(code, "LDS", "LDSM") <= 2
                assert _count(code, "ACQBULK"), "codes before the wait, x after it"


def test_odd_sizes_compile_without_spills() -> None:
    pytest.importorskip("triton")
    for rows, rounded in ((1, False), (16, False), (64, True)):
        problem = Problem(rows, 4099, 1003, BF16, INT8, rounded)
        launch = launch_for(problem, H200)
        assert launch is not LIBRARY
        assert not compiled(problem, launch, aligned=False).spills, launch
    assert launch_for(Problem(64, 4099, 1003, BF16, INT8), H200) is LIBRARY


def test_the_other_kernels_compile() -> None:
    pytest.importorskip("triton")
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.quantized import bytes_triton as kernels

    types = {
        "codes_ptr": "*i8", "scales_ptr": "*fp32", "out_ptr": "*bf16", "N": "i32", "K": "i32",
        "x_scales_ptr": "*fp32", "bias_ptr": "*bf16", "count": "i32", "tail_ptr": "*fp32",
    }  # fmt: skip
    given = (
        (kernels.unpack_kernel, {}, {"FAST": True, "BLOCK_N": 8, "BLOCK_K": 1024}, 8),
        (kernels.sum_kernel, {"partial_ptr": "*fp32"}, {"PARTS": 4, "BLOCK": 512}, 4),
        (kernels.scale_kernel, {"sums_ptr": "*i32"}, {"BLOCK": 1024}, 4),
    )
    for kernel, more, constants, warps in given:
        all_types = types | more
        all_constants = {"BIASED": True, "ROUNDED": True, "TAIL": True, **constants}
        code = compile_function_for_sm90(
            kernel, all_types, all_constants, warps=warps, aligned=all_types
        )
        assert not code.spills and code.widths("LDG")[128], code.instructions
        assert code.widths("STG")[128] or code.widths("STG")[64], code.instructions


# --- on a CPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_digits_are_as_near_as_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codes, scales = rounded_to_int8(torch.randn(96, 1000) / 30)
    bias = torch.randn(96).to(dtype)
    for rows in (1, 2, 9):
        x = torch.randn(rows, 1000).to(dtype)
        x[0, 3] = 200
        exact = x.double() @ codes.double().t() * scales + bias.double()
        found = product_of_digits(x, codes, scales, bias)
        assert found is not None and found.dtype is dtype
        error = (found.double() - exact).norm() / exact.norm()
        # An outlier costs the others of its row: sqrt(1000) times 2**-24 at most.
        assert error < (2e-6 if dtype is FP32 else torch.finfo(dtype).eps)


def test_digits_of_extremes_are_right_and_rows_that_are_not_finite_are_left_alone() -> None:
    codes, scales = rounded_to_int8(torch.randn(8, 64))
    for x in (torch.zeros(2, 64), torch.full((1, 64), 1e-30), torch.full((1, 64), -1e36), torch.eye(64)):
        found = product_of_digits(x, codes, scales, None)
        exact = x.double() @ codes.double().t() * scales
        assert found is not None
        assert (found.double() - exact).norm() <= 1e-6 * exact.norm()
    for bad in (float("nan"), float("inf")):
        assert product_of_digits(torch.tensor([[1.0] * 63 + [bad]]), codes, scales, None) is None


@pytest.mark.skipif(not multiplies_integers(), reason="the CPU has no products of integers")
def test_large_weights_are_multiplied_as_integers_where_the_cpu_can() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 260) / 16
    x = torch.randn(3, 2, 260)
    for scheme in (Int8(), Int8Dynamic()):
        tensors = list(scheme.pack(weight, {}).values())
        assert can_multiply(tensors[0]) and not can_multiply(tensors[0][:8])
        found = operator(scheme)(x, *tensors, None)
        given = x.double()
        if scheme.name != "int8":
            codes, by_row = quantize_reference(x, INT8, 127.0, 1e-12)
            given = codes.double() * by_row
        exact = given @ tensors[0].double().t() * tensors[1]
        assert (found.double() - exact).norm() < 1e-6 * exact.norm()
    x[1, 1, 7] = float("inf")
    found = operator(Int8())(x, *Int8().pack(weight, {}).values(), None)
    assert found[0].isfinite().all() and not found[1, 1].isfinite().any()


# --- launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("codes", [INT8, FP8])
def test_few_rows_are_predicted_to_be_faster_than_dense_by_the_bytes(
    codes: torch.dtype, rounded: bool
) -> None:
    for n, k in LLAMA:
        for rows in (1, 2, 8, 16):
            problem = Problem(rows, n, k, BF16, codes, rounded)
            launch = launch_for(problem, H200)
            assert check_launch(problem, launch) is None
            gain = dense_seconds(problem) / predicted_seconds(problem, launch, H200)
            assert gain > 1.35, (problem, launch)


def test_what_is_chosen_is_predicted_to_be_no_slower_than_anything_else() -> None:
    for rows in (1, 7, 17, 100, 1000, 4096):
        for rounded in (False, True):
            problem = Problem(rows, 14336, 4096, BF16, INT8, rounded)
            chosen = predicted_seconds(problem, launch_for(problem, H200), H200)
            others = [Launch("tiles", 128, 128, 64, 1, 1, 8, 3)]
            others += [LIBRARY] if rows > 16 or not rounded else []
            assert all(chosen <= predicted_seconds(problem, other, H200) for other in others)
            if rounded:
                assert chosen < dense_seconds(problem)


def test_what_is_said_of_rows_holds() -> None:
    """docs/quantization.md: all schemes up to 16 rows, dynamic ones with many. What was measured is in
    ``test_quantized_measured.py``."""
    for n, k in LLAMA:
        for codes in (INT8, FP8):
            for rows in (1, 2, 3, 9, 16, 17, 33, 64, 65, 128, 200, 256, 500, 1024, 2048, 4096):
                for rounded in (False, True):
                    if rows <= 16 or (rounded and rows >= 500):
                        problem = Problem(rows, n, k, BF16, codes, rounded)
                        launch = launch_for(problem, H200)
                        assert predicted_seconds(problem, launch, H200) < dense_seconds(problem), problem


def test_unpacking_costs_least_where_there_are_many_rows() -> None:
    """Weight-only arithmetic multiplies as dense products do: for many rows it costs the unpacking more."""
    for n, k in LLAMA:
        problem = Problem(4096, n, k, BF16, INT8)
        assert launch_for(problem, H200) is LIBRARY
        assert predicted_seconds(problem, LIBRARY, H200) < 1.08 * dense_seconds(problem)


def test_the_library_is_asked_for_what_it_takes_alone() -> None:
    for problem in (
        Problem(16, 4096, 4096, BF16, INT8, True), Problem(4096, 4095, 4096, BF16, INT8, True),
        Problem(4096, 4096, 4100, BF16, FP8, True), Problem(4096, 4096, 4096, FP16, FP8, True),
    ):  # fmt: skip
        assert launch_for(problem, H200).kind in ("slices", "tiles")
    assert launch_for(Problem(4096, 4096, 4096, BF16, FP8, True), H200) is LIBRARY
    assert launch_for(Problem(4096, 4096, 4096, BF16, FP8, True), H200, library=False).kind == "tiles"
    assert launch_for(Problem(2, 64, 64, FP32, INT8), H200) is LIBRARY, "no tensor cores for float32"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "rows"}, "there is no kernel 'rows'"),
        ({"kind": "row"}, "rows are multiplied one at a time, as they are"),
        ({"rows": 24}, "sizes are powers of two"),
        ({"slices": 2}, "every warp has a slice"),
        ({"rows": 4}, "tensor cores take 8 rows, 16 columns and 32 products"),
        ({"parts": 5}, "a part has nothing to add up"),
    ],
)
def test_launches_that_compute_something_else_are_told(changes: dict[str, Any], reason: str) -> None:
    problem = Problem(8, 64, 1024, BF16, INT8)
    good = Launch("slices", 8, 16, 64, 4, 4, 4, 3)
    assert check_launch(problem, good) is None
    assert str(check_launch(problem, good._replace(**changes))) == reason


def test_tensor_cores_do_not_take_float32() -> None:
    launch = Launch("tiles", 16, 64, 64, 1, 1, 4, 3)
    reason = "tensor cores do not multiply torch.float32"
    assert str(check_launch(Problem(8, 64, 512, FP32, INT8), launch)) == reason
    reason = "the library does not multiply eight-bit numbers of these sizes"
    assert str(check_launch(Problem(8, 64, 512, BF16, INT8, True), LIBRARY)) == reason


def test_tuning_tries_launches_that_compile_and_run_as_the_kernels_do() -> None:
    pytest.importorskip("triton")
    from graphopt_kernels.tuning.compiling import calls_of, usage_of
    from graphopt_kernels.tuning.model import Gpu, Usage

    spec, gpu = default_host().tunable("packed-bytes"), Gpu.of("H200", (9, 0), H200)
    shipped = list(spec.shipped())
    assert {problem.codes for problem in shipped} == {INT8, FP8}
    for problem in (shipped[0], shipped[0]._replace(rows=16, rounded=True)):
        tried = list(spec.configurations(problem))
        assert spec.default(problem) in tried and len(set(tried)) == len(tried) > 20
        best = min(tried, key=lambda c: spec.predict(problem, c, spec.estimate(problem, c), gpu))
        usage = usage_of(calls_of(spec, problem, best, H200), gpu)
        assert isinstance(usage, Usage) and not usage.spilled
        small = problem._replace(columns=32, inner=128)
        operands = spec.operands(small, torch.device("cpu"))
        for one, other in zip(
            spec.run(None, H200, small, operands, LIBRARY) if not small.rounded else [],
            spec.reference(small, operands),
            strict=False,
        ):
            torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.5)


# --- operators ----------------------------------------------------------------------------------


def operator(scheme: Scheme, which: str = "linear_op") -> Callable[..., Tensor]:
    found: Any = getattr(torch.ops.graphopt, getattr(scheme, which).partition("::")[2]).default
    return found  # type: ignore[no-any-return]


def packed(
    scheme: Scheme, n: int = 24, k: int = 40, dtype: torch.dtype = FP32
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    largest = torch.rand(k) * 5
    largest[3] = 80
    return weight, list(scheme.pack(weight, {"largest": largest}).values())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_operators_are_sound(scheme: Scheme) -> None:
    _, tensors = packed(scheme)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if "fp8" in scheme.name:
        tests = tests[1:]  # torch compares inputs with what they were by arithmetic that float8 has not
    for shape in ((3, 40), (40,), (0, 40), (2, 1, 40)):
        x = torch.randn(shape, requires_grad=True)
        for bias in (None, torch.randn(24, requires_grad=True)):
            torch.library.opcheck(operator(scheme), (x, *tensors, bias), test_utils=tests)
    torch.library.opcheck(operator(scheme, "unpack_op"), (*tensors, BF16), test_utils=tests)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_are_those_of_the_arithmetic_that_is_stated(scheme: Scheme, dtype: torch.dtype) -> None:
    _, tensors = packed(scheme, dtype=dtype)
    x, bias = torch.randn(5, 80)[:, ::2].to(dtype), torch.randn(24).to(dtype)
    found = operator(scheme)(x, *tensors, bias)
    if "dynamic" in scheme.name:
        expected = linear_dynamic_reference(x, *tensors, bias).double()  # type: ignore[arg-type]
    else:
        weight = tensors[0].double() * tensors[1][:, None]
        expected = x.double() @ weight.t() + bias.double()
    assert found.dtype is dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_unpacked_weight(scheme: Scheme) -> None:
    _, tensors = packed(scheme)
    x, bias = torch.randn(5, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    grad = torch.randn(5, 24)
    operator(scheme)(x, *tensors, bias).backward(grad)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ operator(scheme, "unpack_op")(*tensors, FP32))
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_nan_and_an_infinity_come_through_in_their_row_alone(scheme: Scheme) -> None:
    _, tensors = packed(scheme)
    x = torch.randn(3, 40)
    clean = operator(scheme)(x, *tensors, None)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    found = operator(scheme)(x, *tensors, None)
    assert torch.equal(found[0], clean[0])
    assert found[1].isnan().all() and not found[2].isfinite().any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_are_near_what_was_packed_and_take_the_bytes_that_are_stated(scheme: Scheme) -> None:
    weight, tensors = packed(scheme, 24, 64)
    unpacked = operator(scheme, "unpack_op")(*tensors, FP32)
    assert (unpacked - weight).norm() / weight.norm() < (0.03 if "fp8" in scheme.name else 0.02)
    assert sum(t.numel() * t.element_size() for t in tensors) == scheme.stored_bytes(24, 64, FP32)
    zero = list(scheme.pack(torch.zeros(2, 8), {}).values())
    assert torch.equal(operator(scheme, "unpack_op")(*zero, FP32), torch.zeros(2, 8))
    assert torch.equal(operator(scheme)(torch.randn(3, 8), *zero, None), torch.zeros(3, 2))


def test_smoothing_helps_where_a_channel_is_large() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64) / 8, torch.randn(50, 64)
    x[:, 5] *= 60
    exact = x @ weight.t()
    errors = []
    for scheme in (Int8Dynamic(), Int8Dynamic(smooth=0.5)):
        tensors = scheme.pack(weight, {"largest": x.abs().amax(0)})
        errors.append((operator(scheme)(x, *tensors.values(), None) - exact).norm())
    assert errors[1] < 0.4 * errors[0]
    unknown = Int8Dynamic(smooth=0.5).pack(weight, {})
    assert torch.equal(unknown["factors"], torch.ones(64)), "nothing is known of x"
    assert torch.equal(unknown["codes"], Int8Dynamic().pack(weight, {})["codes"])


def test_models_of_all_schemes_read_packed_weights_and_load_each_others_state() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(50, 32)
            self.up, self.down, self.head = (torch.nn.Linear(32, n) for n in (32, 32, 50))

        def forward(self, tokens: Tensor) -> Tensor:
            x: Tensor = self.down(torch.relu(self.up(self.embed(tokens))))
            return self.head(x)  # type: ignore[no-any-return]

    schemes = {
        "embed.weight": (Fp8(), "rows"), "up.weight": (Int8Dynamic(smooth=0.5), "rows"),
        "down.weight": (Fp8Dynamic(), "rows"), "head.weight": (Int8(), "rows"),
    }  # fmt: skip
    tokens = torch.arange(12).view(3, 4)
    model, other = Net(), Net()
    pack_weights(model, schemes, {"up.weight": {"largest": torch.rand(32) * 9}})
    fast = graphopt.optimize(model, (tokens,), emit="eager", on_error="raise")
    targets = [str(node.target) for node in fast.programs[0].nodes()]
    assert [name.split(".")[1] for name in targets if "graphopt" in name] == [
        "unpack_fp8", "linear_int8_dynamic", "linear_fp8_dynamic", "linear_int8",
    ]  # fmt: skip
    expected = torch.nn.functional.linear(model.embed(tokens), model.up.weight, model.up.bias)
    found = operator(Int8Dynamic())(
        model.embed(tokens), *model.up.parametrizations.weight[0].packed().values(), model.up.bias  # type: ignore[index,union-attr,operator]
    )
    assert (found - expected).norm() < 0.02 * expected.norm()
    pack_weights(other, schemes)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize("biased", [False, True])
def test_unpacked_weights_are_multiplied_some_at_a_time(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    codes, scales = rounded_to_int8(torch.randn(300, 64))
    x, bias = torch.randn(7, 64), torch.randn(300) if biased else None
    problem = Problem(7, 300, 64, FP32, INT8)
    results = []
    for block in (byte_products._BLOCK, 4 * 64 * 130):
        monkeypatch.setattr(byte_products, "_BLOCK", block)
        results.append(byte_products.launch_product(None, problem, LIBRARY, x, codes, scales, bias, None))
    torch.testing.assert_close(*results)
    expected = byte_products.product_reference(x, codes, scales, bias, None, FP32)
    torch.testing.assert_close(results[0], expected)


def test_a_row_has_the_same_result_in_any_batch() -> None:
    for scheme in (Int8Dynamic(), Fp8Dynamic()):
        _, tensors = packed(scheme)
        x = torch.randn(20, 40)
        whole = operator(scheme)(x, *tensors, None)
        for rows in (1, 3, 17):
            torch.testing.assert_close(operator(scheme)(x[:rows], *tensors, None), whole[:rows])


def test_options_that_make_no_sense_are_refused() -> None:
    model = torch.nn.Linear(8, 8)
    with pytest.raises(QuantizationError, match=r"smooth is 1\.5: expected 0 to 1"):
        pack_weights(model, {"weight": (Int8Dynamic(smooth=1.5), "rows")})
    with pytest.raises(QuantizationError, match="option 'smooth' of scheme 'int8-dynamic'"):
        Int8Dynamic.configured(smooth="much")
    wide = torch.nn.Linear(8, 8, dtype=torch.float64)
    for scheme in (Fp8(), Fp8Dynamic()):
        with pytest.raises(QuantizationError, match="takes weights of float32, float16 and bfloat16, got"):
            pack_weights(wide, {"weight": (scheme, "rows")})


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_on_a_gpu_are_near_float64_and_the_same_in_every_run(
    scheme: Scheme, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for n, k in ((1000, 1024), (4096, 4096), (77, 250), (129, 1003)):
        weight = (torch.randn(n, k, device="cuda") / k**0.5).to(dtype)
        tensors = list(scheme.pack(weight, {"largest": torch.rand(k, device="cuda") * 5}).values())
        bias = torch.randn(n, device="cuda").to(dtype)
        for rows in (0, 1, 3, 8, 16, 17, 40, 64, 100, 300):
            x = torch.randn(rows, 2 * k, device="cuda")[:, ::2].to(dtype)
            found = operator(scheme)(x, *tensors, bias)
            assert found.shape == (rows, n) and found.dtype is dtype
            if "dynamic" in scheme.name:
                expected = linear_dynamic_reference(x.cpu(), *(t.cpu() for t in tensors), bias.cpu())  # type: ignore[arg-type]
                # Tensor cores keep fewer bits of sums of float8; a value may round to the next float8.
                slack = 3e-3 if "fp8" in scheme.name else 1e-5
            else:
                expected = x.double() @ (tensors[0].double() * tensors[1][:, None]).t() + bias.double()
                # Weights are rounded to the dtype where they are unpacked.
                slack = 3e-3 if dtype is not FP32 else 1e-5
            error = (found.double().cpu() - expected.double().cpu()).norm()
            limit = slack + torch.finfo(dtype).eps
            assert error <= limit * expected.double().norm() + 1e-30, (n, k, rows, error)
            assert torch.equal(found, operator(scheme)(x, *tensors, bias)), (n, k, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
@pytest.mark.parametrize("rounded", [False, True])
def test_every_launch_computes_the_same_on_a_gpu(codes: torch.dtype, rounded: bool) -> None:
    spec = default_host().tunable("packed-bytes")
    for rows in (1, 5, 16, 50, 200):
        problem = Problem(rows, 1000, 2048, BF16, codes, rounded)
        operands = spec.operands(problem, torch.device("cuda"))
        (expected,) = spec.reference(problem, operands)
        for launch in (*spec.configurations(problem), spec.default(problem)):
            (found,) = spec.run(spec.kernels(), H200, problem, operands, launch)
            error = (found.float() - expected.float()).norm() / expected.float().norm()
            assert error < 0.01, (launch, error)


@pytest.mark.gpu
def test_unpacked_weights_on_a_gpu_are_those_of_the_reference() -> None:
    for scheme, (n, k) in itertools.product((Int8(), Fp8()), ((1000, 1024), (77, 250))):
        for dtype in (BF16, FP16, FP32):
            tensors = list(scheme.pack(torch.randn(n, k, device="cuda"), {}).values())
            found = operator(scheme, "unpack_op")(*tensors, dtype)
            assert torch.equal(found, byte_products.unpacked_reference(*tensors, dtype))
