"""Which of a few intervals each element lies in, and a number for each interval in its place.

``graphopt::pack_levels`` holds ``x`` as the number of thresholds below it, in 1, 2, 4 or 8 bits;
``unpack_levels`` gives the level of each interval: a piecewise-constant function of ``x``, such as an
approximate derivative (Novikov et al. 2023, "Few-Bit Backward").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.candidate import Reason
from graphopt_kernels.saved_codecs.codes import (
    pack_codes,
    pack_codes_reference,
    packed_length,
    unpack_codes,
    unpack_codes_reference,
)
from graphopt_kernels.saved_codecs.memory_order import flat, is_dense, shaped

__all__ = [
    "pack_levels",
    "pack_levels_reference",
    "pack_levels_supports",
    "unpack_levels",
    "unpack_levels_reference",
    "unpack_levels_supports",
]

_SLAB = {"cpu": 2**16}
_OTHER_SLAB = 2**20
"""Elements that are converted at a time; a multiple of eight."""


@torch.library.custom_op("graphopt::pack_levels", mutates_args=())
def pack_levels(x: torch.Tensor, thresholds: Sequence[float], bits: int) -> torch.Tensor:
    """How many of the rising ``thresholds`` lie below each element, as codes of ``bits`` (uint8, packed).

    NaN lies above all of them.
    """
    row = flat(x)
    out = x.new_empty(packed_length(row.numel(), bits), dtype=torch.uint8)
    borders = torch.tensor(thresholds, dtype=x.dtype, device=x.device)
    step = _slab(x)
    for first in range(0, row.numel(), step):
        part = row[first : first + step]
        codes = torch.bucketize(part, borders, out_int32=True).to(torch.uint8)
        begin = first * bits // 8
        pack_codes(codes, bits, out[begin : begin + packed_length(part.numel(), bits)])
    return out


@pack_levels.register_fake
def _(x: torch.Tensor, thresholds: Sequence[float], bits: int) -> torch.Tensor:
    return x.new_empty((x.numel() * bits + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("graphopt::unpack_levels", mutates_args=())
def unpack_levels(
    packed: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    levels: Sequence[float],
    bits: int,
) -> torch.Tensor:
    """``levels`` of the codes in ``packed``, of ``dtype``, with a dense layout of ``size`` and ``stride``."""
    out = torch.empty_strided(size, stride, dtype=dtype, device=packed.device)
    row, table = flat(out), torch.tensor(levels, dtype=dtype, device=packed.device)
    step = _slab(packed)
    for first in range(0, row.numel(), step):
        part = row[first : first + step]
        codes = packed.new_empty(part.numel())
        begin = first * bits // 8
        unpack_codes(packed[begin : begin + packed_length(part.numel(), bits)], bits, codes)
        torch.index_select(table, 0, codes.to(torch.int32), out=part)
    return out


@unpack_levels.register_fake
def _(
    packed: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    levels: Sequence[float],
    bits: int,
) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=packed.device)


def pack_levels_reference(x: torch.Tensor, thresholds: Sequence[float], bits: int) -> torch.Tensor:
    """``pack_levels`` in operators of ATen."""
    borders = torch.tensor(thresholds, dtype=x.dtype, device=x.device)
    return pack_codes_reference(torch.bucketize(flat(x), borders).to(torch.uint8), bits)


def unpack_levels_reference(
    packed: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    levels: Sequence[float],
    bits: int,
) -> torch.Tensor:
    """``unpack_levels`` in operators of ATen."""
    count = 1
    for length in size:
        count *= length
    table = torch.tensor(levels, dtype=dtype, device=packed.device)
    return shaped(table[unpack_codes_reference(packed, bits, count).to(torch.int64)], size, stride)


def pack_levels_supports(x: torch.Tensor, thresholds: Sequence[float], bits: int) -> Reason | None:
    """Dense floating-point values; no more intervals than codes."""
    if not x.is_floating_point():
        return Reason(f"it is {x.dtype}, not a floating-point type")
    if bits not in (1, 2, 4, 8) or len(thresholds) >= 2**bits:
        return Reason(f"{len(thresholds) + 1} intervals do not fit codes of {bits} bits")
    return None if is_dense(x.shape, x.stride()) else Reason("its elements do not fill a stretch of memory")


def unpack_levels_supports(
    packed: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    levels: Sequence[float],
    bits: int,
) -> Reason | None:
    """A dense layout for the levels."""
    return None if is_dense(size, stride) else Reason("the layout asked for is not dense")


def _slab(tensor: torch.Tensor) -> int:
    return _SLAB.get(tensor.device.type, _OTHER_SLAB)
