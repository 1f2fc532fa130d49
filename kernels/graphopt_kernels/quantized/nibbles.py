"""Codes of four bits, two in a byte.

A row is cut into blocks of ``2 * half`` codes, kept in ``half`` bytes: byte ``j`` holds code ``o(j)`` in its
low half and code ``o(j) + half`` in its high one. So the codes of either half of all bytes are neighbours,
and so are the inputs that they are multiplied with. ``o`` is the identity, or, ``shuffled``, exchanges the
second and the third of every four::

    bytes   0          1          2          3          ...
    low     code 0     code 2     code 1     code 3
    high    half + 0   half + 2   half + 1   half + 3

Then the same bits of both 16-bit parts of a register of four bytes are neighbours: a shift, a mask and a
subtraction make two numbers of them. What a row lacks to whole blocks is code 0.
"""

from __future__ import annotations

import torch

__all__ = ["pack_nibbles", "unpack_nibbles"]

_SHUFFLE = [0, 2, 1, 3]


def pack_nibbles(codes: torch.Tensor, half: int, shuffled: bool) -> torch.Tensor:
    """uint8[N, blocks * half] of ``codes`` uint8[N, K], each below 16; ``half`` is a multiple of 4."""
    n, k = codes.shape
    blocks = -(-k // (2 * half))
    whole = torch.nn.functional.pad(codes, (0, 2 * half * blocks - k)).view(n, blocks, 2, half)
    if shuffled:
        whole = _exchanged(whole)
    return (whole[:, :, 0] | (whole[:, :, 1] << 4)).reshape(n, blocks * half)


def unpack_nibbles(packed: torch.Tensor, half: int, shuffled: bool, inner: int) -> torch.Tensor:
    """Codes uint8[N, ``inner``] of ``packed`` uint8[N, blocks * half]."""
    n, size = packed.shape
    both = packed.view(n, size // half, 1, half)
    whole = torch.cat((both & 15, both >> 4), 2)
    if shuffled:
        whole = _exchanged(whole)
    return whole.reshape(n, 2 * size)[:, :inner]


def _exchanged(codes: torch.Tensor) -> torch.Tensor:
    return codes.unflatten(-1, (-1, 4))[..., _SHUFFLE].flatten(-2)
