"""Weights in groups: kernels in the interpreter and as machine code, rounding, operators, launches."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.errors import QuantizationError
from graphopt.packing import Scheme, pack_weights
from graphopt.plugins import default_host
from graphopt_kernels.quantized.byte_launch import Problem, dense_seconds
from graphopt_kernels.quantized.group_launch import (
    LIBRARY,
    GroupLaunch,
    GroupProblem,
    check_launch,
    launch_for,
    launches,
    packed_bytes,
    predicted_seconds,
)
from graphopt_kernels.quantized.group_products import NF4_LEVELS
from graphopt_kernels.quantized.group_rounding import half_quadratic, nearest
from graphopt_kernels.quantized.int4 import Int4, Int4Awq
from graphopt_kernels.quantized.int4_offset import Int4Offset
from graphopt_kernels.quantized.int4_ordered import Int4Ordered
from graphopt_kernels.quantized.lowbits import Int2, Int3
from graphopt_kernels.quantized.nf4 import Nf4
from graphopt_kernels.quantized.nibbles import pack_nibbles, unpack_nibbles
from tests.interpreted import interpreted

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = 132
LLAMA = ((4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (128256, 4096))
DATA_FREE = (
    Int4(), Int4(group=64), Int4(group=32), Int4(symmetric=True), Int4(method="hqq"), Nf4(), Nf4(double=True),
    Int2(outliers=0.5), Int3(group=32, outliers=1.0), Int4Offset(), Int4Offset(group=32),
)  # fmt: skip
SCHEMES: tuple[Scheme, ...] = (
    *DATA_FREE, Int4(method="gptq"), Int4Awq(group=32), Int2(group=32, method="gptq"),
    Int3(group=128, symmetric=True, outliers=0.0), Int4Ordered(), Int4Ordered(group=32, symmetric=True),
)  # fmt: skip


# --- kernels ------------------------------------------------------------------------------------


def test_kernels_compute_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    check_numbers(interpreted("group_kernels.py", "four"))


def check_numbers(found: dict[str, Any]) -> None:
    assert all(error < 4e-4 for error in found["errors"].values()), found["errors"]
    assert all(found["unpacked"].values()), found["unpacked"]
    assert all(all(kinds) for kinds in found["poisoned"].values()), found["poisoned"]


def _as_floats(kind: str, words: Any) -> Any:
    if kind == "rn.f32":
        return words.view(np.float32)
    if kind == "rn.f16x2":
        return words.view(np.float16).astype(np.float32)
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _as_words(kind: str, numbers: Any) -> Any:
    """Exact where results are: what is cut off of a bfloat16 is zero."""
    if kind == "rn.f32":
        return numbers.view(np.uint32)
    if kind == "rn.f16x2":
        return numbers.astype(np.float16).view(np.uint32)
    words = numbers.view(np.uint32)
    assert not (words & 0xFFFF).any()
    return (words >> 16).astype(np.uint16).view(np.uint32)


def run_ptx(text: str, results: int, *inputs: Any) -> list[Any]:
    """The first operands of instructions that make numbers of bytes; ``inputs`` are those after them."""
    registers = {f"${results + n}": words for n, words in enumerate(inputs)}

    def value(name: str) -> Any:
        if name in registers:
            return registers[name]
        digits = name.removeprefix("0f").removeprefix("0x")
        return np.full_like(inputs[0], int(digits, 16 if name.startswith(("0x", "0f")) else 10))

    for statement in text.strip("{} \n").split(";"):
        operation, _, rest = statement.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        into, *given = (part.strip() for part in rest.split(","))
        name, _, kind = operation.partition(".")
        table = int(given.pop(), 16) if name == "lop3" else 0
        a, *more = (value(word) for word in given)
        if name == "mov":
            result = a
        elif name == "and":
            result = a & more[0]
        elif name == "shl":
            result = a << more[0]
        elif name == "shr":
            result = a >> more[0]
        elif name == "lop3":
            # A bit of the result is that of the table at the place that the three bits name.
            result = np.zeros_like(a)
            for place in (place for place in range(8) if table >> place & 1):
                b, c = more
                first, second, third = (
                    word if place >> bit & 1 else ~word for word, bit in ((a, 2), (b, 1), (c, 0))
                )
                result |= first & second & third
        elif name == "prmt":
            both = a.astype(np.uint64) | (more[0].astype(np.uint64) << np.uint64(32))
            result = np.zeros_like(a)
            for place in range(4):
                chosen = more[1] >> np.uint32(4 * place)
                # Its fourth bit would ask for copies of a sign.
                assert not (chosen & 8).any()
                byte = (both >> ((chosen & 7).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
                result |= byte.astype(np.uint32) << np.uint32(8 * place)
        else:
            assert name == "sub", operation
            result = _as_words(kind, _as_floats(kind, a) - _as_floats(kind, more[0]))
        registers[into] = result
    return [registers[f"${number}"] for number in range(results)]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("levels", [False, True], ids=["int4", "nf4"])
def test_instructions_make_the_numbers_that_bytes_stand_for(levels: bool, dtype: torch.dtype) -> None:
    """For all bytes and zeros, in the order that ``nibbles`` gives them."""
    pytest.importorskip("triton")
    from graphopt_kernels.quantized import group_numbers_triton

    kind = {BF16: "BFLOAT16", FP16: "FLOAT16", FP32: "FLOAT32"}[dtype]
    text = getattr(group_numbers_triton, f"_{'NF4' if levels else 'INT4'}_TO_{kind}").value
    every = torch.arange(256)
    low = torch.stack([every & 15, every.roll(77) & 15, every.flip(0) & 15, every.roll(5) & 15], 1)
    high = torch.stack([every >> 4, every.roll(9) >> 4, every.flip(0) >> 4, every.roll(130) >> 4], 1)
    codes = torch.cat((low, high), 1).to(torch.uint8)
    packed = pack_nibbles(codes, 4)
    words = packed.numpy().view(np.uint32).ravel()
    for zero in (0,) if levels else (0, 1, 64, 99, 127):
        # The zero beside each code, the same words twice, where instructions subtract it.
        near = torch.tensor([(16 if dtype is BF16 else 64) + zero / 8] * 2).to(dtype).view(torch.int32)
        subtracted = not levels and dtype is not FP32
        inputs = [np.full_like(words, int(near[0]))] * 2 if subtracted else []
        found = run_ptx(text, 8 if dtype is FP32 else 4, words, *inputs)
        stacked = torch.from_numpy(np.stack(found, 1).astype(np.int64)).to(torch.int32)
        numbers = stacked.contiguous().view(dtype).view(256, 8)
        expected = torch.tensor(NF4_LEVELS)[codes.int()] if levels else codes.float()
        assert torch.equal(numbers, (expected - zero / 8 * subtracted).to(dtype)), zero


def test_levels_of_the_kernels_are_those_of_the_reference() -> None:
    pytest.importorskip("triton")
    from graphopt_kernels.quantized import group_numbers_triton

    assert tuple(group_numbers_triton._LEVELS.value) == NF4_LEVELS


@cache
def compiled(problem: GroupProblem, launch: GroupLaunch, even: bool = True) -> Any:
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.quantized import groups_triton as kernels

    name = {BF16: "*bf16", FP16: "*fp16"}[problem.dtype]
    types = {
        "x_ptr": name, "codes_ptr": "*u8", "thirds_ptr": "*u8", "extra_ptr": "*u8",
        "words_ptr": "*u8" if problem.double else "*i32",
        "ranges_ptr": "*fp32", "bias_ptr": name, "out_ptr": name if launch.parts == 1 else "*fp32",
        **dict.fromkeys(("M", "N", "K", "GROUPS", "RANGES", "SLOTS", "STEPS"), "i32"),
    }  # fmt: skip
    constants = {
        "BIASED": True, "PARTS": launch.parts, "EVEN": even, "FAST": True, "BITS": problem.bits,
        "OUTLIERS": problem.slots > 0, "LEVELS": problem.levels, "DOUBLE": problem.double,
        "GROUP": problem.group, "HALF": problem.half, "BLOCK_M": launch.rows,
        "BLOCK_N": launch.columns, "SLICES": launch.slices,
    }  # fmt: skip
    aligned = [name for name in types if name.endswith("_ptr")] + ["K"]
    kernel = kernels.tile_kernel if launch.kind == "tiles" else kernels.slices_kernel
    return compile_function_for_sm90(
        kernel, types, constants, warps=launch.warps, stages=launch.stages, aligned=aligned
    )


KINDS = {
    "int4": (128, 64, False, False), "int4 of 64": (64, 64, False, False),
    "int4 of 32": (32, 32, False, False), "nf4": (64, 32, True, False), "nf4 double": (64, 32, True, True),
}  # fmt: skip
LOW_KINDS = {
    "int2": (64, 32, False, False, 2, 2), "int2 of 128": (128, 32, False, False, 2, 0),
    "int3": (64, 32, False, False, 3, 1), "int3 of 32": (32, 32, False, False, 3, 0),
}  # fmt: skip
"""Compiled in ``test_quantized_lowbits``."""


def problem_of(kind: str, rows: int, n: int = 14336, k: int = 4096) -> GroupProblem:
    return GroupProblem(rows, n, k, BF16, *(KINDS | LOW_KINDS)[kind])


def _count(code: Any, *starts: str) -> int:
    return sum(n for name, n in code.instructions.items() if name.startswith(starts))


@pytest.mark.parametrize("kind", KINDS)
def test_launches_become_the_machine_code_that_they_are_predicted_to_be(kind: str) -> None:
    check_machine_code(kind)


def check_machine_code(kind: str) -> None:
    """No spills; codes 16 bytes at a time, words fetched ahead; tensor cores; no slow conversions."""
    pytest.importorskip("triton")
    chosen = {
        (launch._replace(parts=min(launch.parts, 2)), rows)
        for rows, (n, k) in ((1, LLAMA[1]), (16, LLAMA[0]), (32, LLAMA[1]), (128, LLAMA[1]))
        for launch in [launch_for(problem_of(kind, rows, n, k), H200)]
        if launch != LIBRARY
    }
    assert any(launch.kind == "slices" for launch, _ in chosen)
    for launch, rows in chosen:
        problem = problem_of(kind, rows)
        code = compiled(problem, launch)
        assert not code.spills, launch
        assert code.shared + code.asked <= 227 * 1024, launch
        assert _count(code, "HGMMA" if launch.kind == "tiles" else "HMMA"), (launch, code.instructions)
        # Warp groups take operands of eight bytes from shared memory.
        assert code.widths("LDGSTS")[64 if launch.kind == "tiles" else 128], launch
        assert problem.double or code.widths("LDGSTS")[32], "words are fetched ahead"
        if launch.kind == "slices":
            made = launch.columns * launch.slices * problem.block // (32 * launch.warps)
            two, looked = _count(code, "HADD2.BF16_V2"), _count(code, "PRMT")
            assert two == (0 if problem.levels else made / 2), "one subtraction makes two numbers, once"
            assert looked < (2.2 * made + 40 if problem.levels else 0.25 * made + 40), looked
        slow = [op for op in code.instructions if op.startswith(("I2F.", "F2F.")) and not op.endswith(".RP")]
        assert problem.double or not slow, slow
        assert problem.double or not _count(code, "LDG.E.U8"), code.instructions


def test_tiles_of_sums_in_parts_do_not_spill() -> None:
    pytest.importorskip("triton")
    for kind in ("int4 of 64", "int4 of 32"):
        problem = problem_of(kind, 128)
        tiles = {launch._replace(parts=2) for launch in launches(problem, H200) if launch.kind == "tiles"}
        assert len(tiles) == 3
        assert not any(compiled(problem, launch).spills for launch in tiles)


def test_odd_sizes_compile_without_spills() -> None:
    pytest.importorskip("triton")
    for rows in (1, 16, 32):
        problem = problem_of("int4 of 32", rows, 4099, 4064)
        launch = launch_for(problem, H200)
        assert launch != LIBRARY and not compiled(problem, launch, even=False).spills, launch


@pytest.mark.parametrize("kind", ["int4", "int4 of 32", "nf4", "int2", "int3"])
def test_the_other_kernels_compile(kind: str) -> None:
    pytest.importorskip("triton")
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.quantized import groups_triton as kernels

    problem = problem_of(kind, 1)
    types = {
        "codes_ptr": "*u8", "thirds_ptr": "*u8", "extra_ptr": "*u8", "words_ptr": "*i32",
        "ranges_ptr": "*fp32", "factors_ptr": "*fp32", "offsets_ptr": "*fp32",
        "out_ptr": "*bf16", "bias_ptr": "*bf16", "partial_ptr": "*fp32",
        **dict.fromkeys(("N", "K", "GROUPS", "RANGES", "SLOTS", "count"), "i32"),
    }  # fmt: skip
    constants = {
        "FACTORED": not problem.levels, "OFFSET": not problem.levels, "FAST": True, "BITS": problem.bits,
        "OUTLIERS": problem.slots > 0, "LEVELS": problem.levels, "DOUBLE": problem.double,
        "GROUP": problem.group, "HALF": problem.half, "BLOCK_N": 4, "WIDE": 8, "BIASED": True, "PARTS": 4,
        "BLOCK": 512,
    }  # fmt: skip
    for kernel in (kernels.unpack_kernel, kernels.sum_kernel):
        code = compile_function_for_sm90(kernel, types, constants, warps=4, aligned=types)
        assert not code.spills
        assert code.widths("LDG")[128] or code.widths("LDG")[64], code.instructions
        assert code.widths("STG")[128] or code.widths("STG")[64], code.instructions


# --- codes and rounding -------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "half"), [(128, 64), (96, 32), (64, 32), (0, 32), (40, 4)])
def test_nibbles_come_back_as_they_were(k: int, half: int) -> None:
    codes = torch.randint(0, 16, (5, k), dtype=torch.uint8)
    packed = pack_nibbles(codes, half)
    assert packed.shape == (5, -(-k // (2 * half)) * half)
    assert torch.equal(unpack_nibbles(packed, half, k), codes)


def test_a_byte_holds_the_codes_that_are_documented() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert pack_nibbles(codes, 8)[0].tolist() == [16 * (j + 8) + j for j in range(8)]


def correlated(k: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [48, k], inputs that are correlated, and the mean of x x^T."""
    torch.manual_seed(0)
    weight = torch.randn(48, k) / k**0.5
    x = torch.randn(1000, k) @ (torch.randn(k, k) / k**0.5 + 0.3 * torch.eye(k))
    x[:, 7] *= 20
    return weight, x, x.t() @ x / 1000


