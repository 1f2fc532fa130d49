"""Products of eight-bit numbers that torch has no public name for."""

from __future__ import annotations

import torch

__all__ = ["integer_product", "multiplies_integers", "scaled_product"]


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 ``x`` [M, K] times int8 ``weight`` [K, N]: int32 [M, N]. On CUDA M is above 16, K and N are
    multiples of 8."""
    return torch._int_mm(x, weight)


def scaled_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scales: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """float8 ``x`` [M, K] times float8 ``weight`` [K, N], columns contiguous, scaled by float32 [M, 1] and
    [1, N], ``bias`` [N] added: [M, N] of ``dtype``. On CUDA K and N are multiples of 16."""
    return torch._scaled_mm(x, weight, x_scales, scales, bias, out_dtype=dtype)


def multiplies_integers() -> bool:
    """Whether the CPU has instructions for products of eight-bit integers that the library uses."""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return known is not None and bool(known())
