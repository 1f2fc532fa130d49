"""Operators that hold tensors in fewer bytes: round trips in every layout, references, transients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import _torch
from graphopt_kernels.saved_codecs.codes import (
    pack_bits,
    pack_bits_reference,
    pack_bits_supports,
    packed_length,
    unpack_bits,
    unpack_bits_reference,
    unpack_bits_supports,
)
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
