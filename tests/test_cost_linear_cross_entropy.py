"""What a chunked loss costs: FLOPs, bytes, seconds and the memory that it takes within itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import graphopt_kernels.linear_cross_entropy as module
from graphopt import _torch
from graphopt.device import DeviceSpec
from graphopt.emit.scratch import _ROW_ALIGNMENT, scratch_bytes
from graphopt_cost_model.call import call_of
from graphopt_cost_model.flops import flops
from graphopt_cost_model.roofline import RooflineCostModel
from graphopt_cost_model.stated_workspace import BLOCK_ELEMENTS, stated_workspace
from graphopt_cost_model.traffic import traffic
from graphopt_cost_model.workspace import WorkspaceProbe, _measured
from graphopt_kernels.cross_entropy_rows import BLOCK_ELEMENTS as KERNEL_BLOCK
from tests.cost_graphs import call_node

ops = torch.ops.graphopt
FORWARD, BACKWARD = ops.linear_cross_entropy.default, ops.linear_cross_entropy_backward.default
WITH_GRADIENTS = ops.linear_cross_entropy_with_gradients.default
NAMES = {FORWARD: "forward", BACKWARD: "backward", WITH_GRADIENTS: "with-gradients"}


def node_of(
    op: Any,
    rows: int,
    width: int,
    columns: int,
    *,
    chunks: int = 4,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    reduction: str = "mean",
    softcap: float = 0.0,
    mask: tuple[bool, bool, bool] | None = None,
    device: str = "cpu",
) -> Any:
    """A call of one of the three operators, with outputs of the right types."""
    kept = mask or (True, True, bias)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    x, weight, vector = tensor(rows, width), tensor(columns, width), tensor(columns) if bias else None
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    loss = tensor(*([rows] if reduction == "none" else []), dtype=torch.float32)
    sums = tensor(rows, dtype=torch.float32)
    settings = (chunks, reduction, -100, 0.0, 1.0, softcap)
    gradients = tuple(
        tensor(*shape) if needed else tensor(0)
        for shape, needed in zip(((rows, width), (columns, width), (columns,)), kept, strict=True)
    )
    if op is BACKWARD:
        return call_node(op, (loss, x, weight, vector, target, sums, *settings, list(kept)), gradients)
    given = (x, weight, vector, target, *settings, torch.float32)
    if op is WITH_GRADIENTS:
        return call_node(op, (*given, list(kept)), (loss, *gradients))
    return call_node(op, given, (loss, sums))


def test_flops_are_those_of_the_products() -> None:
    one = 2 * 100 * 8 * 50
    assert flops(node_of(FORWARD, 100, 8, 50)) == one
    assert flops(node_of(BACKWARD, 100, 8, 50)) == 3 * one
    assert flops(node_of(WITH_GRADIENTS, 100, 8, 50)) == 3 * one
    assert flops(node_of(WITH_GRADIENTS, 100, 8, 50, mask=(True, False, False))) == 2 * one
    assert flops(node_of(BACKWARD, 100, 8, 50, mask=(False, True, False))) == 2 * one


def test_bytes_by_hand() -> None:
    """Three chunks of 40, 40 and 20 rows, in float32."""
    x, weight, logits = 100 * 8 * 4, 50 * 8 * 4, 100 * 50 * 4
    forward = traffic(node_of(FORWARD, 100, 8, 50, chunks=3))
    assert (forward.read, forward.written) == (x + 3 * weight + logits, logits)
    both = traffic(node_of(WITH_GRADIENTS, 100, 8, 50, chunks=3))
    # Rows; the products that give the gradients of the input and, from the second chunk on added, the weight.
    read = (x + 3 * weight) + logits + (logits + 3 * weight) + (logits + x + 2 * weight)
    assert both.read == read
    assert both.written == logits + logits + x + 3 * weight
    biased = traffic(node_of(BACKWARD, 100, 8, 50, chunks=3, bias=True))
    assert (biased.read - both.read, biased.written - both.written) == (logits, 3 * 50 * 4)


def test_its_time_is_that_of_products_and_rows_in_turn() -> None:
    device = DeviceSpec(
        name="paper", kind="cuda", memory_bytes=1, copy_bytes_per_second=1e6, read_bytes_per_second=1e6,
        matmul_flops={"float32": 1.0, "bfloat16": 1e7}, vector_flops={"float32": 1e30},
        launch_seconds=0.25, host_link_bytes_per_second=1.0,
    )  # fmt: skip
    rows, width, columns = 512, 256, 1000
    product = 2 * rows * width * columns / 1e7
    logits = rows * columns * 2 / 1e6
    model = RooflineCostModel(device)
    # The gradient of the loss is float32 and comes first: the products are of bfloat16 all the same.
    for op, products, passes in ((FORWARD, 1, 1), (BACKWARD, 3, 2), (WITH_GRADIENTS, 3, 2)):
        seconds = model.node(node_of(op, rows, width, columns, chunks=2, dtype=torch.bfloat16)).seconds
        launches = 2 * (products + 1) * 0.25
        assert seconds == pytest.approx(products * product + passes * logits + launches)


@pytest.mark.parametrize("op", NAMES, ids=NAMES.get)
def test_the_stated_workspace_is_what_the_cpu_takes(op: Any) -> None:
    assert BLOCK_ELEMENTS == KERNEL_BLOCK
    for dtype, bias, softcap, reduction, (rows, columns, chunks) in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (0.0, 5.0), ("mean", "sum"),
        ((500, 3000, 4), (301, 20000, 2)),
    ):  # fmt: skip
        settings = {"dtype": dtype, "bias": bias, "softcap": softcap, "reduction": reduction}
        node = node_of(op, rows, 16, columns, chunks=chunks, **settings)
        call = call_of(node)
        stated = stated_workspace(call)
        # The profiler that measures loses an event now and then.
        assert any(_measured(call).workspace == stated for _ in range(3)), settings
        probe = WorkspaceProbe()
        assert probe.bytes(node) == stated and not probe.unprobed


def test_the_scratch_on_a_gpu_by_hand() -> None:
    """50 rows of 1,000 columns in four chunks: 13 rows, padded to 1,024."""
    assert _ROW_ALIGNMENT == module.ALIGNED

    def scratch(op: Any, **settings: Any) -> int:
        node = node_of(op, 50, 8, 1000, dtype=torch.bfloat16, device="meta", **settings)
        return scratch_bytes(node.target, [getattr(arg, "meta", {}).get("val", arg) for arg in node.args])

    chunk = 13 * 1024 * 2
    assert scratch(FORWARD) == chunk + 50 * 4
    # Losses of rows are the output themselves.
    assert scratch(FORWARD, reduction="none") == chunk
    assert scratch(WITH_GRADIENTS) == chunk + 2 * 50 * 4 + 4
    assert scratch(WITH_GRADIENTS, bias=True) == chunk + 2 * 50 * 4 + 4 + 1000 * 4
    assert scratch(BACKWARD) == chunk + 4
    assert scratch(BACKWARD, reduction="sum") == chunk
    assert scratch(BACKWARD, bias=True) == chunk + 4 + 1000 * 4


def test_the_operators_are_priced_as_captured() -> None:
    """Names by which the cost model knows them are those under which they are registered."""
    with _torch.fake_mode():
        node = node_of(WITH_GRADIENTS, 8, 4, 16)
    assert str(node.target.overloadpacket) == "graphopt.linear_cross_entropy_with_gradients"
