"""Small codes in bytes: 8, 4, 2 or 1 of them to each.

``graphopt::pack_bits`` and ``unpack_bits`` hold booleans in an eighth of their bytes, without loss::

    x     1 0 1 1 0 0 0 1   1 1          bool[10]
    p     0b10001101        0b11         uint8[2], the first element in the lowest bit

The operators run kernel by kernel and take nothing beside their outputs. The references say the same in
a few operators of ATen that a code generator fuses with what makes and reads the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphopt.candidate import Reason
from graphopt_kernels.saved_codecs.memory_order import flat, is_dense, shaped

__all__ = [
    "pack_bits",
    "pack_bits_reference",
    "pack_bits_supports",
    "pack_codes",
    "pack_codes_reference",
    "packed_length",
    "unpack_bits",
    "unpack_bits_reference",
    "unpack_bits_supports",
    "unpack_codes",
    "unpack_codes_reference",
]


def packed_length(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` take."""
    return -(-count * bits // 8)


def pack_codes(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Write ``codes`` [n] (uint8, each below ``2**bits``) to ``out`` [packed_length(n, bits)] (uint8)."""
    out.zero_()
    per_byte = 8 // bits
    for slot in range(per_byte):
        part = codes[slot::per_byte]
        out[: part.numel()].add_(part, alpha=1 << (slot * bits))


def unpack_codes(packed: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Write the codes of ``packed`` to ``out`` [n] (uint8)."""
    per_byte = 8 // bits
    for slot in range(per_byte):
        part = out[slot::per_byte]
        torch.bitwise_right_shift(packed[: part.numel()], slot * bits, out=part)
    if bits < 8:
        out.bitwise_and_((1 << bits) - 1)


def pack_codes_reference(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``pack_codes`` element by element: a sum over the codes of a byte would be a reduction of eight,
    which generated code for CPUs does a hundred times slower."""
    per_byte = 8 // bits
    rest = -codes.numel() % per_byte
    rows = (torch.nn.functional.pad(codes, (0, rest)) if rest else codes).view(-1, per_byte)
    packed = rows[:, 0]
    for slot in range(1, per_byte):
        packed = packed | (rows[:, slot] << (slot * bits))
    return packed.clone() if per_byte == 1 else packed


def unpack_codes_reference(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """``unpack_codes`` as one broadcast shift."""
    per_byte = 8 // bits
    places = torch.arange(per_byte, device=packed.device, dtype=torch.uint8) * bits
    codes = (packed.unsqueeze(1) >> places) & ((1 << bits) - 1)
    return codes.view(-1)[:count]


@torch.library.custom_op("graphopt::pack_bits", mutates_args=())
def pack_bits(x: torch.Tensor) -> torch.Tensor:
    """Booleans ``x``, of any shape, as bits: uint8 [ceil(n / 8)], in the order of memory (``flat``)."""
    out = x.new_empty(packed_length(x.numel(), 1), dtype=torch.uint8)
    pack_codes(flat(x).view(torch.uint8), 1, out)
    return out


@pack_bits.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("graphopt::unpack_bits", mutates_args=())
def unpack_bits(packed: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """The booleans of ``pack_bits``, with a dense layout of ``size`` and ``stride``."""
    out = torch.empty_strided(size, stride, dtype=torch.bool, device=packed.device)
    unpack_codes(packed, 1, flat(out).view(torch.uint8))
    return out


@unpack_bits.register_fake
def _(packed: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=torch.bool, device=packed.device)


def pack_bits_reference(x: torch.Tensor) -> torch.Tensor:
    """``pack_bits`` in operators of ATen."""
    # Cast, not viewed: Inductor of torch 2.11 knows no width of booleans.
    return pack_codes_reference(flat(x).to(torch.uint8), 1)


def unpack_bits_reference(packed: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """``unpack_bits`` in operators of ATen."""
    return shaped(unpack_codes_reference(packed, 1, math.prod(size)) != 0, size, stride)


def pack_bits_supports(x: torch.Tensor) -> Reason | None:
    """Dense booleans."""
    if x.dtype is not torch.bool:
        return Reason(f"it is {x.dtype}, not torch.bool")
    return None if is_dense(x.shape, x.stride()) else Reason("its elements do not fill a stretch of memory")


def unpack_bits_supports(packed: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> Reason | None:
    """Bytes, and a dense layout for what is in them."""
    if packed.dtype is not torch.uint8 or packed.dim() != 1:
        return Reason(f"it is {packed.dtype} with {packed.dim()} dimensions, not one row of torch.uint8")
    return None if is_dense(size, stride) else Reason("the layout asked for is not dense")
