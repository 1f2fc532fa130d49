"""Ways to round a weight to codes of four bits and words of groups (``group_products.GroupWeight``).

A group is ``(code - zero) * scale``. Scales are bfloat16; zeros are multiples of 1/8, below 16. All of these
take a weight float32[N, K] whose K is a multiple of ``group`` and give ``Codes``.

- ``nearest``: the range of a group and 0 in 15 steps, the zero rounded to a code so that 0 is exact;
  symmetric, its largest number in 7 steps either way, zero 8.
- ``half_quadratic`` (HQQ, https://mobiusml.github.io/hqq_blog): zeros are moved so that errors are small but
  for a few, by a proximal step for their norm of power 0.7 and a mean, in turns. The scale stays. Of each
  group the best of all turns by squared error is kept, the first being ``nearest``.
- ``error_feedback`` (GPTQ, https://arxiv.org/abs/2210.17323): columns are rounded in order, and what each is
  off is made good by those that follow, as the mean of x x^T says. Ranges of a group are taken when
  its first column is reached. Blocks of 128 columns, no reordering, 1 % of the mean added to the diagonal.
- ``channel_factors`` (AWQ, https://arxiv.org/abs/2306.00978): columns are multiplied by a power of the size
  of their inputs before they are rounded to the nearest; the power of 20 with the least error of results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphopt.errors import QuantizationError

__all__ = ["Codes", "channel_factors", "error_feedback", "half_quadratic", "nearest", "words_of"]

_TOP = 15
_MIDDLE = 8
_BLOCK = 128
_DAMPING = 0.01
_TURNS = 20
_POWER = 0.7
_POWERS = 20


class Codes(NamedTuple):
    """``codes`` uint8[N, K]; ``scales`` and ``zeros`` float32[N, K / group]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def weight(self) -> torch.Tensor:
        """float32[N, K]."""
        n, groups = self.scales.shape
        wide = self.codes.float().view(n, groups, self.codes.shape[1] // max(1, groups))
        return ((wide - self.zeros[..., None]) * self.scales[..., None]).view(self.codes.shape)


def words_of(rounded: Codes) -> torch.Tensor:
    """int32[N, K / group]: the scale, a bfloat16, in the upper half, eight times the zero in the lower."""
    return rounded.scales.contiguous().view(torch.int32) | (rounded.zeros * 8).to(torch.int32)


def nearest(weight: torch.Tensor, group: int, symmetric: bool) -> Codes:
    """Every number to the nearest that its group can hold."""
    wide = _grouped(weight, group)
    scales, zeros = _ranges(wide, symmetric)
    return _assembled(_rounded(wide, scales, zeros), scales, zeros, weight)


def half_quadratic(weight: torch.Tensor, group: int) -> Codes:
    """Zeros moved to where most errors are small."""
    wide = _grouped(weight, group)
    scales, zeros = _ranges(wide, False)
    codes = _rounded(wide, scales, zeros)
    best = codes, zeros
    least = _squares(wide, codes, scales, zeros)
    steepness = 10.0
    for _ in range(_TURNS):
        error = wide - (codes - zeros) * scales
        size = error.abs()
        # The proximal step; numbers that are met exactly stay so: 0 ** (power - 1) is infinite.
        kept = (size - size.pow(_POWER - 1) / steepness).clamp(min=0) * error.sign()
        zeros = (codes - (wide - kept) / scales).mean(-1, keepdim=True)
        zeros = (zeros * 8).round().clamp(0, 127) / 8
        codes = _rounded(wide, scales, zeros)
        found = _squares(wide, codes, scales, zeros)
        better = found < least
        least = torch.where(better, found, least)
        best = torch.where(better, codes, best[0]), torch.where(better, zeros, best[1])
        steepness *= 1.01
    return _assembled(best[0], scales, best[1], weight)


def error_feedback(weight: torch.Tensor, group: int, symmetric: bool, gram: torch.Tensor) -> Codes:
    """Columns in order, what each is off made good by the next; ``gram`` float32[K, K] is the mean of
    products of inputs. Raises ``QuantizationError`` if it is none."""
    n, k = weight.shape
    upper = _inverse_factor(gram.to(weight))
    left = weight.clone()
    codes = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    scales, zeros = (weight.new_empty((n, k // group)) for _ in range(2))
    for start in range(0, k, _BLOCK):
        stop = min(k, start + _BLOCK)
        block, factor = left[:, start:stop], upper[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            place = start + column
            if place % group == 0:
                scale, zero = _ranges(block[:, column : column + group], symmetric)
                scales[:, place // group], zeros[:, place // group] = scale[:, 0], zero[:, 0]
            given = block[:, column : column + 1]
            code = _rounded(given, scale, zero)
            codes[:, place] = code[:, 0].to(torch.uint8)
            error = (given - (code - zero) * scale) / factor[column, column]
            block[:, column:] -= error * factor[column, column:]
            errors[:, column] = error[:, 0]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return Codes(codes, scales, zeros)


def channel_factors(
    weight: torch.Tensor, group: int, symmetric: bool, gram: torch.Tensor
) -> tuple[Codes, torch.Tensor]:
    """Codes of ``weight`` times factors, and what x is multiplied by, one over them: float32[K]. ``gram``
    float32[K, K] as for ``error_feedback``."""
    gram = gram.to(weight)
    size = gram.diagonal().clamp(min=0).sqrt()
    size = (size / size.mean().clamp(min=1e-12)).clamp(1e-4, 1e4)
    best = None
    for step in range(_POWERS):
        factors = size ** (step / _POWERS)
        factors = factors / (factors.amax() * factors.amin()).sqrt()
        rounded = nearest(weight * factors, group, symmetric)
        off = rounded.weight() / factors - weight
        error = float(((off @ gram) * off).sum())
        if best is None or error < best[0]:
            best = error, rounded, 1 / factors
    assert best is not None
    return best[1], best[2]


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    n, k = weight.shape
    return weight.view(n, k // group, group)


def _ranges(wide: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of the last dimension, which stays with size 1."""
    if symmetric:
        scales = _short(wide.abs().amax(-1, keepdim=True) / (_MIDDLE - 1))
        return scales, torch.full_like(scales, _MIDDLE)
    low = wide.amin(-1, keepdim=True).clamp(max=0)
    high = wide.amax(-1, keepdim=True).clamp(min=0)
    scales = _short(high / _TOP - low / _TOP)
    return scales, (-low / scales).round().clamp(0, _TOP)


def _short(scales: torch.Tensor) -> torch.Tensor:
    """As bfloat16 holds them; a group of zeros has scale 1."""
    short = scales.to(torch.bfloat16).float()
    return torch.where(short > 0, short, 1.0)


def _rounded(wide: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    return (wide / scales + zeros).round().clamp(0, _TOP)


def _squares(
    wide: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    return (wide - (codes - zeros) * scales).square().sum(-1, keepdim=True)


def _assembled(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, weight: torch.Tensor) -> Codes:
    return Codes(codes.to(torch.uint8).view(weight.shape), scales[..., 0], zeros[..., 0])


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of ``gram``, damped; inputs that are always 0 get 1."""
    damped = gram.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPING * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(damped)
    upper: torch.Tensor = factor
    if not bool(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if bool(failed):
        raise QuantizationError("the mean of x x^T is not positive definite")
    return upper
