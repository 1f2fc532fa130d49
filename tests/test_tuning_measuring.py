"""How launches are timed, on a GPU that is made up: a clock that runs as its graphs do."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphopt_kernels.tuning import measuring
from graphopt_kernels.tuning.measuring import TURNS, cold_copies, seconds_of

CUDA = torch.device("cuda", 0)


class Gpu:
    """``clock`` in seconds; what runs while a graph is captured takes its time at each replay."""

    def __init__(self) -> None:
        self.clock, self.recorded, self.replayed = 0.0, None, []  # type: ignore[var-annotated]
        self.noise = 0.0

    def takes(self, seconds: float) -> None:
        if self.recorded is not None:
            self.recorded.append(seconds)
        else:
            self.clock += seconds


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = made.clock

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

    class Graph:
        def capture_begin(self, pool: Any) -> None:
            assert pool == "pool"
            made.recorded = []

        def capture_end(self) -> None:
            self.seconds, made.recorded = made.recorded, None

        def replay(self) -> None:
            made.replayed.append(self)
            slow = made.noise if len(made.replayed) % 5 == 0 else 0.0
            made.clock += sum(self.seconds) + slow

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return made


def test_each_run_is_timed_by_the_call_and_an_odd_replay_does_not_count(gpu: Gpu) -> None:
    gpu.noise = 1.0
    given: list[int] = []

    def run(seconds: float) -> Any:
        def call(operands: tuple[int]) -> None:
            given.append(operands[0])
            gpu.takes(seconds)

        return call

    times = seconds_of([run(1e-5), run(3e-5)], [(0,), (1,), (2,)], CUDA)
    assert times == pytest.approx([1e-5, 3e-5])
    # Runs take turns, each replay behind one that is not timed.
    first, second = gpu.replayed[0], gpu.replayed[2]
    assert gpu.replayed == [first, first, second, second] * (TURNS + 1)
    # 50 launches of 10 us are half a millisecond; copies are used in turn.
    assert len(first.seconds) == len(second.seconds) == 50
    assert given[:3] == [0, 1, 2] and given[3:53] == [number % 3 for number in range(50)]


def test_slow_runs_are_launched_a_few_times(gpu: Gpu) -> None:
    seconds_of([lambda operands: gpu.takes(0.1)], [()], CUDA)
    assert len(gpu.replayed[0].seconds) == 3


def test_results_live_as_long_as_their_operands_are_new(gpu: Gpu) -> None:
    alive: set[int] = set()
    most: list[int] = []

    class Result:
        def __init__(self) -> None:
            alive.add(id(self))
            most.append(len(alive))
            gpu.takes(1e-4)

        def __del__(self) -> None:
            alive.discard(id(self))

    seconds_of([lambda operands: Result()], [(), ()], CUDA)
    # Two copies: two results are held while a third is made.
    assert max(most) == 3 and not alive


def test_a_run_that_fails_ends_the_capture(gpu: Gpu) -> None:
    def fail(operands: tuple[Any, ...]) -> None:
        if gpu.recorded is not None:
            raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while capturing"):
        seconds_of([fail], [()], CUDA)
    assert gpu.recorded is None


@pytest.mark.parametrize(("elements", "sets"), [(1000, 1), (100, 5), (1, 16)])
def test_operands_are_copied_until_no_cache_holds_them(gpu: Gpu, elements: int, sets: int) -> None:
    given = (torch.arange(float(elements)), None, 3)
    copies = cold_copies(given, CUDA)
    assert len(copies) == sets == len({copy[0].data_ptr() for copy in copies})
    assert all(torch.equal(copy[0], given[0]) and copy[1:] == given[1:] for copy in copies)
    assert measuring.cold_copies((3,), CUDA)[0] == (3,)
