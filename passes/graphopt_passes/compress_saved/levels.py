"""The best piecewise-constant approximation of a derivative, for a given number of pieces.

Thresholds and levels minimise the squared error, uniform over the interval on which the derivative is
not yet one of its limits; dynamic programming over a fine grid finds the optimum of that grid (Novikov et
al. 2023, "Few-Bit Backward: Quantized Gradients of Activation Functions for Memory Footprint Reduction").
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from graphopt import _torch

__all__ = ["Levels", "best_levels", "levels_of"]

Array = npt.NDArray[np.float64]

_GRID = 1024
_WIDEST = 16.0
_SETTLED = 1e-3
"""Where a derivative is that close to its limit, it counts as the limit."""


@dataclass(frozen=True)
class Levels:
    """``levels[k]`` stands for the derivative between ``thresholds[k - 1]`` and ``thresholds[k]``.

    ``error``: the most that a level is off the derivative; ``mean_square``: the mean of its square over
    the interval approximated.
    """

    thresholds: tuple[float, ...]
    levels: tuple[float, ...]
    error: float
    mean_square: float


def best_levels(derivative: Callable[[Array], Array], low: float, high: float, pieces: int) -> Levels:
    """The best ``pieces`` constants for a function on an interval.

    Off the interval the function has to stay close to its values at the borders.
    """
    edges = np.linspace(low, high, _GRID + 1)
    values = derivative((edges[1:] + edges[:-1]) / 2)
    pieces = min(pieces, _GRID)
    sums, squares = (np.concatenate(([0.0], np.cumsum(part))) for part in (values, values**2))
    begin, end = np.arange(_GRID + 1)[:, None], np.arange(_GRID + 1)[None, :]
    count = np.maximum(end - begin, 1)
    cost = squares[None, :] - squares[:, None] - (sums[None, :] - sums[:, None]) ** 2 / count
    cost = np.where(end > begin, np.maximum(cost, 0.0), np.inf)
    best, cuts = cost[0], []
    for _ in range(pieces - 1):
        total = best[:, None] + cost
        cuts.append(total.argmin(0))
        best = total.min(0)
    borders = [_GRID]
    for cut in reversed(cuts):
        borders.append(int(cut[borders[-1]]))
    borders = [0, *reversed(borders)]
    parts = list(itertools.pairwise(borders))
    levels = [(sums[b] - sums[a]) / (b - a) for a, b in parts]
    off = [np.abs(values[a:b] - level).max() for (a, b), level in zip(parts, levels, strict=True)]
    return Levels(
        tuple(float(edges[b]) for b in borders[1:-1]),
        tuple(map(float, levels)),
        float(max(off)),
        float(best[_GRID] / _GRID),
    )


@functools.cache
def levels_of(
    operator: Callable[..., torch.Tensor],
    rest: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
    bits: int,
) -> Levels:
    """Levels for ``operator(grad, x, *rest, **named)``, an elementwise backward, in ``2**bits`` pieces.

    The derivative is what the operator makes of a gradient of one. It is approximated where it differs
    from its limits, 16 to either side of zero at most.
    """

    def derivative(x: Array) -> Array:
        # Passes run while a program is traced.
        with _torch.without_modes():
            at = torch.from_numpy(np.ascontiguousarray(x))
            made: Array = operator(torch.ones_like(at), at, *rest, **dict(named)).numpy()
        return made

    grid = np.linspace(-_WIDEST, _WIDEST, 8 * _GRID)
    values = derivative(grid)
    left = np.flatnonzero(np.abs(values - values[0]) > _SETTLED)
    right = np.flatnonzero(np.abs(values - values[-1]) > _SETTLED)
    low = grid[left[0]] if len(left) else -1.0
    high = grid[right[-1]] if len(right) else 1.0
    return best_levels(derivative, float(low), float(high), 2**bits)
