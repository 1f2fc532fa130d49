"""Codes of four bits, two in a byte.

A row is cut into blocks of ``2 * half`` codes, kept in ``half`` bytes: byte ``j`` holds code ``j`` in its low
half and code ``j + half`` in its high one. So the codes of either half of neighbouring bytes are neighbours,
and so are the inputs that they are multiplied with::

    bytes   0          1          2          3          ...
    low     code 0     code 1     code 2     code 3
    high    half + 0   half + 1   half + 2   half + 3

What a row lacks to whole blocks is code 0.
"""

from __future__ import annotations

import torch

__all__ = ["SCALE", "SHORT_SCALE", "pack_nibbles", "unpack_nibbles"]

SCALE = -256
"""Bits of the word of a group that are its scale: a float32 without its last eight."""

SHORT_SCALE = -65536
"""The same where words name slots too: a bfloat16."""



def pack_nibbles(codes: torch.Tensor, half: int) -> torch.Tensor:
    """uint8[N, blocks * half] of ``codes`` uint8[N, K], each below 16."""
    n, k = codes.shape
    blocks = -(-k // (2 * half))
    whole = torch.nn.functional.pad(codes, (0, 2 * half * blocks - k)).view(n, blocks, 2, half)
    return (whole[:, :, 0] | (whole[:, :, 1] << 4)).reshape(n, blocks * half)


def unpack_nibbles(packed: torch.Tensor, half: int, inner: int) -> torch.Tensor:
    """Codes uint8[N, ``inner``] of ``packed`` uint8[N, blocks * half]."""
    n, size = packed.shape
    both = packed.view(n, size // half, 1, half)
    return torch.cat((both & 15, both >> 4), 2).reshape(n, 2 * size)[:, :inner]
