"""Memory that library calls on a GPU take from PyTorch's allocator and give back before they return.

No metadata states it. What is here was read in the library's sources or measured, as said beside each, or is
what operators say of themselves (``graphopt.operator_scratch``); other calls count as taking none. What cuDNN
takes for a convolution it chooses by shapes, layouts and device: there the call is made once, on memory of
its own, and watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt import _torch
from graphopt.collectives import is_collective, staged_bytes
from graphopt.operator_scratch import stated_scratch
from graphopt.product_scratch import product_scratch

__all__ = ["scratch_bytes", "watched_bytes"]

_FLOAT = 4

_CONVOLUTIONS = ("convolution", "convolution_backward", "convolution_relu")

_UPDATES = ("adam_step", "adam_update", "sgd_step", "sgd_update")

_CHUNK = 16384
"""Elements that a program of an optimizer's kernel updates (``graphopt_kernels.optimizer_step``)."""

_MULTIPROCESSORS = 132
"""Of an H100 or H200, where the GPU is not there to be asked."""

_CPU_ELEMENTS = 2**18
"""Elements of logits that a chunked loss handles at a time on a CPU."""

_ROW_ALIGNMENT = 64
"""Elements to which rows of a chunk of logits are padded (``graphopt::linear_cross_entropy``)."""


def scratch_bytes(op: Any, args: Sequence[Any]) -> int:
    """Bytes that ``op`` needs beyond its outputs: on a GPU, and of collectives. By positional arguments."""
    qualified = str(getattr(op, "_schema", op)).split("(")[0].split(".")[0]
    stated = stated_scratch(qualified)
    if stated is not None:
        return stated(*args)
    name = qualified.split("::")[-1]
    if name == "_scaled_dot_product_cudnn_attention_backward":
        return _gradient_of_query(args[1], 1, 1) + _gradients_of_groups(args[1], args[2], args[3])
    if name == "_scaled_dot_product_flash_attention_backward":
        return _gradient_of_query(args[1], 128, 32)
    if name.startswith("linear_cross_entropy") and hasattr(op, "_schema"):
        names = [argument.name for argument in op._schema.arguments]
        return _chunked_loss(name, dict(zip(names, args, strict=False)))
    if name == "row_norm_backward" and args[1].device.type == "cuda":
        return _sums_of_rows(args[1], args[9])
    if name == "rotary_backward" and args[11] is not None and args[4].device.type == "cuda":
        return _sums_of_heads(args)
    if name == "attention_backward" and args[1].device.type == "cuda":
        # Two numbers a row: the log-sum-exp in base 2, and the sum of gradient times output
        # (``graphopt_kernels.attention_launch``).
        return 2 * _FLOAT * int(args[6].numel())
    if name in _UPDATES and args[0] and args[0][0].device.type == "cuda":
        return _table_of_tensors(args[0])
    if is_collective(op) and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu":
        size = _torch.hint(args[0].untyped_storage().nbytes())
        gathered = name.startswith("all_gather")
        return staged_bytes(op, size, size * int(args[1]) if gathered else size)
    if name in _CONVOLUTIONS and args[0].device.type == "cuda":
        return watched_bytes(op, args)
    if name == "embedding_dense_backward":
        return _gradient_of_embedding(args[0], args[1], int(args[2]))
    return 0


