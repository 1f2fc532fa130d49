"""Products with int8 weights on a CPU that multiplies integers: x in three digits of eight bits.

    v = round(x * 127 * 65536 / s)     s the largest |x| of a row
    v = d0 + 256 * d1 + 65536 * d2     each digit from -128 to 127

What is left out is at most 2**-23 of the largest |x| of the row, about what float32 leaves out of that
one. The three products of integers are exact, and add up to what float32 arithmetic gives to its own
precision, at a fraction of its time: weights are read as they are stored, never converted.

Where a row is not finite, float32 arithmetic tells which results are not.
"""

from __future__ import annotations

import functools
import math

import torch

from graphopt import _torch

__all__ = ["DIGITS", "can_multiply", "product_of_digits", "product_of_integers"]

DIGITS = 3
_WHOLE = 127 * 65536.0
_HALVES = 128 * (1 + 256 + 65536)
"""Added to a number, it makes its digits bytes without a sign, 128 more than they are."""

_TINY = 1e-30
_LEAST_WEIGHTS = 2**16
"""Below, the arithmetic around the product takes longer than converting the weight."""

_BY_THEMSELVES = 6
"""Rows that are multiplied one by one."""

_LONGEST = 2**17
"""Products of so many pairs of eight bits add up within 31."""


def can_multiply(codes: torch.Tensor) -> bool:
    """Whether products with ``codes`` [N, K] are fastest so, and right."""
    return (
        codes.device.type == "cpu"
        and codes.dtype is torch.int8
        and codes.numel() >= _LEAST_WEIGHTS
        and codes.shape[1] <= _LONGEST
        and _multiplies_integers()
    )


def product_of_digits(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """``x`` [M, K] times ``codes`` int8[N, K] times ``scales`` float32[N], ``bias`` [N] added, in the dtype
    of x; ``None`` where x is not finite."""
    left = x.float()
    by_row = torch.linalg.vector_norm(left, float("inf"), 1, keepdim=True)
    if not math.isfinite(by_row.sum().item()):
        return None
    by_row.clamp_(min=_TINY)
    whole = left.mul(_WHOLE / by_row).round_().to(torch.int32).add_(_HALVES)
    digits = torch.empty((DIGITS, *x.shape), dtype=torch.int8)
    for place in range(DIGITS):
        digits[place] = whole  # its last eight bits
        whole >>= 8
    digits = digits.bitwise_xor_(-128).view(-1, x.shape[1])
    sums = _sums(digits, codes).float()
    places = torch.tensor([1.0, 256.0, 65536.0]) / _WHOLE
    total = torch.mv(sums.view(DIGITS, -1).t(), places).view(x.shape[0], -1)
    return _scaled(total, by_row, scales, bias, x.dtype)


def product_of_integers(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``x`` int8[M, K] times ``x_scales`` float32[M, 1] times the weight, ``bias`` [N] added: [M, N] of
    ``dtype``."""
    return _scaled(_sums(x, codes).float(), x_scales, scales, bias, dtype)


def _sums(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The library reads the weight as it is for one row; for more it puts it in another order first."""
    weight = codes.t()
    if x.shape[0] > _BY_THEMSELVES:
        return _torch.integer_product(x, weight)
    return torch.cat([_torch.integer_product(row[None], weight) for row in x])


def _scaled(
    sums: torch.Tensor,
    by_row: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    # The weights' scales first, which are small: the largest x would overflow.
    result = sums.mul_(scales).mul_(by_row)
    return (result if bias is None else result.add_(bias)).to(dtype)


@functools.cache
def _multiplies_integers() -> bool:
    return _torch.multiplies_integers()
