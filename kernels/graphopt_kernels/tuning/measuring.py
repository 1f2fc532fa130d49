"""How long launches take on a GPU: replayed from CUDA graphs, in turns, on operands that no cache holds."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt_kernels.tuning.checking import copied

__all__ = ["TURNS", "cold_copies", "seconds_of"]

TURNS = 9
"""Replays of each configuration, of which the median counts."""

_REPLAY_SECONDS = 5e-4
_MOST_LAUNCHES = 50
_MOST_COPIES = 16


def cold_copies(operands: tuple[Any, ...], device: torch.device) -> list[tuple[Any, ...]]:
    """``operands`` and copies of them that together are more than twice the level-2 cache, up to 16."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(x.untyped_storage().nbytes() for x in operands if isinstance(x, torch.Tensor))
    sets = max(1, min(_MOST_COPIES, -(-2 * cache // max(size, 1))))
    return [operands, *(copied(operands) for _ in range(sets - 1))]


def seconds_of(
    runs: Sequence[Callable[[tuple[Any, ...]], object]],
    copies: Sequence[tuple[Any, ...]],
    device: torch.device,
) -> list[float]:
    """Median seconds of a call of each of ``runs`` with operands out of ``copies``, in turn.

    Every run has been called before: nothing is compiled here. Runs take turns, so that a clock that changes
    changes all of them. Host time does not count: what is timed is the replay of a graph of several calls.
    """
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()
        launches = _launches(runs[0], copies)
        graphs = [_graph(run, copies, launches, pool) for run in runs]
        taken: list[list[float]] = [[] for _ in runs]
        for turn in range(TURNS + 1):
            for number, graph in enumerate(graphs):
                # The first replay keeps the GPU busy while the host gets the timed one ready.
                graph.replay()
                seconds = _timed(graph.replay) / launches
                if turn:
                    taken[number].append(seconds)
    return [statistics.median(times) for times in taken]


def _launches(run: Callable[[tuple[Any, ...]], object], copies: Sequence[tuple[Any, ...]]) -> int:
    """How many calls a replay of about half a millisecond has."""

    def several() -> None:
        for operands in copies:
            run(operands)

    several()
    once = _timed(several) / len(copies)
    return max(len(copies), 3, min(_MOST_LAUNCHES, round(_REPLAY_SECONDS / once)))


def _graph(
    run: Callable[[tuple[Any, ...]], object],
    copies: Sequence[tuple[Any, ...]],
    launches: int,
    pool: Any,
) -> torch.cuda.CUDAGraph:
    # Not `torch.cuda.graph`: it collects garbage and empties the allocator's cache each time.
    graph = torch.cuda.CUDAGraph()
    # Results are held as long as their operands are new: their memory is then none that was just written.
    held: deque[object] = deque(maxlen=len(copies))
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin(pool=pool)
        try:
            for number in range(launches):
                held.append(run(copies[number % len(copies)]))
            held.clear()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph


def _timed(run: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return max(float(start.elapsed_time(end)) / 1e3, 1e-9)
