"""Operators that hold tensors in fewer bytes: round trips in every layout, references, transients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import _torch
from graphopt_kernels.saved_codecs import groups, levels
from graphopt_kernels.saved_codecs.codes import (
    pack_bits,
    pack_bits_reference,
    pack_bits_supports,
    packed_length,
    unpack_bits,
    unpack_bits_reference,
    unpack_bits_supports,
)
from graphopt_kernels.saved_codecs.groups import dequantize_groups, quantize_groups
from graphopt_kernels.saved_codecs.memory_order import flat, is_dense, shaped


def peak_of(function: object) -> tuple[int, int]:
    """Bytes above those before at the peak of a call, and those that stay."""
    kept: list[object] = []
    assert callable(function)
    running = peak = 0
    for event in _torch.record_allocations(lambda: kept.append(function())):
        running += event
        peak = max(peak, running)
    return peak, running


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int]]:
    """A shape of 0 to 4 dimensions, empty ones among them, and the order of the dimensions in memory."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=4)))
    return shape, draw(st.permutations(range(len(shape))))


def booleans(shape: tuple[int, ...], order: list[int], seed: int = 0) -> torch.Tensor:
    made = torch.rand([shape[d] for d in order], generator=torch.Generator().manual_seed(seed)) > 0.5
    return made.permute([order.index(d) for d in range(len(order))])


@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(0, 3))
def test_booleans_come_back_in_their_layout(layout: tuple[tuple[int, ...], list[int]], seed: int) -> None:
    x = booleans(*layout, seed)
    packed = pack_bits(x)
    assert packed.dtype is torch.uint8 and packed.numel() == packed_length(x.numel(), 1)
    for back in (
        unpack_bits(packed, x.shape, x.stride()),
        unpack_bits_reference(packed, x.shape, x.stride()),
    ):
        assert back.dtype is torch.bool and torch.equal(back, x)
    assert unpack_bits(packed, x.shape, x.stride()).stride() == x.stride()


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_operators_of_aten_pack_the_same_bytes(layout: tuple[tuple[int, ...], list[int]]) -> None:
    x = booleans(*layout)
    assert torch.equal(pack_bits(x), pack_bits_reference(x))


def test_the_first_element_is_in_the_lowest_bit() -> None:
    x = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1, 1], dtype=torch.bool)
    assert pack_bits(x).tolist() == [0b10001101, 0b11]


def test_what_is_not_dense_is_packed_in_the_order_of_its_indices() -> None:
    x = booleans((6, 10), [0, 1])[:, ::2]
    assert not is_dense(x.shape, x.stride())
    assert torch.equal(unpack_bits(pack_bits(x), x.shape, x.contiguous().stride()), x)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_a_dense_tensor_is_one_row_of_its_memory(order: tuple[int, ...]) -> None:
    x = torch.arange(120.0).view(2, 3, 4, 5).permute(order)
    row = flat(x)
    assert row.data_ptr() == x.data_ptr() and row.stride() == (1,)
    assert torch.equal(shaped(row, x.shape, x.stride()), x)


def test_packing_takes_nothing_beside_its_output() -> None:
    x = torch.rand(80_000) > 0.5
    packed = pack_bits(x)
    assert peak_of(lambda: pack_bits(x)) == (10_000, 10_000)
    peak, kept = peak_of(lambda: unpack_bits(packed, x.shape, x.stride()))
    assert kept == 80_000 and peak - kept < 64


@pytest.mark.parametrize("name", ["pack_bits", "unpack_bits"])
def test_operators_keep_the_rules_of_torch_library(name: str) -> None:
    x = booleans((3, 5, 7), [1, 0, 2])
    args = (x,) if name == "pack_bits" else (pack_bits(x), list(x.shape), list(x.stride()))
    torch.library.opcheck(getattr(torch.ops.graphopt, name).default, args)


def test_what_operators_do_not_take_is_said() -> None:
    assert str(pack_bits_supports(torch.zeros(3))) == "it is torch.float32, not torch.bool"
    sparse = booleans((6, 10), [0, 1])[:, ::2]
    assert str(pack_bits_supports(sparse)) == "its elements do not fill a stretch of memory"
    assert pack_bits_supports(sparse.contiguous()) is None
    assert str(unpack_bits_supports(torch.zeros(3), [3], [1])).startswith("it is torch.float32 with 1 dim")
    packed = torch.zeros(1, dtype=torch.uint8)
    assert str(unpack_bits_supports(packed, [3], [2])) == "the layout asked for is not dense"
    assert unpack_bits_supports(packed, [3], [1]) is None


# --- groups --------------------------------------------------------------------------------


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", groups.BITS)
def test_an_element_is_off_by_less_than_a_step(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, 31, generator=torch.Generator().manual_seed(0)).to(dtype).permute(2, 0, 1)
    codes, ranges = quantize_groups(x, 3, bits)
    back = dequantize_groups(codes, ranges, x.shape, x.stride(), dtype, bits)
    assert back.dtype is dtype and back.stride() == x.stride()
    step = ranges[:, 1].double().repeat_interleave(groups.GROUP)[: x.numel()]
    rounding = torch.finfo(dtype).eps * flat(x).double().abs().max()
    assert bool(((flat(back).double() - flat(x).double()).abs() <= step + rounding).all())
    assert codes.numel() == packed_length(x.numel(), bits)


