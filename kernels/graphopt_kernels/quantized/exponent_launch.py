"""How a product that reads exponents of four bits is started, by its sizes.

As ``byte_launch``: a launch for each kernel is predicted to be as slow as its slowest resource, and the
fastest is taken. ``library`` unpacks the weight and multiplies it as a dense one. ``Launch.inner`` counts
bytes of exponents, two products each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.quantized.byte_launch import (
    LIBRARY,
    PROCESSORS,
    Launch,
    Problem,
    dense_seconds,
    in_parts,
    kernel_seconds,
)
from graphopt_kernels.quantized.byte_launch import (
    check_launch as check_of_bytes,
)

__all__ = ["Exponents", "check_launch", "launch_for", "launches", "predicted_seconds", "usual_launch"]

_COPY = 4.28e12
_TENSOR = 790e12
_LAUNCH = 2e-6

_SLOTS = 3.0
"""Instructions that make a weight: three, for two weights each (``exponents_triton``), and its base."""


class Exponents(NamedTuple):
    """bfloat16 x [``rows``, ``inner``] times a weight [``columns``, ``inner``]; a row holds its exponents in
    ``half`` bytes."""

    rows: int
    columns: int
    inner: int
    half: int

    @property
    def steps(self) -> Problem:
        """The same, in bytes of exponents."""
        return Problem(self.rows, self.columns, self.half, torch.bfloat16, torch.uint8)


def launch_for(problem: Exponents, processors: int) -> Launch:
    """The launch that is predicted to be fastest."""
    return min(
        launches(problem, processors), key=lambda launch: predicted_seconds(problem, launch, processors)
    )


def usual_launch(problem: Exponents) -> Launch:
    """``launch_for`` an H100 or H200."""
    return launch_for(problem, PROCESSORS)


def check_launch(problem: Exponents, launch: Launch) -> Reason | None:
    """``None``, or why ``launch`` would not compute ``problem``."""
    if launch.kind == "row":
        return Reason("there is no kernel 'row'")
    return check_of_bytes(problem.steps, launch)


def launches(problem: Exponents, processors: int) -> list[Launch]:
    """All that are weighed."""
    found = [
        launch
        for whole in _launches(problem)
        for launch in (whole, in_parts(problem.steps, whole, processors))
    ]
    return list(dict.fromkeys(found))


def _launches(problem: Exponents) -> Iterator[Launch]:
    yield LIBRARY
    high = max(8, 1 << (problem.rows - 1).bit_length())
    if problem.inner % 16 and problem.rows > 16:
        return  # bytes that do not begin on 16 are loaded one by one
    if high <= 32:
        for wide in (16, 32) if high == 8 else (16,):
            yield Launch("slices", high, wide, 64 if high <= 16 else 32, 4, 1, 4, 3)
    yield Launch("tiles", 64, 64, 64, 1, 1, 4, 3)
    yield Launch("tiles", 64, 128, 64, 1, 1, 8, 3)
    yield Launch("tiles", 128, 128, 32, 1, 1, 8, 3)


def predicted_seconds(problem: Exponents, launch: Launch, processors: int) -> float:
    """Seconds of ``problem``."""
    rows, columns, inner, half = problem
    stored = columns * (inner + half)
    # Bytes that are loaded one by one need an address each.
    unaligned = 0.0 if inner % 16 == 0 else 6.0 * columns * inner
    if launch.kind == "library":
        written = 2 * columns * inner
        return (stored + written) / _COPY + dense_seconds(problem.steps._replace(inner=inner)) + _LAUNCH
    across = -(-rows // launch.rows)
    moved = stored + 2 * rows * (inner + columns)
    # Bytes come from shared memory two at a time where warp groups take them from registers.
    each = _SLOTS + (5 if launch.kind == "tiles" else 1 + launch.rows * (0.03 + 0.8 / launch.columns))
    slots = across * (columns * inner * each + unaligned)
    multiplying = 2 * across * launch.rows * columns * inner / _TENSOR
    return kernel_seconds(problem.steps, launch, moved, slots, multiplying, processors, each=3, many=2.2)