def _table_of_tensors(params: Sequence[torch.Tensor]) -> int:
    """Six numbers of each tensor, and whose each chunk is: kept from step to step
    (``graphopt_kernels.optimizer_step``)."""
    chunks = sum(-(-_torch.hint(p.numel()) // _CHUNK) for p in params)
    return 6 * 8 * len(params) + 4 * chunks


_watched_before: dict[tuple[Any, ...], int] = {}


def watched_bytes(op: Any, args: Sequence[Any]) -> int:
    """What a call takes from the CUDA allocator beyond what it returns; 0 where the device has not the
    memory to try it. Once for each operator, shapes, strides and dtypes; the second run counts, as the
    first may try algorithms out."""
    described = torch.utils._pytree.tree_map(_described, list(args))
    key = (str(op), repr(described), torch.backends.cudnn.benchmark)
    if key not in _watched_before:
        with _torch.outside_of_fake_mode(), torch.no_grad():
            try:
                _watched_before[key] = _taken(op, torch.utils._pytree.tree_map(_made, described))
            except torch.OutOfMemoryError:
                _watched_before[key] = 0
    return _watched_before[key]


def _taken(op: Any, args: Sequence[Any]) -> int:
    op(*args)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = op(*args)
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return max(0, peak - before - (after - before))


@dataclass(frozen=True)
class _Described:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _described(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return _torch.hint(value) if isinstance(value, torch.SymInt) else value
    shape, stride = tuple(map(_torch.hint, value.shape)), tuple(map(_torch.hint, value.stride()))
    return _Described(shape, stride, value.dtype, value.device)


def _made(value: Any) -> Any:
    if not isinstance(value, _Described):
        return value
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device).zero_()


def _gradient_of_embedding(grad: torch.Tensor, indices: torch.Tensor, rows: int) -> int:
    """Partial sums, of ten rows at most, in float32, and the sorted indices with their segments.

    ``aten/src/ATen/native/cuda/Embedding.cu`` and ``EmbeddingBackwardKernel.cu``: up to 3,072 indices
    need neither.
    """
    count, width = int(indices.numel()), int(grad.shape[-1])
    if count <= 3072:
        return 0
    partial = count // 10 + min(count, rows)
    element = max(grad.dtype.itemsize, _FLOAT)
    return partial * (width * element + indices.dtype.itemsize) + 6 * count * indices.dtype.itemsize


def _gradient_of_query(query: torch.Tensor, rows: int, columns: int) -> int:
    """The query's gradient is summed up in float32, beside one float32 a row for the softmax.

    FlashAttention-2 pads rows to 128 and columns to 32 (``mha_bwd``: ``dq_accum``, ``softmax_d``);
    cuDNN 9 was measured to take the same without padding.
    """
    batch, heads, length, width = (int(size) for size in query.shape)
    padded = -(-length // rows) * rows
    return _FLOAT * batch * heads * padded * (-(-width // columns) * columns + 1)


def _gradients_of_groups(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> int:
    """Gradients of keys and values for each head of queries, where these share them: cuDNN 9 takes them
    beside those that it returns (measured)."""
    batch, heads, *_ = query.shape
    if heads == keys.shape[1]:
        return 0
    elements = sum(int(each.shape[2] * each.shape[3]) for each in (keys, values))
    return int(batch * heads) * elements * keys.dtype.itemsize


def _sums_of_rows(input: torch.Tensor, output_mask: Sequence[bool]) -> int:
    """A float32 for each column and program: up to four programs for each multiprocessor
    (``graphopt_kernels.row_norm``)."""
    width = int(input.shape[-1])
    rows = _torch.hint(input.numel()) // max(width, 1)
    return min(rows, 4 * _multiprocessors(input.device)) * width * _FLOAT * sum(map(bool, output_mask[1:3]))


def _sums_of_heads(args: Sequence[Any]) -> int:
    """A float32 for each element of a head and program, five programs for each multiprocessor
    (``graphopt_kernels.rotary_launch``)."""
    size = int(args[3].shape[-1])
    return 5 * _multiprocessors(args[4].device) * size * _FLOAT if any(args[14][1:]) else 0


def _multiprocessors(device: torch.device) -> int:
    if not torch.cuda.is_available():
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _chunked_loss(name: str, args: dict[str, Any]) -> int:
    """The chunk or block of logits, what is kept of each row until the loss is summed up, and sums of the
    bias or the input.

    Hand-counted from ``graphopt_kernels.linear_cross_entropy`` and ``linear_cross_entropy_blocks``; cuBLAS
    takes its workspace elsewhere.
    """
    rows, columns = int(args["input"].shape[0]), int(args["weight"].shape[0])
    dtype = args["input"].dtype
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    mask = args.get("output_mask", (False,) * 3)
    by_class = "block" in args
    step = rows if by_class else min(-(-rows // args["chunks"]), rows)
    width = min(args["block"], columns) if by_class else columns
    width = -(-width // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    total: int = step * width * dtype.itemsize
    if by_class:
        if not name.endswith("_backward"):
            # Sums of exponentials, until the last block has come.
            total += rows * exact.itemsize
        taken = -(-rows * exact.itemsize // dtype.itemsize)
        # A gradient that is added to has no room.
        fits = mask[1] and columns - taken >= _ROW_ALIGNMENT and "into" not in args
        if mask[0] and exact is not dtype and not fits:
            total += rows * int(args["input"].shape[1]) * exact.itemsize
    is_mean = args["reduction"] == "mean"
    if name.endswith("_backward"):
        grad = args["grad"]
        if is_mean or grad.dtype is not exact:
            total += (1 if is_mean else int(grad.numel())) * exact.itemsize
    elif name.endswith("_with_gradients"):
        total += (2 * rows + 1) * exact.itemsize
    elif args["reduction"] != "none" or args["dtype"] is not exact:
        total += rows * exact.itemsize
    if args["input"].device.type == "cpu":
        total += _converted(args, step, width, exact, name, by_class and bool(mask[0]))
    if mask[2] and not by_class:
        # Each chunk's sum, and where they are added up in place of the output that comes in the end.
        total += columns * exact.itemsize
    return total


def _converted(args: dict[str, Any], step: int, width: int, exact: torch.dtype, name: str, adds: bool) -> int:
    """On a CPU some rows at a time are converted, and a block of the weight for a product that ``adds`` to
    a wider sum; slopes of a softcap and logits that are held come on top. In between products take theirs."""
    dtype, (rows, size) = args["input"].dtype, map(int, args["input"].shape)
    together = min(rows, max(1, _CPU_ELEMENTS // max(width, 1)))
    copies = (dtype is not exact) + bool(args["softcap"] and "output_mask" in args)
    if name.endswith("_blocks_with_gradients"):
        copies = max(copies, 1)
    product = (size + together) * width if adds and dtype is not exact else 0
    # What is kept of each row beside its logits: at most eight numbers, of all rows where a block is small.
    mask = args.get("output_mask", (False,) * 3)
    taken = [product_scratch((step, size), (size, width), dtype, turned="right")]
    if mask[0] and not adds:
        taken.append(product_scratch((step, width), (width, size), dtype))
    if mask[1] or ("into" in args and args["into"].dtype is dtype):
        taken.append(product_scratch((width, step), (step, size), dtype, turned="left"))
    converted = max(copies * together * width, product) * exact.itemsize
    return max(converted, *taken) + 8 * rows * exact.itemsize