def error_of(scheme: Scheme, weight: Tensor, moment: Tensor, x: Tensor | None = None) -> float:
    packed = scheme.pack(weight, {"gram": moment})
    unpacked = scheme.unpack(packed, *weight.shape, FP32)
    exact, found = (weight, unpacked) if x is None else (x @ weight.t(), x @ unpacked.t())
    return float((found - exact).norm() / exact.norm())


def test_errors_shrink_with_groups_and_grow_with_fewer_bits() -> None:
    weight, _, moment = correlated()
    for method in ("rtn", "hqq"):
        errors = [error_of(Int4(group=group, method=method), weight, moment) for group in (32, 64, 128)]  # type: ignore[arg-type]
        assert errors == sorted(errors) and errors[-1] < 0.11
    eight = default_host().scheme("int8")
    assert error_of(eight, weight, moment) < 0.1 * errors[0]
    assert error_of(Nf4(), weight, moment) < errors[-1], "of normal numbers"
    once, twice = (error_of(Nf4(double=double), weight, moment) for double in (False, True))
    assert abs(twice - once) < 0.01 * once


@pytest.mark.parametrize("group", [32, 64, 128])
def test_moved_zeros_are_no_worse_on_weights(group: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(32, 256)
    weight[:, ::40] *= 12
    plain, moved = (
        rounded.weight() for rounded in (nearest(weight, group, False), half_quadratic(weight, group))
    )
    by_group = [(w - weight).view(-1, group).square().sum(1) for w in (plain, moved)]
    assert (by_group[1] <= by_group[0]).all()
    assert group > 64 or by_group[1].sum() < by_group[0].sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_feedback_and_factors_help_where_inputs_are_correlated(group: Any, symmetric: bool) -> None:
    weight, x, moment = correlated()
    plain = error_of(Int4(group=group, symmetric=symmetric), weight, moment, x)
    assert error_of(Int4(group=group, symmetric=symmetric, method="gptq"), weight, moment, x) < 0.7 * plain
    assert error_of(Int4Awq(group=group, symmetric=symmetric), weight, moment, x) < plain
    assert error_of(Int4Ordered(group=group, symmetric=symmetric), weight, moment, x) < 0.7 * plain


def test_the_order_of_inputs_helps_where_few_of_them_are_large() -> None:
    torch.manual_seed(3)
    weight = torch.randn(48, 256) / 16
    x = torch.randn(1000, 256) @ (torch.randn(256, 256) / 16 + 0.3 * torch.eye(256))
    x *= torch.linspace(-3, 3, 256).exp()
    moment = x.t() @ x / 1000
    plain = error_of(Int4(method="gptq"), weight, moment, x)
    assert error_of(Int4Ordered(), weight, moment, x) < 0.8 * plain
    order = Int4Ordered().pack(weight, {"gram": moment})["order"]
    assert torch.equal(order.sort().values, torch.arange(256, dtype=torch.int32))
    assert (moment.diagonal()[order[:-1].long()] >= moment.diagonal()[order[1:].long()]).all()


def test_offsets_keep_groups_that_are_far_from_zero() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 256) / 20 + 3
    moment = torch.eye(256)
    assert error_of(Int4Offset(), weight, moment) < 0.1 * error_of(Int4(), weight, moment)
    flat = torch.tensor([[0.3] * 128 + [-7.0] * 128])
    packed = Int4Offset().pack(flat, {})
    assert torch.equal(Int4Offset().unpack(packed, 1, 256, FP32), flat)


