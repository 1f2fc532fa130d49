"""Codes of a few bits in words of 32, and groups of them as schemes keep them."""

from __future__ import annotations

import torch

from graphopt.errors import CheckpointError
from graphopt.packing.formats import PackedTensors
from graphopt_kernels.quantized.int4 import GROUPS, Int4
from graphopt_kernels.quantized.int4_ordered import Int4Ordered

__all__ = ["codes_of", "int4_tensors", "kept_group"]

_MIDDLE = 8


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


def int4_tensors(
    name: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    order: torch.Tensor | None = None,
) -> PackedTensors:
    """``int4`` of ``codes`` uint8[N, K] below 16, of ``scales`` and ``zeros`` [N, groups]; ``int4-ordered``
    where columns are those ``order`` int64[K] of the weight. Groups of ours are parts of those.

    Raises ``CheckpointError``, naming the weight ``name``, where the scheme cannot hold them as they are.
    """
    group = codes.shape[1] // scales.shape[1]
    own = kept_group(group)
    if own is None:
        raise CheckpointError(
            f"{name} has groups of {group}: no scheme of four bits keeps those, int4 has groups of "
            f"{', '.join(map(str, reversed(GROUPS)))} and of what they divide"
        )
    scales, zeros = (tensor.repeat_interleave(group // own, 1) for tensor in (scales, zeros))
    symmetric = bool((zeros == _MIDDLE).all())
    scheme = Int4(own, symmetric) if order is None else Int4Ordered(own, symmetric)  # type: ignore[arg-type]
    found = scheme.exact(codes, scales, zeros)
    if not isinstance(found, dict):
        raise CheckpointError(f"{name}: {found}")
    return PackedTensors(scheme, found if order is None else {**found, "order": order.int()})
