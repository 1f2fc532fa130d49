"""Two kernels that do nothing but move bytes, to measure what a device's memory sustains.

``graphopt::probe_copy(source, target)`` writes every element of ``source`` to ``target``;
``graphopt::probe_read(source)`` reads every element and yields one float32 sum for each block of
``READ_BLOCK``. On CUDA they are Triton kernels, elsewhere their ATen references. Importing this
module registers both operators and does not import triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from graphopt.candidate import Reason

__all__ = ["READ_BLOCK", "copy_reference", "copy_supports", "read_reference", "read_supports"]

COPY_BLOCK = 4096
READ_BLOCK = 8192
"""Elements per program: enough loads in flight for each of its eight warps."""

_WARPS = 8
_LIMIT = 2**31 - READ_BLOCK
"""Offsets are 32-bit within a kernel, so a buffer must have fewer elements."""


def copy_reference(source: torch.Tensor, target: torch.Tensor) -> None:
    """``target[:] = source``."""
    target.copy_(source)


def read_reference(source: torch.Tensor) -> torch.Tensor:
    """float32 sums of consecutive blocks of ``READ_BLOCK`` elements, the last block padded with zeros."""
    blocks = _blocks(source.numel(), READ_BLOCK)
    padded = torch.nn.functional.pad(source.float(), (0, blocks * READ_BLOCK - source.numel()))
    return padded.view(blocks, READ_BLOCK).sum(1)


def copy_supports(source: torch.Tensor, target: torch.Tensor) -> Reason | None:
    """Two contiguous vectors of one length, dtype and CUDA device, on a machine with triton."""
    if source.shape != target.shape or source.dtype != target.dtype or source.device != target.device:
        return Reason("source and target differ in shape, dtype or device")
    return _supported(source) or _supported(target)


def read_supports(source: torch.Tensor) -> Reason | None:
    """A contiguous floating-point vector on a CUDA device, on a machine with triton."""
    if not source.is_floating_point():
        return Reason(f"reads floating-point elements, got {source.dtype}")
    return _supported(source)


def _supported(vector: torch.Tensor) -> Reason | None:
    if not vector.is_cuda:
        return Reason(f"the kernel runs on CUDA, the tensor is on {vector.device.type}")
    if vector.dim() != 1 or not vector.is_contiguous():
        return Reason("takes contiguous vectors")
    if not 0 < vector.numel() < _LIMIT:
        return Reason(f"takes between 1 and {_LIMIT - 1} elements, got {vector.numel()}")
    if _kernels() is None:
        return Reason("triton is not installed")
    return None


@torch.library.custom_op("graphopt::probe_copy", mutates_args=("target",))
def probe_copy(source: torch.Tensor, target: torch.Tensor) -> None:
    kernels = _kernels()
    if kernels is None or copy_supports(source, target) is not None:
        copy_reference(source, target)
        return
    count = source.numel()
    grid = (_blocks(count, COPY_BLOCK),)
    kernels[0][grid](source, target, count, BLOCK=COPY_BLOCK, num_warps=_WARPS)


@torch.library.custom_op("graphopt::probe_read", mutates_args=())
def probe_read(source: torch.Tensor) -> torch.Tensor:
    kernels = _kernels()
    if kernels is None or read_supports(source) is not None:
        return read_reference(source)
    count = source.numel()
    grid = (_blocks(count, READ_BLOCK),)
    sums = torch.empty(grid[0], dtype=torch.float32, device=source.device)
    kernels[1][grid](source, sums, count, BLOCK=READ_BLOCK, num_warps=_WARPS)
    return sums


@probe_copy.register_fake
def _(source: torch.Tensor, target: torch.Tensor) -> None:
    return None


@probe_read.register_fake
def _(source: torch.Tensor) -> torch.Tensor:
    return source.new_empty(_blocks(source.numel(), READ_BLOCK), dtype=torch.float32)


def _blocks(count: int, size: int) -> int:
    return (count + size - 1) // size


@functools.cache
def _kernels() -> tuple[Any, Any] | None:
    """The two jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels import bandwidth_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return bandwidth_triton.copy_kernel, bandwidth_triton.read_kernel