def test_scales_of_others_are_kept_as_they_are() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (7, 128), dtype=torch.uint8)
    zeros = torch.randint(0, 128, (7, 2)) / 8
    for scales in (
        (torch.rand(7, 2) * 1e-3).half(), torch.rand(7, 2).bfloat16() + 1, torch.full((7, 2), 6e-8).half(),
        torch.full((7, 2), 65504.0).half(), -torch.rand(7, 2).half(),
    ):  # fmt: skip
        packed = Int4(group=64).exact(codes, scales, zeros)
        assert isinstance(packed, dict)
        expected = (codes - zeros.repeat_interleave(64, 1)) * scales.float().repeat_interleave(64, 1)
        assert torch.equal(Int4(group=64).unpack(packed, 7, 128, FP32), expected)
    for scales, zero, reason in (
        (torch.rand(7, 2), 8.0, "int4 keeps scales of 16 bits of mantissa, its scales have more"),
        (torch.full((7, 2), float("inf")), 8.0, "its scales are not finite"),
        (torch.ones(7, 2), 16.0, "int4 keeps zeros from 0 to 15.875 in steps of 1/8, its zeros are others"),
        (torch.ones(7, 2), 0.1, "int4 keeps zeros from 0 to 15.875 in steps of 1/8, its zeros are others"),
    ):
        assert str(Int4(group=64).exact(codes, scales, torch.full((7, 2), zero))) == reason


