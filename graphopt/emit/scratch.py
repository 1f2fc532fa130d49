"""Memory that library calls on a GPU take from PyTorch's allocator and give back before they return.

No metadata states it. What is here was read in the library's sources or measured, as said beside
each; calls that are not listed count as taking none (convolutions do take some, which cuDNN
chooses at run time).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["scratch_bytes"]

_FLOAT = 4


def scratch_bytes(op: Any, tensors: Sequence[torch.Tensor]) -> int:
    """Bytes that ``op`` needs beyond its outputs on a GPU, from its tensor arguments."""
    name = str(getattr(op, "_schema", op)).split("(")[0].split("::")[-1].split(".")[0]
    if name == "_scaled_dot_product_cudnn_attention_backward":
        return _gradient_of_query(tensors[1], 1, 1)
    if name == "_scaled_dot_product_flash_attention_backward":
        return _gradient_of_query(tensors[1], 128, 32)
    return 0


def _gradient_of_query(query: torch.Tensor, rows: int, columns: int) -> int:
    """The query's gradient is summed up in float32, beside one float32 a row for the softmax.

    FlashAttention-2 pads rows to 128 and columns to 32 (``mha_bwd``: ``dq_accum``, ``softmax_d``);
    cuDNN 9 was measured to take the same without padding.
    """
    batch, heads, length, width = (int(size) for size in query.shape)
    padded = -(-length // rows) * rows
    return _FLOAT * batch * heads * padded * (-(-width // columns) * columns + 1)
