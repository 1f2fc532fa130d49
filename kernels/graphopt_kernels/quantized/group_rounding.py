"""Ways to round a weight to codes of four bits and words of groups (``group_products.GroupWeight``).

A group is ``(code - zero) * scale``. Scales are rounded to bfloat16; zeros are multiples of 1/8, below 16.
All of these take a weight float32[N, K] whose K is a multiple of ``group`` and give ``Codes``. ``tops`` is
the highest code of groups, [N, K / group] or the same for all: 15; of groups with fewer bits 7 or 3, whose
codes are then multiplied by 2 or 4 to be codes of four bits too. Where there is more than one of ``shares``,
ranges of groups are narrowed to those shares of what they are, and of each group the one with the least
squared error is taken.

- ``nearest``: the range of a group and 0 in 15 steps, the zero rounded to a code so that 0 is exact;
  symmetric, its largest number in 7 steps either way, zero 8. Three bits have 7 steps, and 3 either way, two
  bits 3; symmetric, two bits have two numbers on either side of 0, which is none of them.
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

from collections.abc import Sequence
from typing import NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt.errors import QuantizationError
from graphopt_kernels.quantized.nibbles import SCALE

__all__ = [
    "Codes",
    "channel_factors",
    "error_feedback",
    "half_quadratic",
    "nearest",
    "reason_of_words",
    "words_of",
]

_TOP = 15
_WHOLE = (1.0,)
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
    """int32[N, K / group]: eight times the zero in the last eight bits, the scale in the others, whose own
    last eight bits are 0."""
    return rounded.scales.contiguous().view(torch.int32) | (rounded.zeros * 8).to(torch.int32)


def nearest(
    weight: torch.Tensor,
    group: int,
    symmetric: bool,
    tops: torch.Tensor | int = _TOP,
    shares: Sequence[float] = _WHOLE,
) -> Codes:
    """Every number to the nearest that its group can hold."""
    wide, tops = _grouped(weight, group), _of_groups(tops)
    scales, zeros = _narrowed(wide, symmetric, tops, shares)
    return _assembled(_rounded(wide, scales, zeros, tops), scales, zeros, tops, weight)


def reason_of_words(words: torch.Tensor, scale: int = SCALE) -> Reason | None:
    """``None``, or why ``words`` are none: scales, the bits ``scale`` of them, that are not finite, zeros
    that kernels do not take."""
    if not bool((words & scale).view(torch.float32).isfinite().all()):
        return Reason("its words hold scales that are not finite")
    if scale == SCALE and bool((words & 128).any()):
        return Reason("its words hold zeros of 16 and more")
    return None


def half_quadratic(
    weight: torch.Tensor,
    group: int,
    tops: torch.Tensor | int = _TOP,
    shares: Sequence[float] = _WHOLE,
) -> Codes:
    """Zeros moved to where most errors are small."""
    wide, tops = _grouped(weight, group), _of_groups(tops)
    steps = 8 * (_TOP + 1) / (tops + 1)
    best = None
    for share in shares:
        scales, zeros = _ranges(wide * share, False, tops)
        codes = _rounded(wide, scales, zeros, tops)
        best = _better(wide, best, codes, scales, zeros)
        steepness = 10.0
        for _ in range(_TURNS):
            error = wide - (codes - zeros) * scales
            size = error.abs()
            # The proximal step; numbers that are met exactly stay so: 0 ** (power - 1) is infinite.
            kept = (size - size.pow(_POWER - 1) / steepness).clamp(min=0) * error.sign()
            zeros = (codes - (wide - kept) / scales).mean(-1, keepdim=True)
            zeros = (zeros * steps).round().clamp(0, 127) / steps
            codes = _rounded(wide, scales, zeros, tops)
            best = _better(wide, best, codes, scales, zeros)
            steepness *= 1.01
    assert best is not None
    return _assembled(*best[:3], tops, weight)


def error_feedback(
    weight: torch.Tensor,
    group: int,
    symmetric: bool,
    gram: torch.Tensor,
    tops: torch.Tensor | int = _TOP,
    shares: Sequence[float] = _WHOLE,
) -> Codes:
    """Columns in order, what each is off made good by the next; ``gram`` float32[K, K] is the mean of
    products of inputs. Raises ``QuantizationError`` if it is none."""
    n, k = weight.shape
    upper = _inverse_factor(gram.to(weight))
    left = weight.clone()
    codes = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    scales, zeros = (weight.new_empty((n, k // group)) for _ in range(2))
    wide_tops = torch.as_tensor(tops, device=weight.device).expand(n, k // group)
    for start in range(0, k, _BLOCK):
        stop = min(k, start + _BLOCK)
        block, factor = left[:, start:stop], upper[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            place = start + column
            if place % group == 0:
                top = wide_tops[:, place // group, None]
                scale, zero = _narrowed(block[:, column : column + group], symmetric, top, shares)
                scales[:, place // group], zeros[:, place // group] = scale[:, 0], zero[:, 0]
            given = block[:, column : column + 1]
            code = _rounded(given, scale, zero, top)
            codes[:, place] = code[:, 0].to(torch.uint8)
            error = (given - (code - zero) * scale) / factor[column, column]
            block[:, column:] -= error * factor[column, column:]
            errors[:, column] = error[:, 0]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return _assembled(_grouped(codes, group), scales[..., None], zeros[..., None], _of_groups(tops), weight)


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


def _of_groups(tops: torch.Tensor | int) -> torch.Tensor | int:
    """Beside groups of numbers [N, groups, group]."""
    return tops[..., None] if isinstance(tops, torch.Tensor) else tops


def _ranges(
    wide: torch.Tensor, symmetric: bool, tops: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of the last dimension, which stays with size 1."""
    largest = wide.abs().amax(-1, keepdim=True)
    if symmetric:
        # Half the codes and half a code: with two bits, one of four codes would not be used else.
        tops = torch.as_tensor(tops, device=wide.device)
        middle = torch.where(tops > 3, (tops + 1) / 2, 1.5).expand(largest.shape)
        steps = torch.where(tops > 3, middle - 1, 1.5)
        return _short(largest / steps, tops), middle
    low = wide.amin(-1, keepdim=True).clamp(max=0)
    high = wide.amax(-1, keepdim=True).clamp(min=0)
    scales = _short(high / tops - low / tops, tops)
    zeros = (-low / scales).round()
    return scales, torch.minimum(zeros, torch.as_tensor(tops, device=zeros.device)).clamp(min=0)