def test_feedback_without_correlation_is_rounding_to_the_nearest() -> None:
    weight, *_ = correlated()
    one, other = (
        Int4(method=method).pack(weight, {"gram": torch.eye(256)})  # type: ignore[arg-type]
        for method in ("rtn", "gptq")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    dead = torch.eye(256)
    dead[5] = 0
    assert torch.equal(Int4(method="gptq").pack(weight, {"gram": dead})["codes"], one["codes"])


@pytest.mark.parametrize("scheme", DATA_FREE, ids=str)
def test_special_weights(scheme: Scheme) -> None:
    zeros = torch.zeros(2, 128)
    assert torch.equal(scheme.unpack(scheme.pack(zeros, {}), 2, 128, FP32), zeros)
    assert scheme.unpack(scheme.pack(torch.zeros(0, 128), {}), 0, 128, BF16).shape == (0, 128)
    for size in (1e-30, 1e37):
        weight = torch.randn(2, 128) * size
        unpacked = scheme.unpack(scheme.pack(weight, {}), 2, 128, FP32)
        assert ((unpacked - weight).double().norm() / weight.double().norm()) < 0.2
    one_sided = torch.rand(2, 128) + 1
    unpacked = scheme.unpack(scheme.pack(one_sided, {}), 2, 128, FP32)
    assert (unpacked - one_sided).abs().max() < 0.3


# --- operators ----------------------------------------------------------------------------------


def operator(scheme: Scheme, which: str = "linear_op") -> Callable[..., Tensor]:
    found: Any = getattr(torch.ops.graphopt, getattr(scheme, which).partition("::")[2]).default
    return found  # type: ignore[no-any-return]


def packed(scheme: Scheme, n: int = 13, k: int = 128, dtype: torch.dtype = FP32) -> tuple[Any, ...]:
    """The tensors, and what follows the bias."""
    torch.manual_seed(0)
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    x = torch.randn(200, k) * (1 + 5 * torch.rand(k))
    statistics = {"gram": x.t() @ x / 200}
    return list(scheme.pack(weight, statistics).values()), scheme.constants(n, k)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_operators_are_sound(scheme: Scheme) -> None:
    tensors, constants = packed(scheme)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for shape in ((3, 128), (128,), (0, 128), (2, 1, 128)):
        x = torch.randn(shape, requires_grad=True)
        for bias in (None, torch.randn(13, requires_grad=True)):
            torch.library.opcheck(operator(scheme), (x, *tensors, bias, *constants), test_utils=tests)
    torch.library.opcheck(operator(scheme, "unpack_op"), (*tensors, *constants, BF16), test_utils=tests)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_are_those_of_the_unpacked_weight(scheme: Scheme, dtype: torch.dtype) -> None:
    tensors, constants = packed(scheme, dtype=dtype)
    x, bias = torch.randn(5, 256)[:, ::2].to(dtype), torch.randn(13).to(dtype)
    found = operator(scheme)(x, *tensors, bias, *constants)
    weight = operator(scheme, "unpack_op")(*tensors, *constants, FP32).double()
    given = x.double()
    if isinstance(scheme, Int4Awq):
        given = (x.float() * tensors[2]).to(dtype).double()
        weight = weight / tensors[2].double()
    expected = given @ weight.t() + bias.double()
    assert found.dtype is dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_unpacked_weight(scheme: Scheme) -> None:
    tensors, constants = packed(scheme)
    x, bias = torch.randn(5, 128, requires_grad=True), torch.randn(13, requires_grad=True)
    grad = torch.randn(5, 13)
    operator(scheme)(x, *tensors, bias, *constants).backward(grad)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ operator(scheme, "unpack_op")(*tensors, *constants, FP32))
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_nan_and_an_infinity_come_through_in_their_row_alone(scheme: Scheme) -> None:
    tensors, constants = packed(scheme)
    x = torch.randn(3, 128)
    clean = operator(scheme)(x, *tensors, None, *constants)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    found = operator(scheme)(x, *tensors, None, *constants)
    assert torch.equal(found[0], clean[0])
    assert found[1].isnan().all() and not found[2].isfinite().any()


