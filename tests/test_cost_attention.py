"""What attention costs: scores that are seen, products by kernel, memory beside the outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt_kernels.attention as module
import graphopt_kernels.dropout_add as dropout
from graphopt import _torch
from graphopt.device import DeviceSpec
from graphopt.emit.scratch import scratch_bytes
from graphopt_cost_model import dropout_cost
from graphopt_cost_model.attention_cost import SLICE_ELEMENTS, visible_scores
from graphopt_cost_model.call import call_of
from graphopt_cost_model.flops import flops
from graphopt_cost_model.phases import phases_of
from graphopt_cost_model.roofline import RooflineCostModel
from graphopt_cost_model.stated_workspace import stated_workspace
from graphopt_cost_model.traffic import traffic
from graphopt_cost_model.workspace import Probe, _measured
from graphopt_kernels import philox
from graphopt_kernels.attention_reference import SLICE_ELEMENTS as KERNEL_SLICE
from tests.cost_graphs import call_node

assert module.__all__ and dropout.__all__, "importing them registers the operators"
ops = torch.ops.graphopt
FORWARD, BACKWARD = ops.attention.default, ops.attention_backward.default


def node_of(
    op: Any,
    *,
    device: str = "meta",
    left: int | None = None,
    right: int | None = None,
    bias: bool = False,
    mask: tuple[bool, bool, bool, bool] = (True, True, True, False),
) -> Any:
    """Two batches of six heads, two of keys, 5 queries of 8, 7 keys and values of 4, in bfloat16."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    query, key, value = tensor(2, 6, 5, 8), tensor(2, 2, 7, 8), tensor(2, 2, 7, 4)
    added = tensor(6, 5, 7) if bias else None
    output, sums = tensor(2, 6, 5, 4), tensor(2, 6, 5, dtype=torch.float32)
    settings = (0.5, 0.0, left, right)
    if op is FORWARD:
        return call_node(op, (query, key, value, added, *settings), (output, sums))
    given = (query, key, value, added)
    grads = [x if wanted and x is not None else tensor(0) for x, wanted in zip(given, mask, strict=True)]
    args = (output, query, key, value, added, output, sums, *settings, list(mask))
    return call_node(op, args, tuple(torch.empty_like(x) for x in grads))


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (2, 0), (-1, 3), (1, None), (None, -3)])
def test_visible_scores_are_those_of_the_mask(left: int | None, right: int | None) -> None:
    for rows, columns in ((5, 7), (7, 5), (1, 1), (0, 3), (4, 4)):
        distance = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= distance >= -left if left is not None else seen
        seen &= distance <= right if right is not None else seen
        assert visible_scores(rows, columns, left, right) == int(seen.sum())


def test_flops_are_those_of_the_products_over_what_is_seen() -> None:
    for left, right in ((None, None), (None, 0), (2, 0)):
        pairs = 2 * 6 * visible_scores(5, 7, left, right)
        window = {"left": left, "right": right}
        assert flops(node_of(FORWARD, **window)) == 2 * pairs * (8 + 4)
        # Keys and values: 8 + 4 + 4 + 8. Queries: 8 + 4 + 8. A bias: 8 + 4.
        assert flops(node_of(BACKWARD, **window)) == 2 * pairs * (24 + 20)
        some = (False, False, True, True)
        assert flops(node_of(BACKWARD, bias=True, mask=some, **window)) == 2 * pairs * (24 + 12)
        assert flops(node_of(BACKWARD, device="cpu", **window)) == 2 * pairs * (8 * 3 + 4 * 2)


def test_bytes_by_hand() -> None:
    operands = 2 * (2 * 6 * 5 * 8 + 2 * 2 * 7 * (8 + 4))
    sums = 2 * 6 * 5 * 4
    found = traffic(node_of(FORWARD))
    assert (found.read, found.written) == (operands, 2 * 2 * 6 * 5 * 4 + sums)
    assert traffic(node_of(FORWARD, bias=True)).read == operands + 2 * 6 * 5 * 7
    rows, keys, queries = phases_of(call_of(node_of(BACKWARD)))
    assert (rows.read, rows.written) == (2 * 2 * 2 * 6 * 5 * 4 + sums, 2 * sums)
    assert keys.read == queries.read == operands + 2 * 2 * 6 * 5 * 4 + 2 * sums
    assert (keys.written, queries.written) == (2 * 2 * 2 * 7 * (8 + 4), 2 * 2 * 6 * 5 * 8)


