"""Codes of a few bits in words of 32, and groups of them as schemes keep them."""

from __future__ import annotations

import torch

from graphopt.errors import CheckpointError
from graphopt.packing.formats import PackedTensors
from graphopt_kernels.quantized.group_products import GROUPS
from graphopt_kernels.quantized.int4 import Grouped, Int4
from graphopt_kernels.quantized.int4_ordered import Int4Ordered
from graphopt_kernels.quantized.lowbits import Int2, Int3

__all__ = ["codes_of", "group_tensors", "kept_group"]

_MIDDLE = {3: 4, 4: 8}
"""The zero of schemes that are symmetric, by bits. Two bits have 0 between two codes, which no whole zero
is."""


_FEWER = {2: Int2, 3: Int3}


def codes_of(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """``count`` codes uint8[count, N] of ``words`` int32[count * bits / 32, N], the first in the last bits:
    bits follow each other from word to word, as codes of three bits need."""
    result = torch.empty((count, words.shape[1]), dtype=torch.uint8)
    mask = (1 << bits) - 1
    # 32 codes are in ``bits`` words, whatever ``bits`` is: each place in those is done for all at once.
    for place in range(min(32, count)):
        word, shift = divmod(place * bits, 32)
        code = words[word::bits] >> shift
        if shift + bits > 32:
            # An arithmetic shift brings copies of the sign in.
            code = (code & ((1 << (32 - shift)) - 1)) | (words[word + 1 :: bits] << (32 - shift))
        result[place::32] = (code & mask).to(torch.uint8)
    return result


def kept_group(group: int) -> int | None:
    """The largest group of ours that divides groups of ``group``, if there is one."""
    return next((own for own in GROUPS if group % own == 0), None)


def group_tensors(
    name: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int = 4,
    order: torch.Tensor | None = None,
) -> PackedTensors:
    """``codes`` uint8[N, K] below 2 ** ``bits``, ``scales`` and ``zeros`` [N, groups], as ``int2`` and
    ``int3`` without outliers where they hold them, in fewer bytes, else as ``int4``; ``int4-ordered`` where
    columns are those ``order`` int64[K] of the weight. Groups of ours are parts of those.

    Raises ``CheckpointError``, naming the weight ``name``, where no scheme can hold them as they are.
    """
    group = codes.shape[1] // scales.shape[1]
    own = kept_group(group)
    if own is None:
        raise CheckpointError(
            f"{name} has groups of {group}: no scheme of four bits keeps those, int4 has groups of "
            f"{', '.join(map(str, reversed(GROUPS)))} and of what they divide"
        )
    scales, zeros = (tensor.repeat_interleave(group // own, 1) for tensor in (scales, zeros))
    if order is None and bits in _FEWER:
        fewer = _FEWER[bits](own, _is_symmetric(zeros, bits), outliers=0.0)  # type: ignore[arg-type]
        found = fewer.exact(codes, scales, zeros)
        # Short rows are filled up to more than four bits would take.
        size = codes.shape[0], codes.shape[1], torch.float32
        if isinstance(found, dict) and fewer.stored_bytes(*size) < Int4(own).stored_bytes(*size):  # type: ignore[arg-type]
            return PackedTensors(fewer, found)
    symmetric = _is_symmetric(zeros, 4)
    scheme: Grouped = Int4(own, symmetric) if order is None else Int4Ordered(own, symmetric)  # type: ignore[arg-type]
    found = scheme.exact(codes, scales, zeros)
    if not isinstance(found, dict):
        raise CheckpointError(f"{name}: {found}")
    return PackedTensors(scheme, found if order is None else {**found, "order": order.int()})


def _is_symmetric(zeros: torch.Tensor, bits: int) -> bool:
    return bits in _MIDDLE and bool((zeros == _MIDDLE[bits]).all())