@pytest.mark.parametrize("scheme", [*SCHEMES, Int4(group=32, method="hqq")], ids=str)
def test_packed_tensors_take_the_bytes_that_are_stated(scheme: Scheme) -> None:
    for n, k in ((24, 384), (1, 128)):
        tensors, _ = packed(scheme, n, k)
        assert sum(tensor.nbytes for tensor in tensors) == scheme.stored_bytes(n, k, FP32)
    assert Int4(group=32).stored_bytes(2, 96, BF16) == 2 * (2 * 32 + 3 * 4), "filled up to blocks of 64"
    assert Nf4(double=True).stored_bytes(1, 64 * 300, BF16) == 64 * 150 + 300 + 2 * 4


def test_models_read_packed_weights_and_look_rows_up() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(50, 128)
            self.again = torch.nn.Embedding(50, 128)
            self.up, self.down, self.head = (torch.nn.Linear(128, n) for n in (128, 128, 50))

        def forward(self, tokens: Tensor) -> Tensor:
            x: Tensor = self.up(self.embed(tokens) + self.again(tokens))
            return self.head(self.down(torch.relu(x)))  # type: ignore[no-any-return]

    schemes: dict[str, tuple[Scheme, str]] = {
        "embed.weight": (Int4(group=32), "rows"), "again.weight": (Nf4(double=True), "rows"),
        "up.weight": (Int4(method="gptq"), "rows"), "down.weight": (Int4Awq(), "rows"),
        "head.weight": (Nf4(), "rows"),
    }  # fmt: skip
    moment = {"gram": torch.eye(128) + 0.1}
    tokens = torch.arange(12).view(3, 4)
    model, other = Net(), Net()
    pack_weights(model, schemes, {"up.weight": moment, "down.weight": moment})
    expected = model(tokens)
    fast = graphopt.optimize(model, (tokens,), emit="eager", on_error="raise")
    targets = [
        str(node.target).split(".")[1] for node in fast.programs[0].nodes() if "graphopt" in str(node.target)
    ]
    assert sorted(targets) == ["linear_int4", "linear_int4_awq", "linear_nf4", "unpack_int4", "unpack_nf4"]
    torch.testing.assert_close(fast(tokens), expected)
    pack_weights(other, schemes, {"up.weight": moment, "down.weight": moment})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize(
    ("scheme", "k", "dtype", "reason"),
    [
        (Int4(), 192, FP32, "groups of 128 do not divide 192 inputs; group=64 does"),
        (Int4(group=64), 96, FP32, "groups of 64 do not divide 96 inputs; group=32 does"),
        (Int4Awq(), 40, FP32, "groups of 128 do not divide 40 inputs; neither do 128, 64 and 32"),
        (Nf4(), 96, FP32, "blocks of 64 do not divide 96 inputs"),
        (Int4(), 128, torch.float64, "takes weights of float32, float16 and bfloat16, got torch.float64"),
        (Nf4(), 128, torch.float64, "takes weights of float32, float16 and bfloat16, got torch.float64"),
        (Int4(symmetric=True, method="hqq"), 128, FP32, "method=hqq moves zeros, which symmetric=true keeps"),
        (Int4(method="gptq"), 128, FP32, "it needs gram among the statistics of inputs"),
        (Int4Awq(), 128, FP32, "it needs gram among the statistics of inputs"),
    ],
    ids=str,
)
def test_what_cannot_be_packed_is_refused(scheme: Scheme, k: int, dtype: torch.dtype, reason: str) -> None:
    model = torch.nn.Linear(k, 8, dtype=dtype)
    with pytest.raises(QuantizationError, match=re.escape(reason)):
        pack_weights(model, {"weight": (scheme, "rows")})
    assert isinstance(model.weight, torch.nn.Parameter)


