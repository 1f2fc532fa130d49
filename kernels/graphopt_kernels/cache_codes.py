"""Keys and values as packed integers, the layout that stores of rounded rows have.

Blocks of keys are rounded per channel, values per token (KIVI, Liu et al. 2024)::

    code = round((x - zero) / scale)  in 0 .. 2^bits - 1        x ~ code * scale + zero

Codes lie one after another in little-endian words of 32 bits; three bits are two planes, the low two bits of
all codes and then the highest ones, so that no code crosses a word::

    plane of w bits:  code i is in bits [i * w % 32, i * w % 32 + w) of word i * w // 32 of the plane
    8: (8,)   4: (4,)   3: (2, 1)   2: (2,)       each plane begins with a word of its own

=================  ==============================  =======================================================
of keys            int32 [.., words, D]            words of one block's tokens, for each channel
scales of keys     [.., 2, D]                      scale, zero of each channel of the block
of values          int32 [.., words]               words of one token's channels
scales of values   [.., 2, groups]                 scale, zero of each ``group`` channels, the last are fewer
=================  ==============================  =======================================================

Scales and zeros are rounded first and codes are those of the rounded ones.
"""

from __future__ import annotations

import torch

__all__ = [
    "PLANES",
    "pack_codes",
    "read_keys",
    "read_values",
    "round_keys",
    "round_values",
    "rounded_keys",
    "rounded_values",
    "scale_dtype",
    "unpack_codes",
    "words_of",
]

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""Bits of a code: widths of the planes they are kept in, lowest bits first."""


def words_of(bits: int, count: int) -> int:
    """Words of 32 bits that ``count`` codes take."""
    return sum(-(-count * width // 32) for width in PLANES[bits])


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scales and zeros of numbers of ``dtype`` are kept in: two bytes, of their range where they have
    two."""
    return dtype if dtype is torch.bfloat16 else torch.float16


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [.., words] of ``codes`` int64 [.., count] below ``2 ** bits``."""
    planes, low = [], 0
    count = codes.shape[-1]
    for width in PLANES[bits]:
        each = 32 // width
        plane = (codes >> low) & ((1 << width) - 1)
        low += width
        plane = torch.nn.functional.pad(plane, (0, -count % each))
        plane = plane.reshape(*codes.shape[:-1], -(-count // each), each)
        shifts = torch.arange(0, 32, width, device=codes.device)
        word = (plane << shifts).sum(-1)
        # Two's complement by hand: the highest bit of a word is one of a code.
        planes.append(torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32))
    return torch.cat(planes, -1)


def unpack_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """``codes`` int32 [.., count] of int32 [.., words]."""
    codes: torch.Tensor | None = None
    low = start = 0
    for width in PLANES[bits]:
        stop = start + -(-count * width // 32)
        shifts = torch.arange(0, 32, width, device=words.device, dtype=torch.int32)
        # A shift to the right keeps the sign: what is above the code is masked off.
        plane = (words[..., start:stop, None] >> shifts) & ((1 << width) - 1)
        plane = plane.flatten(-2)[..., :count] << low
        codes = plane if codes is None else codes | plane
        low, start = low + width, stop
    assert codes is not None
    return codes


def _codes(x: torch.Tensor, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int64 of ``x`` [.., n] along its last dimension, scale and zero [.., 1] of ``dtype``."""
    x = x.float()
    limit = torch.finfo(dtype).max
    zero = x.amin(-1, keepdim=True).clamp(-limit, limit).to(dtype)
    levels = (1 << bits) - 1
    scale = ((x.amax(-1, keepdim=True) - zero.float()) / levels).clamp(0, limit).to(dtype)
    step = scale.float()
    codes = torch.where(step > 0, (x - zero.float()) / step, 0.0).round().clamp(0, levels)
    return codes.to(torch.int64), scale, zero


def _groups(values: torch.Tensor, group: int) -> torch.Tensor:
    """[.., groups, group] of [.., width]: the last one is filled up with its last channel, which changes no
    range."""
    missing = -values.shape[-1] % group
    if missing:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], -1)
    return values.reshape(*values.shape[:-1], -(-values.shape[-1] // group), group)


def round_keys(keys: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words int32 [.., words, D] and scales [.., 2, D] of blocks ``keys`` [.., tokens, D]."""
    codes, scale, zero = _codes(keys.transpose(-1, -2), bits, scale_dtype(keys.dtype))
    return pack_codes(codes, bits).transpose(-1, -2), torch.cat([scale, zero], -1).transpose(-1, -2)


def read_keys(
    words: torch.Tensor, scales: torch.Tensor, bits: int, tokens: int, dtype: torch.dtype
) -> torch.Tensor:
    """[.., tokens, D] of ``round_keys``."""
    codes = unpack_codes(words.transpose(-1, -2), bits, tokens).transpose(-1, -2)
    return (codes * scales[..., :1, :].float() + scales[..., 1:, :].float()).to(dtype)


def round_values(values: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words int32 [.., words] and scales [.., 2, groups] of ``values`` [.., D]."""
    codes, scale, zero = _codes(_groups(values, group), bits, scale_dtype(values.dtype))
    flat = codes.flatten(-2)[..., : values.shape[-1]]
    return pack_codes(flat, bits), torch.stack([scale[..., 0], zero[..., 0]], -2)


def read_values(
    words: torch.Tensor, scales: torch.Tensor, bits: int, width: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """[.., width] of ``round_values``."""
    codes = unpack_codes(words, bits, width)
    scale, zero = scales.float().repeat_interleave(group, -1)[..., :width].unbind(-2)
    return (codes * scale + zero).to(dtype)


def rounded_keys(keys: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """``keys`` [.., S, D] as they are read from a store, without packing: whole blocks are rounded, rows
    behind the last whole one are left."""
    whole = keys.shape[-2] // block * block
    shape = (*keys.shape[:-2], whole // block, block, keys.shape[-1])
    blocks = keys[..., :whole, :].reshape(shape).transpose(-1, -2)
    codes, scale, zero = _codes(blocks, bits, scale_dtype(keys.dtype))
    read = (codes * scale.float() + zero.float()).to(keys.dtype).transpose(-1, -2).flatten(-3, -2)
    return torch.cat([read, keys[..., whole:, :]], -2)


def rounded_values(values: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """``values`` [.., D] as they are read from a store, without packing."""
    codes, scale, zero = _codes(_groups(values, group), bits, scale_dtype(values.dtype))
    read = (codes * scale.float() + zero.float()).to(values.dtype)
    return read.flatten(-2)[..., : values.shape[-1]]
