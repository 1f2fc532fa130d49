"""Tandem repeats in a row of labels: where does a stretch repeat itself at once, and how often?

    a b c d e  c d e  c d e  x        ->  period 3, from 2 to 11

A repeat of period ``p`` is a stretch in which every label equals the one ``p`` further on. Candidate
periods are distances between a group of ``GRAM`` labels and its next occurrence: in a repeat whose
block holds one group that occurs once in the block, that distance is the period. After Main and
Lorentz, "An O(n log n) algorithm for finding all repetitions in a string" (1984), with hashing in
place of their recursion, as programs have few periods.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Repeat", "find_repeats"]

GRAM = 4
MAX_PERIODS = 256
"""Candidate periods that are looked at, those with most occurrences first."""
MULTIPLES = 4
"""Periods are looked at up to so many times their length: equal labels may be wired in turns."""


@dataclass(frozen=True)
class Repeat:
    """``labels[i] == labels[i + period]`` for every ``i`` from ``start`` up to ``stop - period``."""

    period: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many whole blocks fit."""
        return (self.stop - self.start) // self.period

    @property
    def saved(self) -> int:
        """Labels that need not be looked at again once one block is known."""
        return (self.count - 1) * self.period

    def clipped(self, start: int, stop: int) -> Repeat:
        return Repeat(self.period, max(self.start, start), min(self.stop, stop))


def find_repeats(labels: Sequence[int], *, least: int) -> list[Repeat]:
    """Maximal repeats whose blocks hold at least ``least`` labels, those that save most first.

    Blocks of a shorter period are taken several at a time.
    """
    row = np.asarray(labels, dtype=np.int64)
    found = []
    for period in _periods(row, least):
        equal = np.concatenate(([0], row[:-period] == row[period:], [0])).astype(np.int8)
        steps = np.diff(equal)
        starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        long_enough = stops - starts >= period
        for start, stop in zip(starts[long_enough], stops[long_enough], strict=True):
            found.append(Repeat(period, int(start), int(stop) + period))
    return sorted(found, key=lambda r: (-r.saved, r.period, r.start))


def _periods(row: np.ndarray, least: int) -> list[int]:
    if len(row) <= GRAM:
        return []
    latest: dict[bytes, int] = {}
    distances: Counter[int] = Counter()
    for i in range(len(row) - GRAM + 1):
        gram = row[i : i + GRAM].tobytes()
        if gram in latest:
            distance = i - latest[gram]
            distances[distance * math.ceil(least / distance)] += 1
        latest[gram] = i
    shortest = [period for period, _ in distances.most_common(MAX_PERIODS)]
    multiples = {times * period: None for times in range(1, MULTIPLES + 1) for period in shortest}
    return [period for period in multiples if 2 * period <= len(row)]