@pytest.mark.parametrize("bits", groups.BITS)
def test_the_mean_over_streams_is_the_value(bits: int) -> None:
    """5 standard deviations of the mean for each of 700 elements: one failure in 2,500 sets of streams."""
    x, runs = torch.randn(700, generator=torch.Generator().manual_seed(0)), 1000
    total = torch.zeros(700, dtype=torch.float64)
    for stream in range(runs):
        codes, ranges = quantize_groups(x, stream, bits)
        total += dequantize_groups(codes, ranges, x.shape, x.stride(), x.dtype, bits)
    step = ranges[:, 1].double().repeat_interleave(groups.GROUP)[:700]
    assert bool(((total / runs - x).abs() <= 5 * step / 2 / runs**0.5 + 1e-6).all())


def test_rounding_is_a_function_of_contents_place_and_stream() -> None:
    x = torch.randn(4 * groups.GROUP, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = quantize_groups(x, 1, 2)[0]
    assert torch.equal(torch.get_rng_state(), before), "the model's random numbers were disturbed"
    assert torch.equal(first, quantize_groups(x.clone(), 1, 2)[0])
    assert not torch.equal(first, quantize_groups(x, 2, 2)[0])
    other = x.clone()
    other[0] *= 1 + 1e-6
    changed = quantize_groups(other, 1, 2)[0] != first
    per_group = groups.GROUP * 2 // 8
    assert int(changed[:per_group].sum()) > per_group // 8 and not bool(changed[per_group:].any())


@pytest.mark.parametrize("bits", groups.BITS)
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 70_000])
def test_groups_in_operators_of_aten_are_the_same(count: int, bits: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(0))
    codes, ranges = quantize_groups(x, 9, bits)
    if count:
        again = groups.quantize_groups_reference(x, 9, bits)
        assert torch.equal(codes, again[0]) and torch.equal(ranges, again[1])
    arguments = (codes, ranges, x.shape, x.stride(), x.dtype, bits)
    assert torch.equal(dequantize_groups(*arguments), groups.dequantize_groups_reference(*arguments))


def test_constants_come_back_and_what_is_not_finite_spoils_its_group() -> None:
    x = torch.full((3 * groups.GROUP,), 2.5)
    x[groups.GROUP] = float("inf")
    codes, ranges = quantize_groups(x, 0, 4)
    back = dequantize_groups(codes, ranges, x.shape, x.stride(), x.dtype, 4)
    assert back.isnan().view(3, -1).all(1).tolist() == [False, True, False]
    assert bool((back.view(3, -1)[::2] == 2.5).all())


def test_what_conversion_takes_does_not_grow() -> None:
    peaks = []
    for count in (2**18, 2**20):
        x = torch.randn(count)
        peak, kept = peak_of(lambda x=x: quantize_groups(x, 1, 4))
        peaks.append(peak - kept)
    assert peaks[0] == peaks[1] < 3 * 2**20


# --- levels --------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "count"), [(1, 2), (2, 3), (4, 16)])
def test_levels_are_those_of_the_intervals(bits: int, count: int) -> None:
    x = torch.randn(6, 11, 13, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
    thresholds = torch.linspace(-2, 2, count - 1).tolist()
    numbers = torch.arange(count, dtype=torch.float32).sqrt().tolist()
    packed = levels.pack_levels(x, thresholds, bits)
    assert torch.equal(packed, levels.pack_levels_reference(x, thresholds, bits))
    layout = (x.shape, x.stride(), x.dtype, numbers, bits)
    back = levels.unpack_levels(packed, *layout)
    assert torch.equal(back, torch.tensor(numbers)[torch.bucketize(x.contiguous(), torch.tensor(thresholds))])
    assert torch.equal(back, levels.unpack_levels_reference(packed, *layout))


@pytest.mark.parametrize("name", ["quantize_groups", "dequantize_groups", "pack_levels", "unpack_levels"])
def test_lossy_operators_keep_the_rules_of_torch_library(name: str) -> None:
    x = torch.randn(3, 100)
    codes, ranges = quantize_groups(x, 1, 4)
    layout = (list(x.shape), list(x.stride()), x.dtype)
    arguments: dict[str, tuple[object, ...]] = {
        "quantize_groups": (x, 1, 4),
        "dequantize_groups": (codes, ranges, *layout, 4),
        "pack_levels": (x, [0.0], 1),
        "unpack_levels": (levels.pack_levels(x, [0.0], 1), *layout, [0.0, 1.0], 1),
    }
    torch.library.opcheck(getattr(torch.ops.graphopt, name).default, arguments[name])


def test_what_lossy_operators_do_not_take_is_said() -> None:
    assert str(groups.quantize_groups_supports(torch.zeros(3, dtype=torch.int64), 0, 8)).startswith(
        "it is torch.int64"
    )
    assert (
        str(groups.quantize_groups_supports(torch.zeros(3), 0, 3))
        == "codes of 3 bits: expected one of 2, 4, 8"
    )
    assert (
        str(levels.pack_levels_supports(torch.zeros(3), [0.0, 1.0], 1))
        == "3 intervals do not fit codes of 1 bits"
    )