def test_a_window_takes_less_time() -> None:
    device = DeviceSpec(
        name="paper", kind="cuda", memory_bytes=1, copy_bytes_per_second=1e30, read_bytes_per_second=1e30,
        matmul_flops={"float32": 1.0, "bfloat16": 1e7}, vector_flops={"float32": 1e30},
        launch_seconds=0.25, host_link_bytes_per_second=1.0,
    )  # fmt: skip
    model = RooflineCostModel(device)
    for op, launches, products in ((FORWARD, 1, 12), (BACKWARD, 3, 44)):
        for left, right in ((None, None), (1, 0)):
            pairs = 2 * 6 * visible_scores(5, 7, left, right)
            seconds = model.node(node_of(op, left=left, right=right)).seconds
            assert seconds == pytest.approx(2 * pairs * products / 1e7 + launches * 0.25)


def test_the_scratch_on_a_gpu_is_two_numbers_a_row() -> None:
    with _torch.fake_mode():
        node = node_of(BACKWARD, device="cuda")
    values = [getattr(arg, "meta", {}).get("val", arg) for arg in node.args]
    assert scratch_bytes(node.target, values) == 2 * 4 * 2 * 6 * 5
    assert scratch_bytes(node_of(FORWARD).target, values) == 0


def sized(op: Any, rows: int, dtype: torch.dtype, **given: Any) -> Any:
    """A call with operands of up to 600 keys, 8 heads over two batches."""

    def tensor(heads: int, length: int) -> torch.Tensor:
        return torch.empty(2, length, heads, 16, dtype=dtype).transpose(1, 2)

    query, key, value = tensor(4, rows), tensor(2, 600), tensor(2, 600)
    bias = torch.empty(1, 4, rows, 600, dtype=dtype) if given.get("bias") else None
    sums = torch.empty(2, 4, rows)
    settings = (0.3, given.get("softcap", 0.0), given.get("left"), given.get("right"))
    dropping = (0.3, torch.zeros(1, dtype=torch.int64)) if given.get("drops") else ()
    if op is FORWARD:
        return call_node(op, (query, key, value, bias, *settings, *dropping), (torch.empty_like(query), sums))
    d_bias = torch.empty(0, dtype=dtype) if bias is None else torch.empty_like(bias)
    made = (*(torch.empty_like(x) for x in (query, key, value)), d_bias)
    mask = [True, True, True, bias is not None]
    args = (query, query, key, value, bias, query, sums, *settings, mask, *dropping)
    return call_node(op, args, made)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD], ids=str)
@pytest.mark.parametrize(
    "given",
    [
        {}, {"softcap": 2.0}, {"right": 0}, {"left": 63, "right": 0}, {"bias": True, "softcap": 2.0},
        {"drops": True}, {"drops": True, "left": 63, "right": 0}, {"drops": True, "right": 0, "softcap": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_the_stated_workspace_is_what_the_cpu_takes_at_most(op: Any, given: dict[str, Any]) -> None:
    assert SLICE_ELEMENTS == KERNEL_SLICE and dropout_cost.BLOCK_ELEMENTS == philox.BLOCK_ELEMENTS
    for rows, dtype in ((700, torch.float32), (700, torch.bfloat16), (100, torch.float32)):
        call = call_of(sized(op, rows, dtype, **given))
        stated = stated_workspace(call)
        assert stated is not None
        taken = _measured(call)
        assert isinstance(taken, Probe) and taken.workspace <= stated <= 2 * taken.workspace, (rows, dtype)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD], ids=str)
def test_weights_that_are_dropped_cost_their_numbers_in_every_kernel(op: Any) -> None:
    kept, dropped = (
        phases_of(call_of(sized(op, 700, torch.bfloat16, drops=drops))) for drops in (False, True)
    )
    products = [(before, after) for before, after in zip(kept, dropped, strict=True) if before.flops]
    assert products
    for before, after in products:
        assert after.elements == before.elements * (1 + dropout_cost.DRAWN)
        assert (after.flops, after.written) == (before.flops, before.written)


def test_dropout_takes_a_block_of_words_and_moves_each_operand_once() -> None:
    op = ops.dropout_add.default
    for count, dtype, adds in ((3000, torch.float32, True), (2**19, torch.bfloat16, False),
                               (2**18, torch.float64, True)):  # fmt: skip
        x, seed = torch.empty(count, dtype=dtype), torch.zeros(1, dtype=torch.int64)
        node = call_node(op, (x, torch.empty_like(x) if adds else None, 0.5, seed), torch.empty_like(x))
        stated, taken = stated_workspace(call_of(node)), _measured(call_of(node))
        assert stated is not None and isinstance(taken, Probe)
        assert taken.workspace <= stated <= 2 * taken.workspace
        moved = traffic(node)
        assert (moved.read, moved.written) == ((1 + adds) * x.nbytes + 8, x.nbytes)
    assert str(op.overloadpacket) == "graphopt.dropout_add"


def test_the_operators_are_known_by_the_names_that_they_are_registered_under() -> None:
    assert [str(op.overloadpacket) for op in (FORWARD, BACKWARD)] == [
        "graphopt.attention",
        "graphopt.attention_backward",
    ]