def test_statistics_that_are_none_are_refused() -> None:
    scheme, model = Int4(method="gptq"), torch.nn.Linear(128, 8)
    for moment, reason in (
        (torch.eye(64), "gram has shape (64, 64): expected (128, 128)"),
        (torch.full((128, 128), float("nan")), "gram is not finite"),
        (-torch.eye(128), "the mean of x x^T is not positive definite"),
    ):
        with pytest.raises(QuantizationError, match=re.escape(reason)):
            pack_weights(model, {"weight": (scheme, "rows")}, {"weight": {"gram": moment}})
        assert isinstance(model.weight, torch.nn.Parameter)
    with pytest.raises(QuantizationError, match="it needs gram among the statistics"):
        scheme.pack(torch.randn(8, 128), {})


def test_allocation_leaves_out_what_it_knows_too_little_for() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 128)).eval()
    x = torch.randn(200, 128) @ (torch.randn(128, 128) / 12)
    other, exact, names = copy.deepcopy(model), model(x), ("int4{group=64,method=gptq}", "int8")
    plan = graphopt.quantize(other, (x,), weights="30%", schemes=names)
    assert {choice.scheme for choice in plan.packed} == {"int8"}
    known = graphopt.calibrate(model, [(x,)], observers=("moments", "gram"))
    plan = graphopt.quantize(model, (x,), weights="20%", schemes=names, calibration=known)
    assert names[0] in {choice.scheme for choice in plan.packed}
    assert (model(x) - exact).norm() < 0.1 * exact.norm()


