"""CUDA graphs of work that is queued: what ``graphopt.recording`` replays.

A graph holds the kernels that a function queued, with the addresses that they read and write. Memory that the
function takes comes from a pool of its own, which stays the graph's
(https://docs.pytorch.org/docs/stable/notes/cuda.html).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["CudaGraphs", "Graphs", "Replayable"]


class Replayable(Protocol):
    """Work that was recorded."""

    def replay(self) -> None: ...


class Graphs(Protocol):
    """Records work of one step; what is recorded later may use memory that earlier work has given back."""

    def record(self, work: Callable[[], Any]) -> tuple[Replayable, Any]:
        """What ``work`` queues, unrun, and what it returns. Raises whatever makes that impossible."""
        ...

    def watch(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        """What ``work`` returns, and, to be asked later, the host's share of the time that it took: 1 where
        the device waits for what the host queues, less where the host is ahead."""
        ...

    def pool_bytes(self) -> int:
        """Memory that the recorded work keeps."""
        ...

    def release(self) -> None:
        """Give the device back what recorded work kept that nobody holds any more."""
        ...

    def free_bytes(self) -> int:
        """Memory of the device that nobody holds."""
        ...


class CudaGraphs:
    """Graphs of one device that share a pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, work: Callable[[], Any]) -> tuple[Replayable, Any]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # What earlier steps have given back would otherwise stay beside the pool.
        torch.cuda.empty_cache()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # Other threads, such as those that load data, may go on with what they do.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                made = work()
            finally:
                graph.capture_end()
        return graph, made

    def watch(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)
        begun = time.perf_counter()
        made = work()
        host = time.perf_counter() - begun
        end.record(stream)

        def share() -> float:
            end.synchronize()
            return min(1.0, 1e3 * host / max(float(start.elapsed_time(end)), 1e-3))

        return made, share

    def pool_bytes(self) -> int:
        if self._pool is None:
            return 0
        segments = torch.cuda.memory_snapshot(self._pool)  # type: ignore[no-untyped-call]
        return sum(int(segment["total_size"]) for segment in segments)

    def release(self) -> None:
        # The pool of a graph that is gone stays with the allocator otherwise, beside what the steps take.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(free) + cached
