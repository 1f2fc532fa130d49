"""Which instructions the device of a tensor has, that kernels are written with in PTX."""

from __future__ import annotations

import torch

__all__ = ["has_half_pairs"]


def has_half_pairs(tensor: torch.Tensor) -> bool:
    """Whether pairs of bfloat16 or float16 are added and multiplied at once (sm_90 and later). Tensors
    without memory are taken to be on such a device; Triton's interpreter, which has CPU tensors, is none."""
    return tensor.is_meta or (
        tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    )  # fmt: skip
