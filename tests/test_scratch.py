"""What library calls take beside what they return."""

from __future__ import annotations

import pytest
import torch

from graphopt import _torch
from graphopt.emit import scratch
from graphopt.emit.scratch import scratch_bytes
from graphopt.operator_scratch import state_scratch
from graphopt.plugins import default_host

CONVOLUTION = torch.ops.aten.convolution.default


def test_a_convolution_is_watched_once_for_what_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, ...]] = []

    def taken(op: object, args: list[object]) -> int:
        (image, *_) = args
        assert isinstance(image, torch.Tensor) and not _torch.is_fake(image)
        assert image.is_contiguous(memory_format=torch.channels_last)
        tried.append(tuple(image.shape))
        return 4096

    monkeypatch.setattr(scratch, "_taken", taken)
    monkeypatch.setattr(scratch, "_watched_before", {})
    with _torch.fake_mode():
        for size in (8, 8, 16):
            image = torch.empty(2, 3, size, size).to(memory_format=torch.channels_last)
            args = (image, torch.empty(4, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
            assert scratch.watched_bytes(CONVOLUTION, args) == 4096
            assert scratch.scratch_bytes(CONVOLUTION, args) == 0
    assert tried == [(2, 3, 8, 8), (2, 3, 16, 16)]


def test_updates_take_a_table_of_their_tensors() -> None:
    default_host().kernels()
    with torch._subclasses.FakeTensorMode():
        lists = [[torch.empty(size, device="cuda") for size in (5, 40000)] for _ in range(4)]
        assert scratch_bytes(torch.ops.graphopt.adam_update.default, [*lists, [], [], []]) == 6 * 16 + 4 * 4
        assert scratch_bytes(torch.ops.graphopt.sgd_update.default, [[], [], [], [], [], [], False]) == 0


def test_what_does_not_fit_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[object] = []

    def full(op: object, args: list[object]) -> int:
        tries.append(op)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(scratch, "_taken", full)
    monkeypatch.setattr(scratch, "_watched_before", {})
    args = (torch.empty(2, 3, 8, 8), torch.empty(4, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    assert [scratch.watched_bytes(CONVOLUTION, args) for _ in range(2)] == [0, 0]
    assert len(tries) == 1


@pytest.mark.gpu
def test_what_cudnn_takes_is_what_the_allocator_saw() -> None:
    image = torch.randn(32, 256, 56, 56, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(64, 256, 3, 3, device="cuda", dtype=torch.bfloat16)
    args = (image, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    expected = scratch.scratch_bytes(CONVOLUTION, args)
    CONVOLUTION(*args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = CONVOLUTION(*args)
    assert torch.cuda.max_memory_allocated() - before == result.untyped_storage().nbytes() + expected


def test_operators_say_what_they_take_themselves() -> None:
    with torch.library._scoped_library("graphopt_test_scratch", "DEF") as library:
        library.define("twice(Tensor x, int times) -> Tensor")
        op = torch.ops.graphopt_test_scratch.twice.default
        x = torch.empty(3, 4, device="meta")
        assert scratch_bytes(op, (x, 5)) == 0
        state_scratch("graphopt_test_scratch::twice", lambda x, times: times * int(x.numel()))
        assert scratch_bytes(op, (x, 5)) == 60


def test_sums_in_parts_fill_the_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt_kernels.quantized import scratch as packed
    from graphopt_kernels.quantized.byte_launch import Problem, launch_for
    from graphopt_kernels.quantized.group_launch import GroupProblem
    from graphopt_kernels.quantized.group_launch import launch_for as launch_of_groups

    default_host().scheme("int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x = torch.empty(16, 4096, dtype=torch.bfloat16, device="meta")
    codes, found = torch.empty(4096, 4096, dtype=torch.int8, device="meta"), []
    for processors in (20, 132, 264):
        monkeypatch.setattr(packed, "processors_of", lambda device, count=processors: count)
        found.append(scratch_bytes(torch.ops.graphopt.linear_int8.default, (OnGpu(x), codes, None, None)))
        problem = Problem(16, 4096, 4096, torch.bfloat16, torch.int8)
        launch = launch_for(problem, processors)
        assert launch.kind == "library" or (launch.parts > 1) * launch.parts * 4 * 16 * 4096 <= found[-1]
    assert found == [0, 2 * 4 * 16 * 4096, 3 * 4 * 16 * 4096]
    groups = GroupProblem(8, 1024, 14336, torch.bfloat16, 128, 64, False)
    few, many = (launch_of_groups(groups, processors) for processors in (20, 264))
    assert few.kind == many.kind == "slices" and few.parts < many.parts


class OnGpu:
    """A tensor without memory that says that it is on a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.device = tensor, torch.device("cuda", 0)

    def __getattr__(self, name: str) -> object:
        return getattr(self.tensor, name)
