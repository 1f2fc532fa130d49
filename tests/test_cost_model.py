"""The roofline model: which resource binds, what is free, and how fast it answers."""

from __future__ import annotations

import time

import pytest
import torch

from graphopt.device import DeviceSpec
from graphopt_cost_model.roofline import RooflineCostModel
from tests.cost_graphs import call_node, call_nodes, only, traced

aten = torch.ops.aten

DEVICE = DeviceSpec(
    name="paper",
    kind="cuda",
    memory_bytes=1 << 30,
    copy_bytes_per_second=100.0,
    read_bytes_per_second=200.0,
    matmul_flops={"float32": 1000.0, "bfloat16": 8000.0},
    vector_flops={"float32": 10.0},
    launch_seconds=0.5,
    host_link_bytes_per_second=1.0,
)


def seconds(function, *inputs, device=DEVICE, op):
    return RooflineCostModel(device).node(only(traced(function, *inputs), op)).seconds


def wide(**changes):
    """A device on which only the changed figures bind."""
    fast = {"float32": 1e30}
    figures = {
        "copy_bytes_per_second": 1e30,
        "read_bytes_per_second": 1e30,
        "matmul_flops": fast,
        "vector_flops": fast,
        "launch_seconds": 0.0,
    }
    fixed = {"name": "wide", "kind": "cuda", "memory_bytes": 1, "host_link_bytes_per_second": 1.0}
    return DeviceSpec(**(fixed | figures | changes))


def test_a_copy_moves_at_copy_bandwidth_and_a_read_faster():
    device = wide(copy_bytes_per_second=100.0, read_bytes_per_second=200.0)
    assert seconds(torch.neg, torch.ones(100), device=device, op=aten.neg) == pytest.approx(8.0)
    both = seconds(torch.add, torch.ones(100), torch.ones(100), device=device, op=aten.add)
    assert both == pytest.approx(8.0 + 400 / 200)
    assert seconds(torch.zeros_like, torch.ones(100), device=device, op=aten.zeros_like) == pytest.approx(4.0)


def test_a_product_runs_at_the_rate_of_its_dtype():
    device = wide(matmul_flops={"float32": 1000.0, "bfloat16": 8000.0})
    left = torch.ones(10, 10)
    assert seconds(torch.mm, left, left, device=device, op=aten.mm) == pytest.approx(2.0)
    low = left.bfloat16()
    assert seconds(torch.mm, low, low, device=device, op=aten.mm) == pytest.approx(0.25)
    double = left.double()
    assert seconds(torch.mm, double, double, device=device, op=aten.mm) == pytest.approx(2.0)


def test_float32_products_use_tensor_cores_only_where_torch_may():
    device = wide(matmul_flops={"float32": 1000.0, "tfloat32": 4000.0})
    left = torch.ones(10, 10)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert seconds(torch.mm, left, left, device=device, op=aten.mm) == pytest.approx(2.0)
        torch.set_float32_matmul_precision("high")
        assert seconds(torch.mm, left, left, device=device, op=aten.mm) == pytest.approx(0.5)
    finally:
        torch.set_float32_matmul_precision(before)


def test_elements_bound_a_pointwise_operator_from_below():
    device = wide(vector_flops={"float32": 10.0})
    assert seconds(torch.neg, torch.ones(100), device=device, op=aten.neg) == pytest.approx(10.0)
    assert seconds(torch.sum, torch.ones(100), device=device, op=aten.sum) == pytest.approx(10.0)


def test_each_kernel_pays_its_launch_and_a_view_pays_nothing():
    device = wide(launch_seconds=0.5)
    assert seconds(torch.neg, torch.ones(3), device=device, op=aten.neg) == pytest.approx(0.5)
    model = RooflineCostModel(DEVICE)
    graph = traced(lambda x: x.view(2, 4).t().split(1, 1)[0], torch.ones(8))
    for node in graph.nodes:
        cost = model.node(node)
        assert (cost.flops, cost.bytes_read, cost.bytes_written, cost.seconds) == (0, 0, 0, 0.0), node


def test_workspaces_are_measured_on_the_cpu_alone():
    node = only(traced(lambda x: x.t().softmax(-1), torch.ones(8, 16)), aten._softmax)
    assert RooflineCostModel(wide(kind="cpu")).node(node).workspace_bytes == 512
    assert RooflineCostModel(wide()).node(node).workspace_bytes == 0
    assert RooflineCostModel(wide(kind="cpu"), workspaces=False).node(node).workspace_bytes == 0


def test_the_model_lists_what_it_could_not_probe():
    model = RooflineCostModel(wide(kind="cpu"))
    model.node(call_node(aten.cholesky.default, (torch.ones(3, 4),), torch.ones(3, 4)))
    assert list(model.unprobed) == ["aten.cholesky.default"]


def test_thousands_of_nodes_are_priced_within_a_second():
    def deep(x, w):
        for _ in range(100):
            x = torch.softmax((x @ w).relu(), -1) + x
        return x

    nodes = call_nodes(traced(deep, torch.ones(8, 8), torch.ones(8, 8)))
    model = RooflineCostModel(DEVICE)
    begin = time.perf_counter()
    for _ in range(7500 // len(nodes) + 1):
        for node in nodes:
            model.node(node)
    # 0.3 s on an idle core; ten times that would mean that memoising broke.
    assert time.perf_counter() - begin < 3.0
