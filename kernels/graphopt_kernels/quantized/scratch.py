"""Memory that products with packed weights take and give back on a GPU, at most: for
``graphopt.operator_scratch``, from the sizes that launches have (``byte_launch``, ``group_launch``).

Functions take the arguments of the operators, x first and the plane of codes next.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt._torch import hint
from graphopt_kernels.quantized.byte_launch import PARTS, PROCESSORS
from graphopt_kernels.tuning.lookup import processors_of

__all__ = [
    "beside_groups", "beside_offset_groups", "beside_outliers", "beside_rounded", "beside_scaled_groups",
    "beside_unpacked_in_order", "beside_weight_only",
]  # fmt: skip

_FLOAT = 4
_BLOCK = 64 * 2**20
"""Bytes of an unpacked weight, or of sums in 32 bits, that are there at a time."""

_FEW, _FEW_OF_GROUPS = 128, 64
"""Rows up to which no weight is unpacked for the library, of bytes and of groups."""

_SLICES = 16
_TILE = (64, 128)
_TILE_OF_GROUPS = (128, 128)
"""Columns of the narrowest slices, rows and columns of the tiles that are cut into most parts."""


def beside_weight_only(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> int:
    """Of a weight of a byte, x as it is."""
    return _of_bytes(x, codes)


def beside_rounded(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> int:
    """Of a weight of a byte, x in eight bits."""
    return _of_bytes(x, codes, rounded=True)


def beside_outliers(x: torch.Tensor, codes: torch.Tensor, *others: Any) -> int:
    """The same beside inputs that are not rounded: ``others`` are scales, what is kept, columns, outliers."""
    return _of_bytes(x, codes, rounded=True, beside=hint(others[2].numel()) * x.element_size())


def beside_groups(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> int:
    """Of a weight in groups: what is unpacked at a time, or sums in parts."""
    if x.device.type != "cuda":
        return 0
    rows, n, k = _sizes(x, codes)
    size = x.element_size()
    programs = max(1, -(-rows // _TILE_OF_GROUPS[0]) * -(-n // _TILE_OF_GROUPS[1]))
    parts = _parts(x.device, programs)
    summed = parts * rows * n * _FLOAT if parts > 1 else 0
    # Tensor cores take no float32, and few columns do not fill a GPU: such weights are unpacked too.
    whole = rows > _FEW_OF_GROUPS or size == _FLOAT or n <= 256
    return max(summed, min(n * k * size, _BLOCK) if whole else 0)


def beside_scaled_groups(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> int:
    """The same beside x times its factors, or in its order."""
    scaled = hint(x.numel()) * x.element_size() if x.device.type == "cuda" else 0
    return scaled + beside_groups(x, codes)


def beside_offset_groups(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> int:
    """The same beside the product in float32, what offsets make of it, and sums of x over groups, which are
    of 32 at least."""
    if x.device.type != "cuda":
        return 0
    rows, n, _k = _sizes(x, codes)
    return 2 * rows * n * _FLOAT + hint(x.numel()) // 32 * _FLOAT + beside_groups(x, codes)


def beside_unpacked_in_order(
    codes: torch.Tensor, words: torch.Tensor, order: torch.Tensor, group: int, dtype: torch.dtype
) -> int:
    """Of a weight that is unpacked: the same with its columns as they are packed."""
    if codes.device.type != "cuda":
        return 0
    return hint(codes.shape[0]) * hint(words.shape[1]) * group * dtype.itemsize


def _of_bytes(x: torch.Tensor, codes: torch.Tensor, *, rounded: bool = False, beside: int = 0) -> int:
    """x in eight bits where it is ``rounded``, ``beside`` bytes of each row where it is not, what is unpacked
    or summed up at a time."""
    if x.device.type != "cuda":
        return 0
    rows, n, k = _sizes(x, codes)
    small = hint(x.numel()) + (_FLOAT + beside) * rows if rounded else 0
    if rows <= _FEW:
        slices = -(-n // _SLICES)
        programs = slices if rows <= 64 else -(-rows // _TILE[0]) * -(-n // _TILE[1])
        parts = _parts(x.device, max(1, programs))
        parts = parts + (beside > 0) if parts > 1 else 0
        return small + parts * rows * n * _FLOAT
    if rounded and codes.dtype is not torch.int8:
        # The library scales sums of float8 itself.
        return small
    block = rows * n * _FLOAT if rounded else n * k * x.element_size()
    return small + min(block, _BLOCK)


def _sizes(x: torch.Tensor, codes: torch.Tensor) -> tuple[int, int, int]:
    """Rows, columns, products of a sum."""
    k = hint(x.shape[-1])
    return hint(x.numel()) // max(1, k), hint(codes.shape[0]), k


def _parts(device: torch.device, programs: int) -> int:
    """So many that they fill a GPU twice; an H100 or H200 where none is there to be asked."""
    processors = processors_of(device) if torch.cuda.is_available() else PROCESSORS
    return min(PARTS, -(-2 * processors // programs))
