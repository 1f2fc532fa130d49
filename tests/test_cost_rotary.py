"""What rotary embeddings cost: heads once in and once out, tables, memory beside the outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt_kernels.rotary_cache as module
from graphopt import _torch
from graphopt.emit.scratch import scratch_bytes
from graphopt_cost_model.flops import flops
from graphopt_cost_model.traffic import Traffic, traffic
from tests.cost_graphs import call_node

assert module.__all__, "importing it registers the operators"
ops = torch.ops.graphopt
FORWARD, BACKWARD = ops.rotary.default, ops.rotary_backward.default
HEADS, SIZE, ROWS = [1, 4, 2, 2], 16, 2 * 5
TABLES = 2 * 5 * SIZE * 2
HEAD = ROWS * SIZE * 2
"""Bytes of one head at all positions."""


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def node_of(op: Any, *, norm: bool = False, copies: bool = True, missing: bool = False) -> Any:
    packed = tensor(2, 5, 10 * SIZE)[..., SIZE:-SIZE].unflatten(-1, (8, SIZE))
    tables = (tensor(5, SIZE), tensor(5, SIZE))
    weights = (tensor(SIZE), tensor(SIZE)) if norm else (None, None)
    settings = (HEADS, SIZE, False, 1e-6 if norm else None, 0.0)
    parts = [tensor(2, 5, n, SIZE) for n in (4, 2, 2 if copies else 0)]
    if op is FORWARD:
        args = (packed, *tables, *weights, *settings, copies, torch.bfloat16)
        return call_node(op, args, tuple(parts))
    args = (
        *parts[:2], None if missing else parts[2], packed if norm else None, *tables, *weights, *settings,
        torch.bfloat16, [True, norm, norm],
    )  # fmt: skip
    outputs = (tensor(2, 5, 8, SIZE), *(tensor(SIZE if norm else 0) for _ in range(2)))
    return call_node(op, args, outputs)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (node_of(FORWARD), Traffic(8 * HEAD + TABLES, 8 * HEAD)),
        (node_of(FORWARD, copies=False), Traffic(6 * HEAD + TABLES, 6 * HEAD)),
        (node_of(FORWARD, norm=True), Traffic(8 * HEAD + TABLES + 4 * SIZE, 8 * HEAD)),
        (node_of(BACKWARD), Traffic(8 * HEAD + TABLES, 8 * HEAD)),
        (node_of(BACKWARD, missing=True), Traffic(6 * HEAD + TABLES, 8 * HEAD)),
        (node_of(BACKWARD, norm=True), Traffic(14 * HEAD + TABLES + 4 * SIZE, 8 * HEAD + 4 * SIZE)),
    ],
)
def test_heads_are_moved_once_each_way(node: Any, expected: Traffic) -> None:
    assert traffic(node) == expected
    assert flops(node) == 0


def test_of_a_cache_the_places_of_the_positions_are_written() -> None:
    caches = [tensor(2, 2, 100, SIZE) for _ in range(2)]
    at = tensor(5, dtype=torch.int64)
    args = (tensor(2, 5, 8, SIZE), *caches, at, tensor(5, SIZE), tensor(5, SIZE), None, None, HEADS, SIZE)
    node = call_node(ops.rotary_to_cache.default, (*args, False, None, 0.0), tensor(2, 5, 4, SIZE))
    assert traffic(node) == Traffic(8 * HEAD + TABLES + 5 * 8, 8 * HEAD)


def test_sums_for_weights_are_counted_on_a_gpu_alone() -> None:
    with _torch.fake_mode():
        on = {device: torch.empty(2, 5, 8, SIZE, device=device) for device in ("cpu", "cuda")}
        tables = {device: torch.empty(5, SIZE, device=device) for device in on}

        def taken(device: str, eps: float | None, mask: list[bool]) -> int:
            x, table = on[device], tables[device]
            settings = (HEADS, SIZE, False, eps, 0.0, torch.float32, mask)
            return scratch_bytes(BACKWARD, (x, None, None, x, table, table, None, None, *settings))

        assert taken("cuda", 1e-6, [True, True, True]) >= 5 * SIZE * 4
        assert taken("cuda", 1e-6, [True, False, False]) == 0
        assert taken("cuda", None, [True, False, False]) == 0
        assert taken("cpu", 1e-6, [True, True, True]) == 0
