"""Weights of two and three bits with blocks of four: planes, instructions, outliers. What all weights in
groups share, kernels among it, is in ``test_quantized_groups``."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.errors import QuantizationError
from graphopt.packing import pack_weights
from graphopt.plugins import default_host
from graphopt_kernels.quantized.byte_launch import Problem, dense_seconds
from graphopt_kernels.quantized.group_launch import (
    GroupProblem,
    launch_for,
    launches,
    packed_bytes,
    predicted_seconds,
)
from graphopt_kernels.quantized.group_rounding import nearest
from graphopt_kernels.quantized.int4 import Int4
from graphopt_kernels.quantized.lowbits import Int2, Int3, low_weight, slots_of, width_of
from graphopt_kernels.quantized.nibbles import pack_nibbles
from graphopt_kernels.quantized.planes import Planes, pack_planes, unit_of, unpack_planes
from tests.interpreted import interpreted
from tests.test_quantized_groups import (
    H200,
    LLAMA,
    LOW_KINDS,
    check_machine_code,
    check_numbers,
    compiled,
    correlated,
    error_of,
    problem_of,
    run_ptx,
)

BF16, FP32 = torch.bfloat16, torch.float32
LOW = (Int2, Int3)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("k", "width"), [(512, 32), (300, 32), (64, 16), (40, 16), (8, 1)])
def test_planes_come_back_as_they_were(bits: int, k: int, width: int) -> None:
    codes = torch.randint(0, 16, (5, k), dtype=torch.uint8)
    planes = pack_planes(codes, bits, width)
    units = -(-k // unit_of(bits, width))
    assert planes.pairs.shape == (5, units * unit_of(bits, width) // 4)
    assert planes.extra.shape == (5, units, width)
    assert (planes.thirds is None) == (bits == 2)
    assert torch.equal(unpack_planes(planes, bits, width, k), codes)
    without = Planes(planes.pairs, planes.thirds, torch.zeros_like(planes.extra))
    lowest = 3 if bits == 2 else 1
    assert torch.equal(unpack_planes(without, bits, width, k), codes & ~lowest & 15)


def test_a_byte_of_pairs_holds_the_codes_that_are_documented() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    planes = pack_planes(codes, 2, 4)
    for j, byte in enumerate(planes.pairs[0].tolist()):
        assert byte == (j >> 2) | (8 + j >> 2) << 2 | (4 + j >> 2) << 4 | (12 + j >> 2) << 6


@pytest.mark.parametrize("bits", [2, 3])
def test_instructions_make_bytes_of_four_bits_of_planes(bits: int) -> None:
    """For all pairs of bytes of each plane, in the order that ``planes`` and ``nibbles`` give them."""
    pytest.importorskip("triton")
    from graphopt_kernels.quantized import group_numbers_triton as numbers

    every = torch.arange(256, dtype=torch.uint8)
    one, two = every.repeat_interleave(256).contiguous(), every.repeat(256).contiguous()
    count = 2 if bits == 2 else 4
    given = [one, two] if bits == 2 else [one, two.roll(77), two, one.roll(5)]
    pairs = given[0].view(-1, 4) if bits == 2 else torch.stack([w.view(-1, 4) for w in given[:2]], 1)
    pairs = pairs.reshape(len(one) // 4, -1)
    thirds, extra = (None, given[1]) if bits == 2 else (given[2].view(-1, 4), given[3])
    codes = unpack_planes(Planes(pairs, thirds, extra.view(-1, 1, 4)), bits, 4, unit_of(bits, 4))
    expected = pack_nibbles(codes, 4).view(-1, count, 4)
    words = [each.numpy().view(np.uint32).ravel() for each in given]
    found = run_ptx(getattr(numbers, f"_NIBBLES{bits}").value, count, *words)
    for place, word in enumerate(found):
        assert np.array_equal(word.view(np.uint8).reshape(-1, 4), expected[:, place].numpy()), place


def test_kernels_compute_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    found = interpreted("group_kernels.py", "low")
    for kind in ("int2", "int3", "slices", "tiles"):
        assert any(kind in name for name in found["errors"]), kind
    check_numbers(found)


@pytest.mark.parametrize("kind", LOW_KINDS)
def test_launches_become_the_machine_code_that_they_are_predicted_to_be(kind: str) -> None:
    pytest.importorskip("triton")
    check_machine_code(kind)


@pytest.mark.parametrize("bits", [2, 3])
def test_no_launch_that_is_weighed_spills(bits: int) -> None:
    """Of the default scheme, narrow planes among it: 16 bytes where rows are not of whole blocks."""
    pytest.importorskip("triton")
    for rows, half, k, slots in ((1, 32, 4096, 0), (16, 32, 4096, 2), (32, 32, 4096, 2), (1, 16, 4160, 2)):
        problem = GroupProblem(rows, 14336, k, BF16, 64, half, False, False, bits, slots)
        for launch in launches(problem, 1):
            if launch.kind == "slices":
                code = compiled(problem, launch, even=half == 32)
                assert not code.spills, (problem, launch)
                assert code.shared + code.asked <= 227 * 1024, launch


@pytest.mark.parametrize("kind", LOW)
def test_outliers_are_the_blocks_that_gain_most(kind: Any) -> None:
    torch.manual_seed(0)
    scheme, weight = kind(group=64, outliers=0.25), torch.randn(7, 2048)
    width = width_of(scheme.bits, 64, 2048)
    unit = unit_of(scheme.bits, width)
    loud = [torch.randperm(2048 // unit)[: 2048 // unit // 4].sort().values for _ in range(7)]
    for row, places in enumerate(loud):
        for place in places:
            weight[row, place * unit : (place + 1) * unit] *= 30
    packed = scheme.pack(weight, {})
    slots = packed["words"][:, :: unit // 64] >> 7 & 511
    assert packed["words"].view(7, -1, unit // 64)[:, :, 1:].bitwise_and(0xFF80).eq(0).all()
    for row, places in enumerate(loud):
        assert slots[row].nonzero()[:, 0].tolist() == places.tolist()
        assert slots[row, places].tolist() == list(range(1, len(places) + 1))
    unpacked = scheme.unpack(packed, 7, 2048, FP32).view(7, -1, unit)
    whole = nearest(weight, 64, False, 15, (1.0, 0.85, 0.7, 0.55, 0.4)).weight().view(7, -1, unit)
    for row, places in enumerate(loud):
        assert torch.equal(unpacked[row, places], whole[row, places]), "they are rounded to four bits"


def test_statistics_say_which_errors_count() -> None:
    torch.manual_seed(0)
    weight, squares = torch.randn(5, 1024), torch.full((1024,), 1e-6)
    squares[3 * 128 : 4 * 128] = 1.0
    scheme = Int2(group=128, outliers=0.125)
    for statistics in ({"second-moment": squares}, {"gram": squares.diag()}):
        given = Int2(group=128, outliers=0.125, method="gptq") if "gram" in statistics else scheme
        slots = given.pack(weight, statistics)["words"] >> 7 & 511
        assert slots[:, 3].eq(1).all() and slots.count_nonzero() == 5
    assert not torch.equal(scheme.pack(weight, {})["words"] >> 7 & 511, slots)
    with pytest.raises(QuantizationError, match=re.escape("second-moment has shape (3,): expected (1024,)")):
        known = {"second-moment": torch.ones(3)}
        pack_weights(torch.nn.Linear(1024, 4), {"weight": (scheme, "rows")}, {"weight": known})


@pytest.mark.parametrize("kind", LOW)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_errors_shrink_with_bits_methods_and_outliers(kind: Any, group: Any) -> None:
    weight, x, moment = correlated(512)
    weight[:, 40:44] *= 8
    errors = [error_of(kind(group=group, outliers=share), weight, moment) for share in (0.0, 0.25, 1.0)]
    assert errors[0] > errors[1] > errors[2]
    four = error_of(Int4(group=group), weight, moment)
    assert errors[2] <= four * 1.0001, "the same with narrower ranges"
    assert error_of(Int3(group=group, outliers=0.0), weight, moment) < error_of(
        Int2(group=group, outliers=0.0), weight, moment
    )
    plain = error_of(kind(group=group), weight, moment)
    assert error_of(kind(group=group, method="hqq"), weight, moment) < plain
    plain = error_of(kind(group=group), weight, moment, x)
    assert error_of(kind(group=group, method="gptq"), weight, moment, x) < 0.8 * plain
    assert error_of(kind(group=group, symmetric=True), weight, moment) < 0.8


def test_symmetric_codes_lie_alike_on_either_side() -> None:
    weight = torch.tensor([[-3.0, -1.0, 1.0, 3.0] * 8])
    packed = Int2(group=32, symmetric=True, outliers=0.0).pack(weight, {})
    assert (packed["words"] & 127).unique().tolist() == [48], "eight times 6, four times 1.5"
    assert torch.equal(Int2(group=32, symmetric=True, outliers=0.0).unpack(packed, 1, 32, FP32), weight)
    weight = torch.tensor([[-3.0, -2.0, 0.0, 3.0] * 8])
    scheme = Int3(group=32, symmetric=True, outliers=0.0)
    assert torch.equal(scheme.unpack(scheme.pack(weight, {}), 1, 32, FP32), weight)


@pytest.mark.parametrize("kind", LOW)
def test_sizes_depend_on_the_shape_alone(kind: Any) -> None:
    for n, k in ((24, 4096), (3, 576), (1, 128), (2, 96), (5, 0)):
        for group in (32, 64, 128):
            if k % group:
                continue
            for share in (0.0, 0.0625, 0.5, 1.0):
                scheme = kind(group=group, outliers=share)
                packed = scheme.pack(torch.randn(n, k), {})
                assert sum(t.nbytes for t in packed.values()) == scheme.stored_bytes(n, k, FP32)
                assert all(len(t) == n for t in packed.values()), "rows of all are rows of the weight"
                assert packed["extra"].shape[1] == (
                    slots_of(scheme.bits, group, k, share) * width_of(scheme.bits, group, k)
                )
    # 2 bits, 32 for each group of 64, and two of 32 blocks with two bits more.
    assert Int2().stored_bytes(1, 4096, BF16) == 4096 // 4 + 4 * 64 + 2 * 32
    assert Int3().stored_bytes(1, 4096, BF16) == 4096 * 3 // 8 + 4 * 64 + 32


def test_words_that_name_no_slot_are_read_as_none() -> None:
    """By the reference, as far as it can say so: there is no memory that it could take for one."""
    weight = torch.randn(2, 256)
    packed = Int2(group=64, outliers=0.5).pack(weight, {})
    packed["words"] = packed["words"] | 511 << 7
    with pytest.raises((IndexError, RuntimeError)):
        Int2(group=64, outliers=0.5).unpack(packed, 2, 256, FP32)


@pytest.mark.parametrize(
    ("scheme", "k", "reason"),
    [
        (Int2(), 96, "groups of 64 do not divide 96 inputs; group=32 does"),
        (Int3(group=128), 192, "groups of 128 do not divide 192 inputs; group=64 does"),
        (Int2(outliers=1.5), 128, "outliers=1.5 is no share of a row: expected 0 to 1"),
        (Int3(outliers=-0.1), 128, "outliers=-0.1 is no share of a row: expected 0 to 1"),
        (Int2(symmetric=True, method="hqq"), 128, "method=hqq moves zeros, which symmetric=true keeps"),
        (Int2(method="gptq"), 128, "it needs gram among the statistics of inputs"),
        (Int2(outliers=1.0), 2**17, "1024 outliers of a row are more than the 511 that can be told apart"),
    ],
    ids=str,
)
def test_what_cannot_be_packed_is_refused(scheme: Any, k: int, reason: str) -> None:
    model = torch.nn.Linear(k, 2)
    with pytest.raises(QuantizationError, match=re.escape(reason)):
        pack_weights(model, {"weight": (scheme, "rows")})
    assert isinstance(model.weight, torch.nn.Parameter)


def test_schemes_are_spelled() -> None:
    host = default_host()
    for text in ("int2{outliers=0.125}", "int3{group=128,method=gptq}", "int2{symmetric=true,outliers=0.0}"):
        assert str(host.scheme(text)) == text
    with pytest.raises(QuantizationError, match="option 'group' of scheme 'int3' must be one of 32, 64, 128"):
        host.scheme("int3{group=256}")


def test_models_are_packed_by_budget_and_look_rows_up() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(50, 256)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(2))

        def forward(self, tokens: Tensor) -> Tensor:
            x: Tensor = self.embed(tokens)
            for layer in self.layers:
                x = x + torch.relu(layer(x))
            return x

    torch.manual_seed(0)
    model, tokens = Net().eval(), torch.arange(12).view(3, 4)
    exact = model(tokens)
    plan = graphopt.quantize(model, (tokens,), weights="12%", schemes=("int2", "int3{outliers=0.5}", "int8"))
    assert {choice.scheme for choice in plan.packed} >= {"int3{outliers=0.5}"}
    expected = model(tokens)
    assert (expected - exact).norm() < 0.5 * exact.norm()
    fast = graphopt.optimize(model, (tokens,), emit="eager", on_error="raise")
    targets = {str(node.target) for node in fast.programs[0].nodes() if "graphopt" in str(node.target)}
    assert any("linear_int" in target for target in targets) and any("unpack_int" in t for t in targets)
    torch.testing.assert_close(fast(tokens), expected)


@pytest.mark.parametrize("kind", LOW_KINDS)
def test_one_row_is_predicted_to_be_faster_than_with_four_bits(kind: str) -> None:
    for n, k in LLAMA:
        problem, four = problem_of(kind, 1, n, k), problem_of("int4 of 64", 1, n, k)
        launch = launch_for(problem, H200)
        assert launch.kind == "slices"
        assert packed_bytes(problem) < packed_bytes(four) * 0.9
        dense = dense_seconds(Problem(1, n, k, BF16, torch.int8))
        assert predicted_seconds(problem, launch, H200) < dense / 1.5
    assert packed_bytes(problem_of("int2", 1)) == 14336 * (4096 * (0.25 + 4 / 64) + 2 * 32)


def test_weights_know_their_layout_by_their_tensors() -> None:
    packed = Int3(group=128, outliers=0.25).pack(torch.randn(4, 1024), {})
    weight = low_weight(packed["codes"], packed["thirds"], packed["words"], packed["extra"], 128)
    assert (weight.bits, weight.half, weight.slots, weight.inner) == (3, 32, 1, 1024)
    some = weight.rows(slice(1, 3))
    assert some.thirds is not None and some.extra is not None and len(some.thirds) == len(some.extra) == 2
    assert weight.problem(5, BF16).block == 256 and weight.problem(5, BF16).blocks == 4
