"""What an allocator did in the stretches of a run, told apart by marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from graphopt import _torch
from graphopt.observed import Gap

__all__ = [
    "AllocatorStatistics",
    "CudaStatistics",
    "HostTimeline",
    "StatisticsTimeline",
    "Timeline",
    "timeline_of",
]


class Timeline(Protocol):
    """Bytes of each stretch of ``run()`` between calls of ``mark()``."""

    def record(self, run: Callable[[], object]) -> list[Gap]: ...

    def mark(self) -> None: ...


class HostTimeline:
    """Every allocation and release of the CPU allocator, as torch's profiler records them."""

    _MARK = "graphopt::position"

    def mark(self) -> None:
        _torch.mark(self._MARK)

    def record(self, run: Callable[[], object]) -> list[Gap]:
        stretches: list[list[int]] = [[]]
        for event in _torch.record_timeline(run, self._MARK):
            if event is None:
                stretches.append([])
            else:
                stretches[-1].append(event)
        found = []
        for stretch in stretches:
            held = peak = 0
            for event in stretch:
                held += event
                peak = max(peak, held)
            found.append(Gap(held, peak))
        return found


class AllocatorStatistics(Protocol):
    """Counters of an allocator, in bytes."""

    def allocated(self) -> int:
        """What is held now."""
        ...

    def peak(self) -> int:
        """The most that was held since ``reset_peak``."""
        ...

    def reset_peak(self) -> None: ...


class CudaStatistics:
    """The counters of torch's caching allocator on one device. Allocation happens in the order of the
    calls on the host, so nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class StatisticsTimeline:
    """Stretches by an allocator's own counters, read at the marks. Resets its peak."""

    def __init__(self, statistics: AllocatorStatistics) -> None:
        self.statistics = statistics
        self._found: list[Gap] = []
        self._start = 0

    def mark(self) -> None:
        now = self.statistics.allocated()
        self._found.append(Gap(now - self._start, self.statistics.peak() - self._start))
        self._start = now
        self.statistics.reset_peak()

    def record(self, run: Callable[[], object]) -> list[Gap]:
        self._found, self._start = [], self.statistics.allocated()
        self.statistics.reset_peak()
        run()
        self.mark()
        return self._found


def statistics_of(device: torch.device) -> AllocatorStatistics | None:
    """The counters of the allocator of ``device``; ``None`` where nothing is counted."""
    return CudaStatistics(device) if device.type == "cuda" else None


def timeline_of(device: torch.device) -> Timeline | None:
    """How to watch the memory of ``device``; ``None`` where it cannot be."""
    if statistics := statistics_of(device):
        return StatisticsTimeline(statistics)
    return None if device.type != "cpu" or _torch.profiler_running() else HostTimeline()
