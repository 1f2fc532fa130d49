"""Measure what a step really takes: the allocator's peak and the wall time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphopt import _torch

__all__ = ["Measurement", "allocator_peak", "measure", "synchronize"]


@dataclass(frozen=True)
class Measurement:
    """``peak_bytes`` of the whole step (static bytes included) and median ``seconds``."""

    peak_bytes: int
    seconds: float


def measure(
    step: Callable[[], object],
    *,
    device: torch.device,
    static_bytes: int,
    repeats: int = 3,
    before: Callable[[], object] = lambda: None,
) -> Measurement:
    """Peak and time of ``step()``, run once to warm up, once for the peak, then for the time.

    ``static_bytes`` is what is held before the step (parameters, buffers, inputs) and counts;
    whatever else the process holds does not. ``before`` runs untimed before each step (it resets
    gradients and random state).
    """
    before()
    step()
    before()
    peak = static_bytes + allocator_peak(step, device)
    seconds = []
    for _ in range(repeats):
        before()
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    before()
    return Measurement(peak, statistics.median(seconds))


def allocator_peak(step: Callable[[], object], device: torch.device) -> int:
    """Largest bytes that ``step()`` held at once in torch's allocator beyond what was held before.

    On CUDA the caching allocator's own statistics; on the CPU every allocation and release that
    torch records, in order.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Garbage of earlier steps that is collected during this one would count as released by it.
    gc.collect()
    running = peak = 0
    for event in _torch.record_allocations(step):
        running += event
        peak = max(peak, running)
    return peak


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
