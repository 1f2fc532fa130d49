"""A dense tensor as one row in the order of its memory, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["contiguous_order", "flat", "is_dense", "shaped"]


def contiguous_order(stride: Sequence[int]) -> list[int]:
    """Dimensions by falling stride: permuted so, a dense tensor is contiguous."""
    return sorted(range(len(stride)), key=lambda d: -stride[d])


def is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements fill a stretch of memory, each once."""
    expected = 1
    for length, step in sorted(zip(size, stride, strict=True), key=lambda pair: (pair[1], pair[0])):
        if length == 1:
            continue
        if step != expected:
            return math.prod(size) == 0
        expected *= length
    return True


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements [n] of a dense tensor in the order of its memory, without a copy.

    Of a tensor that is not dense: in the order of its indices, copied where that takes it.
    """
    if is_dense(tensor.shape, tensor.stride()):
        return tensor.permute(contiguous_order(tensor.stride())).reshape(-1)
    return tensor.reshape(-1)


def shaped(row: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """``row`` [n], elements in the order of memory, as a tensor of a dense layout, without a copy."""
    order = contiguous_order(stride)
    inverse = [order.index(d) for d in range(len(order))]
    return row.view([size[d] for d in order]).permute(inverse)