def test_moments_are_not_kept_so_that_dense_weights_are_refused_later() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 8))
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack_weights(
        model, {"0.weight": (Int4(method="gptq"), "rows")}, {"0.weight": {"gram": torch.eye(128)}}
    )
    kept = model[0].parametrizations.weight[0]  # type: ignore[union-attr,index]
    assert not kept.statistics  # type: ignore[union-attr]
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError, match="it needs gram among the statistics of inputs"):
        model.load_state_dict(dense)
    model.load_state_dict(model.state_dict())
    assert torch.equal(model[0].weight, before)


def test_schemes_are_spelled() -> None:
    host = default_host()
    for text in ("int4{group=64,method=gptq}", "nf4{double=true}", "int4-awq{group=32,symmetric=true}"):
        assert str(host.scheme(text)) == text
    with pytest.raises(QuantizationError, match="option 'group' of scheme 'int4' must be one of 32, 64, 128"):
        host.scheme("int4{group=48}")
    with pytest.raises(QuantizationError, match="must be one of 'rtn', 'hqq', 'gptq', got 'best'"):
        host.scheme("int4{method=best}")


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("scheme", DATA_FREE, ids=str)
def test_products_on_a_gpu_are_those_of_the_unpacked_weight(scheme: Scheme, dtype: torch.dtype) -> None:
    for n, k in ((1000, 1024), (77, 384), (4096, 4096)):
        torch.manual_seed(0)
        weight = (torch.randn(n, k, device="cuda") / k**0.5).to(dtype)
        tensors, constants = list(scheme.pack(weight, {}).values()), scheme.constants(n, k)
        for wanted in (BF16, FP16, FP32):
            unpacked = operator(scheme, "unpack_op")(*tensors, *constants, wanted)
            cpu = operator(scheme, "unpack_op")(*(t.cpu() for t in tensors), *constants, wanted)
            assert torch.equal(unpacked.cpu(), cpu), wanted
        exact = operator(scheme, "unpack_op")(*tensors, *constants, FP32).double()
        bias = torch.randn(n, device="cuda").to(dtype)
        for rows in (0, 1, 3, 16, 33, 64, 100, 300):
            x = torch.randn(rows, 2 * k, device="cuda")[:, ::2].to(dtype)
            found = operator(scheme)(x, *tensors, bias, *constants)
            expected = x.double() @ exact.t() + bias.double()
            # Levels are rounded to the dtype, and weights where they are unpacked.
            limit = (3e-3 if dtype is not FP32 else 1e-5) + torch.finfo(dtype).eps
            error = (found.double() - expected).norm()
            assert error <= limit * expected.norm() + 1e-30, (n, k, rows, error)
            assert torch.equal(found, operator(scheme)(x, *tensors, bias, *constants)), (n, k, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS | LOW_KINDS)
