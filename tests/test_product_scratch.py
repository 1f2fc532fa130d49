"""What a product of matrices takes beside its result on this CPU is measured, and counted in what is made of
products."""

from __future__ import annotations

import pytest
import torch

from graphopt import _torch, product_scratch
from graphopt.product_scratch import product_scratch as scratch


def taken(left: torch.Tensor, right: torch.Tensor) -> int:
    out = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype)
    running = peak = 0
    for event in _torch.record_allocations(lambda: torch.mm(left, right, out=out)):
        running += event
        peak = max(peak, running)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_is_what_the_product_takes(dtype: torch.dtype) -> None:
    for rows, inner, columns in ((64, 64, 64), (7, 33, 55), (125, 16, 3000), (1, 16, 300)):
        left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
        assert scratch((rows, inner), (inner, columns), dtype, turned="right") == taken(left, right.t())
        left, right = torch.ones(inner, rows, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
        assert scratch((rows, inner), (inner, columns), dtype, turned="left") == taken(left.t(), right)


def test_of_large_products_it_is_that_of_sums_where_the_library_makes_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(product_scratch, "_LARGEST", 1 << 10)
    dtype = torch.bfloat16
    has_sums = taken(torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype)) > 0
    for rows, columns in ((300, 500), (1000, 24)):
        found = scratch((rows, 32), (32, columns), dtype)
        assert found >= taken(torch.ones(rows, 32, dtype=dtype), torch.ones(32, columns, dtype=dtype))
        assert found == (4 * rows * columns + 512 if has_sums else 0)


def test_libraries_that_make_sums_are_told_by_a_small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_scratch, "_measured", lambda *key: 16_512)
    assert scratch((1 << 14, 64), (64, 1 << 14), torch.bfloat16) == 4 * (1 << 28) + 512
    assert scratch((1 << 14, 64), (64, 1 << 14), torch.float32) == 0
    assert scratch((64, 64), (64, 64), torch.bfloat16) == 16_512
    assert scratch((0, 64), (64, 64), torch.bfloat16) == 0


def test_while_a_profiler_runs_the_most_that_was_seen_is_counted() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert scratch((10, 3), (3, 20), torch.bfloat16) == 4 * 200 + 512