def _narrowed(
    wide: torch.Tensor, symmetric: bool, tops: torch.Tensor | int, shares: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of ``_ranges`` of that one of ``shares`` of the numbers with the least squared error."""
    best = None
    for share in shares:
        scales, zeros = _ranges(wide * share, symmetric, tops)
        best = _better(wide, best, _rounded(wide, scales, zeros, tops), scales, zeros)
    assert best is not None
    return best[1], best[2]


def _short(scales: torch.Tensor, tops: torch.Tensor | int) -> torch.Tensor:
    """As bfloat16 holds them, and those of codes of four bits; a group of zeros has scale 1."""
    times = (_TOP + 1) / (tops + 1)
    short = (scales / times).to(torch.bfloat16).float() * times
    return torch.where(short > 0, short, 1.0)


def _rounded(
    wide: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, tops: torch.Tensor | int
) -> torch.Tensor:
    codes = (wide / scales + zeros).round().clamp(min=0)
    return torch.minimum(codes, torch.as_tensor(tops, device=codes.device).to(codes))


_Best = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _better(
    wide: torch.Tensor, best: _Best | None, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> _Best:
    """Codes, scales, zeros and squared errors of groups: of each the better."""
    found = (wide - (codes - zeros) * scales).square().sum(-1, keepdim=True)
    if best is None:
        return codes, scales, zeros, found
    better = found < best[3]
    pairs = zip((codes, scales, zeros, found), best, strict=True)
    one, two, three, four = (torch.where(better, new, old) for new, old in pairs)
    return one, two, three, four


def _assembled(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    tops: torch.Tensor | int,
    weight: torch.Tensor,
) -> Codes:
    """As codes of four bits."""
    times = (_TOP + 1) / (tops + 1)
    return Codes(
        (codes * times).to(torch.uint8).view(weight.shape), (scales / times)[..., 0], (zeros * times)[..., 0]
    )


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