def test_every_launch_computes_the_same_on_a_gpu(kind: str) -> None:
    spec = default_host().tunable("packed-groups")
    for rows, inner in ((1, 2048), (5, 1984), (16, 2048), (50, 2048), (200, 2048)):
        problem = problem_of(kind, rows, 1000, inner // 128 * 128)
        operands = spec.operands(problem, torch.device("cuda"))
        (expected,) = spec.reference(problem, operands)
        for launch in (*spec.configurations(problem), spec.default(problem)):
            (found,) = spec.run(spec.kernels(), H200, problem, operands, launch)
            error = (found.float() - expected.float()).norm() / expected.float().norm()
            assert error < 0.01, (launch, error)


# --- launches -----------------------------------------------------------------------------------


def test_tuning_tries_launches_that_compile_and_run_as_the_kernels_do() -> None:
    pytest.importorskip("triton")
    from graphopt_kernels.tuning.compiling import calls_of, usage_of
    from graphopt_kernels.tuning.model import Gpu, Usage

    spec, gpu = default_host().tunable("packed-groups"), Gpu.of("H200", (9, 0), H200)
    shipped = list(spec.shipped())
    assert {(problem.group, problem.levels) for problem in shipped} == {
        (128, False), (64, False), (64, True),
    }  # fmt: skip
    assert {(problem.bits, problem.slots > 0) for problem in shipped} == {(4, False), (2, True), (3, True)}
    problem = shipped[0]
    tried = list(spec.configurations(problem))
    assert spec.default(problem) in tried and len(set(tried)) == len(tried) > 20
    best = min(tried, key=lambda c: spec.predict(problem, c, spec.estimate(problem, c), gpu))
    usage = usage_of(calls_of(spec, problem, best, H200), gpu)
    assert isinstance(usage, Usage) and not usage.spilled
    for kind in KINDS | LOW_KINDS:
        small = problem_of(kind, 2, 32, 256)
        operands = spec.operands(small, torch.device("cpu"))
        for one, other in zip(
            spec.run(None, H200, small, operands, LIBRARY), spec.reference(small, operands), strict=True
        ):
            torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_are_predicted_to_be_faster_than_dense_by_the_bytes(kind: str) -> None:
    for n, k in LLAMA:
        for rows in (1, 8, 16):
            problem = problem_of(kind, rows, n, k)
            launch = launch_for(problem, H200)
            assert launch.kind == "slices" and check_launch(problem, launch) is None
            dense = dense_seconds(Problem(rows, n, k, BF16, torch.int8))
            gain = dense / predicted_seconds(problem, launch, H200)
            large = 1.25 if problem.levels else 1.65
            assert gain > (large if n * k > 4096 * 8192 and rows <= 8 else 1.1), (problem, launch, gain)
    assert packed_bytes(problem_of("int4", 1)) == 14336 * 4096 * (0.5 + 4 / 128)


def test_what_is_chosen_is_predicted_to_be_no_slower_than_anything_else() -> None:
    for kind in KINDS | LOW_KINDS:
        for rows in (1, 7, 17, 100, 1000, 4096):
            problem = problem_of(kind, rows)
            chosen = predicted_seconds(problem, launch_for(problem, H200), H200)
            assert all(chosen <= predicted_seconds(problem, other, H200) for other in launches(problem, H200))
            assert all(check_launch(problem, other) is None for other in launches(problem, H200))
        assert launch_for(problem_of(kind, 4096), H200) == LIBRARY
    assert launch_for(problem_of("int4", 1)._replace(dtype=FP32), H200) == LIBRARY


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "rows"}, "there is no kernel 'rows'"),
        ({"rows": 24}, "sizes are powers of two"),
        ({"slices": 2}, "every warp has a slice, or there is one"),
        ({"rows": 4}, "tensor cores take 8 rows and 16 columns"),
        ({"parts": 9}, "a part has nothing to add up"),
    ],
)
def test_launches_that_compute_something_else_are_told(changes: dict[str, Any], reason: str) -> None:
    problem = problem_of("int4", 8)
    good = GroupLaunch("slices", 8, 32, 4, 8, 4, 3)
    assert check_launch(problem, good) is None
    assert str(check_launch(problem, good._replace(**changes))) == reason
    wide = problem._replace(dtype=FP32)
    assert str(check_launch(wide, good)) == "tensor cores do not multiply torch.float32"
