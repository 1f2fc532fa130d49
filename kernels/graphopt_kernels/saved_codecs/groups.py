"""Floating-point values in 8, 4 or 2 bits, group by group, rounded at random so that the mean is right.

Each ``GROUP`` neighbours in memory share a least value ``lo`` and a ``step``; an element is held as the code
``floor((x - lo) / step + u)`` with ``u`` uniform in [0, 1) and comes back as ``lo + code * step``. With
``R`` the range of its group and ``b`` bits, ``step = R / (2**b - 1)`` and

- the mean over ``u`` of what comes back is ``x`` (up to rounding in float32, and to the dtype of ``x``);
- it is off by less than ``step``, its variance is at most ``step**2 / 4``.

So whatever the backward computes linearly of it has the right mean. Source: stochastic rounding of saved
activations in groups, Chen et al. 2021, "ActNN", and Liu et al. 2022, "GACT".

``u`` comes from a hash of what is in the group, of the element's place and of a number for each value
(``stream``), not from a random generator. The numbers that a model draws stay as they are; two runs of one
step round alike, as does a value that is computed again; and as soon as a bit of a group changes it
rounds in another way. A group with a value that is not finite comes back as NaN throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    "BITS",
    "GROUP",
    "bits_per_element",
    "dequantize_groups",
    "dequantize_groups_reference",
    "dequantize_groups_supports",
    "quantize_groups",
    "quantize_groups_reference",
    "quantize_groups_supports",
]

GROUP = 256
"""Elements that share a range. Fewer follow outliers closer, and take more for their ranges."""

BITS = (2, 4, 8)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SLAB = {"cpu": 2**16}
"""Elements that are converted at a time: what that takes stays in a cache, and off the peak."""

_OTHER_SLAB = 2**20
_LOW = 0xFFFFFFFF


def bits_per_element(bits: int) -> float:
    """Bits that an element takes, its share of the range of its group (two float32) counted."""
    return bits + 2 * 32 / GROUP


@torch.library.custom_op("graphopt::quantize_groups", mutates_args=())
def quantize_groups(x: torch.Tensor, stream: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8, packed) and ranges ([groups, 2]: least value and step, float32 or float64) of ``x``."""
    row = flat(x)
    groups = -(-row.numel() // GROUP)
    codes = x.new_empty(packed_length(row.numel(), bits), dtype=torch.uint8)
    ranges = x.new_empty(groups, 2, dtype=_exact(x.dtype))
    step = _slab(x)
    for first in range(0, groups, step):
        last = min(first + step, groups)
        part = row[first * GROUP : last * GROUP]
        found, ranges[first:last] = _rounded(_grouped(part), first, stream, bits)
        begin = first * GROUP * bits // 8
        pack_codes(
            found.view(-1)[: part.numel()],
            bits,
            codes[begin : begin + packed_length(part.numel(), bits)],
        )
    return codes, ranges


@quantize_groups.register_fake
def _(x: torch.Tensor, stream: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = x.numel()
    codes = x.new_empty((count * bits + 7) // 8, dtype=torch.uint8)
    return codes, x.new_empty((count + GROUP - 1) // GROUP, 2, dtype=_exact(x.dtype))


@torch.library.custom_op("graphopt::dequantize_groups", mutates_args=())
def dequantize_groups(
    codes: torch.Tensor,
    ranges: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    bits: int,
) -> torch.Tensor:
    """The values of ``quantize_groups``, of ``dtype``, with a dense layout of ``size`` and ``stride``."""
    out = torch.empty_strided(size, stride, dtype=dtype, device=codes.device)
    row = flat(out)
    step = _slab(codes)
    for first in range(0, ranges.shape[0], step):
        last = min(first + step, ranges.shape[0])
        part = row[first * GROUP : last * GROUP]
        found = codes.new_empty((last - first) * GROUP)
        begin = first * GROUP * bits // 8
        unpack_codes(codes[begin : begin + packed_length(part.numel(), bits)], bits, found[: part.numel()])
        part.copy_(_restored(found.view(-1, GROUP), ranges[first:last]).view(-1)[: part.numel()])
    return out


@dequantize_groups.register_fake
def _(
    codes: torch.Tensor,
    ranges: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    bits: int,
) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=codes.device)


def quantize_groups_reference(x: torch.Tensor, stream: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_groups`` in operators of ATen."""
    row = flat(x)
    codes, ranges = _rounded(_grouped(row), 0, stream, bits)
    return pack_codes_reference(codes.view(-1)[: row.numel()], bits), ranges


def dequantize_groups_reference(
    codes: torch.Tensor,
    ranges: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    bits: int,
) -> torch.Tensor:
    """``dequantize_groups`` in operators of ATen."""
    count = math.prod(size)
    found = _padded(
        unpack_codes_reference(codes, bits, count), -count % GROUP, lambda row, n: row.new_zeros(n)
    )
    return shaped(_restored(found.view(-1, GROUP), ranges).view(-1)[:count].to(dtype), size, stride)


def quantize_groups_supports(x: torch.Tensor, stream: int, bits: int) -> Reason | None:
    """Dense floating-point values, as many codes to a byte as fit it."""
    if x.dtype not in _DTYPES:
        return Reason(f"it is {x.dtype}, not of {', '.join(map(str, _DTYPES))}")
    if bits not in BITS:
        return Reason(f"codes of {bits} bits: expected one of {', '.join(map(str, BITS))}")
    return None if is_dense(x.shape, x.stride()) else Reason("its elements do not fill a stretch of memory")


def dequantize_groups_supports(
    codes: torch.Tensor,
    ranges: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    bits: int,
) -> Reason | None:
    """A dense layout for the values."""
    return None if is_dense(size, stride) else Reason("the layout asked for is not dense")


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _slab(tensor: torch.Tensor) -> int:
    """Groups that are converted at a time."""
    return _SLAB.get(tensor.device.type, _OTHER_SLAB) // GROUP


def _grouped(row: torch.Tensor) -> torch.Tensor:
    """``row`` [n] as [groups, GROUP], its last element repeated where the last group is not full."""
    rest = -row.numel() % GROUP
    return _padded(row, rest, lambda row, n: row[-1:].expand(n)).view(-1, GROUP)


def _padded(row: torch.Tensor, rest: int, make: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    return torch.cat([row, make(row, rest)]) if rest else row


def _rounded(rows: torch.Tensor, first: int, stream: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [g, GROUP] (uint8) and ranges [g, 2] of groups, the first of them number ``first``."""
    values = rows.to(_exact(rows.dtype))
    low = values.amin(1, keepdim=True)
    step = (values.amax(1, keepdim=True) - low) / (2**bits - 1)
    places = (values - low) / torch.where(step == 0, 1, step)
    codes = torch.floor(places + _uniform(rows, first, stream).to(places.dtype)).clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), torch.cat([low, step], 1)


def _restored(codes: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    return ranges[:, :1] + codes.to(ranges.dtype) * ranges[:, 1:]


def _uniform(rows: torch.Tensor, first: int, stream: int) -> torch.Tensor:
    """Numbers in [0, 1) for the elements of groups [g, GROUP], in float32: multiples of 2**-24.

    Integers stay below 2**63, so that nothing wraps around and every device computes the same.
    """
    place = torch.arange(GROUP, device=rows.device)
    number = torch.arange(first, first + rows.shape[0], device=rows.device)
    # Weights that differ by place, so that values that change places give another sum.
    content = (_words(rows) * (2 * place + 1)).sum(1) & _LOW
    key = _mixed(content ^ _mixed((number * 0x45D9F3B + stream * 0x119DE1F3) & _LOW))
    mixed = _mixed((key.unsqueeze(1) + place * 0x9E3779B1) & _LOW)
    return (mixed >> 8).to(torch.float32) * 2.0**-24


def _words(rows: torch.Tensor) -> torch.Tensor:
    """The bits of values, as int64 below 2**32."""
    if rows.element_size() == 8:
        wide = rows.contiguous().view(torch.int64)
        return (wide ^ (wide >> 32)) & _LOW
    bits = rows.contiguous().view(torch.int16 if rows.element_size() == 2 else torch.int32)
    return bits.to(torch.int64) & _LOW


def _mixed(word: torch.Tensor) -> torch.Tensor:
    """A permutation of 32-bit words in which every bit depends on every other (Mueller's integer hash)."""
    for _ in range(2):
        word = ((word >> 16) ^ word) * 0x45D9F3B & _LOW
    return (word >> 16) ^ word
