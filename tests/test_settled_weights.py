"""Which weights kernels may read before the kernel ahead of them has ended."""

from __future__ import annotations

import gc

import pytest
import torch

from graphopt import _torch
from graphopt_kernels.quantized import settled as module
from graphopt_kernels.quantized.byte_launch import Launch, Problem
from graphopt_kernels.quantized.byte_products import launch_product
from graphopt_kernels.quantized.int8 import Int8
from graphopt_kernels.quantized.settled import reads_early, settled


def test_the_first_kernel_to_read_a_weight_waits() -> None:
    weight = torch.zeros(8, dtype=torch.int8)
    assert [settled(weight), settled(weight), settled(weight[2:])] == [False, True, True]


def test_what_was_written_since_is_waited_for() -> None:
    weight = torch.zeros(8, dtype=torch.int8)
    settled(weight)
    weight[1:3].fill_(7)
    assert [settled(weight), settled(weight)] == [False, True]
    weight.data = torch.ones(8, dtype=torch.int8)
    assert not settled(weight), "it is another memory"


def test_kernels_that_are_recorded_do_not_count_as_started() -> None:
    weight = torch.zeros(8, dtype=torch.int8)
    assert [settled(weight, runs=False), settled(weight, runs=False)] == [False, False]
    assert [settled(weight), settled(weight, runs=False)] == [False, True]


def test_memory_that_is_given_again_is_not_taken_for_the_weight_that_was_there() -> None:
    for _ in range(50):
        weight = torch.zeros(4096, dtype=torch.int8)
        assert not settled(weight)
        del weight


def test_what_is_gone_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 4)
    monkeypatch.setattr(module, "_seen", {})
    kept = [torch.zeros(1, dtype=torch.int8) for _ in range(3)]
    for weight in kept:
        settled(weight)
    for _ in range(10):
        settled(torch.zeros(1, dtype=torch.int8))
    gc.collect()
    assert len(module._seen) <= 4
    assert all(map(settled, kept))
    more = [torch.zeros(1, dtype=torch.int8) for _ in range(4)]
    for weight in more:
        settled(weight)
    assert not settled(more[-1]), "there is no room for it: its kernels wait"


def test_tensors_whose_writes_are_not_counted_are_waited_for() -> None:
    with torch.inference_mode():
        weight = torch.zeros(8, dtype=torch.int8)
    assert _torch.writes(weight) is None
    assert not settled(weight) and not settled(weight)


def test_writes_are_counted_for_all_views() -> None:
    weight = torch.zeros(8)
    before = _torch.writes(weight)
    weight[:2].add_(1)
    assert before is not None and _torch.writes(weight) == before + 1


def test_a_cpu_has_no_early_kernels() -> None:
    weight = torch.zeros(8, dtype=torch.int8)
    assert not reads_early(weight) and not reads_early(weight)


@pytest.mark.gpu
def test_on_a_gpu_products_read_what_the_kernel_ahead_of_them_has_written() -> None:
    """Of the weight, written over in place, and of x, the result of the product before."""
    from graphopt_kernels.quantized import bytes_triton

    n = 4096
    dense = torch.randn(n, n, device="cuda") / 64
    packed = [list(Int8().pack(dense * factor, {}).values()) for factor in (1.0, -1.0)]
    (codes, scales), (others, _) = packed
    kept = codes.clone()
    problem = Problem(1, n, n, torch.bfloat16, torch.int8)
    launch = Launch("row", 1, 16, 2048, 1, 1, 8, 1)
    x = torch.randn(1, n, device="cuda").to(torch.bfloat16)

    def product(given: torch.Tensor) -> torch.Tensor:
        return launch_product(bytes_triton, problem, launch, given, codes, scales, None, None)

    exact = x.double() @ (kept.double() * scales[:, None]).t()
    for turn in range(20):
        codes.copy_(others if turn % 2 else kept)
        for _ in range(3):
            found = product(x)
        sign = -1 if turn % 2 else 1
        assert float((found.double() - sign * exact).norm() / exact.norm()) < 3e-3, turn
    chain = x
    for _ in range(40):
        chain = product(chain)
    torch.cuda.synchronize()
    slow = x
    for _ in range(40):
        slow = product(slow)
        torch.cuda.synchronize()
    assert torch.equal(chain, slow)
