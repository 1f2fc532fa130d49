"""The problem in two stages: up to the slot at which most is needed later, and from there on.

Of each operator it is only known whether it runs again before that slot, and whether after it. That leaves
few variables, so that a mixed-integer solver takes fractions of a second where slot by slot it takes seconds,
and yet its bound is close: most plans run again what they run once for all its readers, and the slot at
which most is needed is where a storage would have to be there twice. What it hands over is a plan
for the evaluator to judge; where that adds no more seconds than the bound, nothing is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from graphopt_passes.insert_checkpoints.exact.stages import Stages
from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["needed_bytes", "two_stages"]

_ROWS = 300
"""Slots, or operators of the forward, up to which bytes are counted at each: beyond, where most is alive."""

_PIECES = 48
"""Neighbourhoods of which one slot each is taken beyond that."""


def needed_bytes(model: StepModel) -> list[int]:
    """Bytes at each slot if everything that it and later ones read is held."""
    levels = []
    later: set[int] = set()
    held = model.output_bytes
    for slot in reversed(model.slots):
        fresh = {b for b in slot.reads if not model.free[b]} - later
        later |= fresh
        held += sum(model.size[b] for b in fresh)
        levels.append(held + slot.during)
    return levels[::-1]


def two_stages(model: StepModel, target: int) -> Stages:
    """Rows within ``target`` bytes above the static base; a relaxation, so that bounds hold."""
    levels = needed_bytes(model)
    border = max(range(len(levels)), key=levels.__getitem__, default=-1) + 1
    starts = [0, border] if 0 < border < len(levels) else [0]
    large = max(len(levels), len(model.operators)) > _ROWS
    return Stages(
        model,
        target,
        starts if levels else [],
        _highest(levels) if large else None,
        _highest(_kept_bytes(model)) if large else None,
    )


def _kept_bytes(model: StepModel) -> list[int]:
    """Bytes at each operator of the forward if everything is handed over."""
    total, levels = 0, []
    for i, outputs in enumerate(model.outputs):
        total += sum(model.size[b] for b in outputs)
        levels.append(total + model.workspace[i])
    return levels


def _highest(levels: Sequence[int]) -> frozenset[int]:
    """The highest position of each of a number of pieces of equal length."""
    count = len(levels)
    borders = [count * piece // _PIECES for piece in range(_PIECES + 1)]
    pieces = [range(a, b) for a, b in pairwise(borders) if b > a]
    return frozenset(max(piece, key=levels.__getitem__) for piece in pieces)
