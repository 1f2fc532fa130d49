"""Codes of two and three bits as the upper bits of codes of four, in planes.

A row is cut into units of ``4 * width`` codes (two bits) or ``8 * width`` (three). The upper two bits of a
code are in the plane of pairs, four codes a byte, ``width`` bytes for each 4 * ``width`` codes; byte ``j``
holds, from its lowest bits up, codes ``j``, ``2 * width + j``, ``width + j``, ``3 * width + j``::

    pairs   3 * width + j | width + j | 2 * width + j | j

So with the two bits below, in the same places of a byte of a second plane, one shift and one selection of
bits give bytes as ``nibbles`` has them, first for codes 0 and ``width`` on, then for 2 and 3 ``width`` on.
Those two bits are

    two bits    0, or, for units that are outliers, both of the plane of extra bits
    three bits  the higher of the plane of thirds, the lower 0, or, for outliers, of the plane of extra bits

``width`` bytes of either plane serve a unit: with three bits the first 4 * ``width`` codes have the higher
bits of each two in the plane of thirds and the lower ones in that of extra bits, the others the other way
round. What a row lacks to whole units is code 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Planes", "pack_planes", "unit_of", "unpack_planes"]

_SHIFTS = (0, 4, 2, 6)
"""Of each fourth of the codes that bytes hold."""


class Planes(NamedTuple):
    """``pairs`` uint8[N, units * unit / 4]; ``thirds`` uint8[N, units * width], none for two bits; ``extra``
    uint8[N, units, width], of every unit."""

    pairs: torch.Tensor
    thirds: torch.Tensor | None
    extra: torch.Tensor


def unit_of(bits: int, width: int) -> int:
    """Codes of a unit."""
    return (4 if bits == 2 else 8) * width


def pack_planes(codes: torch.Tensor, bits: int, width: int) -> Planes:
    """Planes of ``codes`` uint8[N, K] of four bits."""
    n, k = codes.shape
    unit = unit_of(bits, width)
    units = -(-k // unit)
    whole = torch.nn.functional.pad(codes, (0, units * unit - k)).view(n, units, unit // 4 // width, 4, width)
    pairs = _joined(whole >> 2).reshape(n, units * unit // 4)
    if bits == 2:
        return Planes(pairs, None, _joined(whole & 3)[:, :, 0])
    higher, lower = _joined(whole >> 1 & 1), _joined(whole & 1)
    thirds = higher[:, :, 0] << 1 | higher[:, :, 1]
    return Planes(pairs, thirds.reshape(n, units * width), lower[:, :, 0] | lower[:, :, 1] << 1)


def unpack_planes(planes: Planes, bits: int, width: int, inner: int) -> torch.Tensor:
    """Codes uint8[N, ``inner``] of four bits."""
    n, units = planes.extra.shape[:2]
    high = planes.pairs.view(n, units, unit_of(bits, 1) // 4, width)
    if planes.thirds is None:
        low = planes.extra[:, :, None]
    else:
        thirds, extra = planes.thirds.view(n, units, width), planes.extra
        low = torch.stack((thirds & 0xAA | extra & 0x55, thirds << 1 & 0xAA | extra >> 1 & 0x55), 2)
    fourths = [(high >> shift & 3) << 2 | low >> shift & 3 for shift in _SHIFTS]
    return torch.stack(fourths, 3).reshape(n, units * unit_of(bits, width))[:, :inner]


def _joined(fields: torch.Tensor) -> torch.Tensor:
    """Bytes [..., width] of fields [..., 4, width] below 4."""
    first, second, third, fourth = (fields[..., each, :] << shift for each, shift in enumerate(_SHIFTS))
    return first | second | third | fourth
