"""What a chunked loss costs: FLOPs, bytes, seconds and the memory that it takes within itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import graphopt_kernels.linear_cross_entropy_blocks  # noqa: F401  (registers the operators)
from graphopt import _torch
from graphopt.device import DeviceSpec
from graphopt.emit.scratch import _ROW_ALIGNMENT, scratch_bytes
from graphopt_cost_model.call import call_of
from graphopt_cost_model.class_blocks import BLOCK_ELEMENTS, _Blocks
from graphopt_cost_model.flops import flops
from graphopt_cost_model.roofline import RooflineCostModel
from graphopt_cost_model.stated_workspace import stated_workspace
from graphopt_cost_model.traffic import traffic
from graphopt_cost_model.workspace import WorkspaceProbe, _measured
from graphopt_kernels.class_blocks import ALIGNED, BlockGradients, ClassBlocks, HeldLogits
from graphopt_kernels.cross_entropy_rows import BLOCK_ELEMENTS as KERNEL_BLOCK
from tests.cost_graphs import call_node

ops = torch.ops.graphopt
FORWARD, BACKWARD = ops.linear_cross_entropy.default, ops.linear_cross_entropy_backward.default
WITH_GRADIENTS = ops.linear_cross_entropy_with_gradients.default
BLOCKS, BLOCKS_BACKWARD = (
    ops.linear_cross_entropy_blocks.default,
    ops.linear_cross_entropy_blocks_backward.default,
)
BLOCKS_WITH_GRADIENTS = ops.linear_cross_entropy_blocks_with_gradients.default
NAMES = {FORWARD: "forward", BACKWARD: "backward", WITH_GRADIENTS: "with-gradients"}
BLOCK_NAMES = {
    BLOCKS: "blocks",
    BLOCKS_BACKWARD: "blocks-backward",
    BLOCKS_WITH_GRADIENTS: "blocks-with-gradients",
}


def node_of(
    op: Any,
    rows: int,
    width: int,
    columns: int,
    *,
    cuts: int = 4,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    reduction: str = "mean",
    softcap: float = 0.0,
    mask: tuple[bool, bool, bool] | None = None,
    device: str = "cpu",
    sum_grad: bool = False,
) -> Any:
    """A call of one of the operators, with outputs of the right types. ``cuts`` is the number of chunks
    or the classes of a block."""
    kept = mask or (True, True, bias)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    x, weight, vector = tensor(rows, width), tensor(columns, width), tensor(columns) if bias else None
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    loss = tensor(*([rows] if reduction == "none" else []), dtype=torch.float32)
    sums = tensor(rows, dtype=torch.float32)
    settings = (cuts, reduction, -100, 0.0, 1.0, softcap)
    gradients = tuple(
        tensor(*shape) if needed else tensor(0)
        for shape, needed in zip(((rows, width), (columns, width), (columns,)), kept, strict=True)
    )
    if op in (BACKWARD, BLOCKS_BACKWARD):
        last = (sums,) if sum_grad else ()
        return call_node(op, (loss, x, weight, vector, target, sums, *settings, list(kept), *last), gradients)
    given = (x, weight, vector, target, *settings, torch.float32)
    if op in (WITH_GRADIENTS, BLOCKS_WITH_GRADIENTS):
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
    forward = traffic(node_of(FORWARD, 100, 8, 50, cuts=3))
    assert (forward.read, forward.written) == (x + 3 * weight + logits, logits)
    both = traffic(node_of(WITH_GRADIENTS, 100, 8, 50, cuts=3))
    # Rows; the products that give the gradients of the input and, from the second chunk on added, the weight.
    read = (x + 3 * weight) + logits + (logits + 3 * weight) + (logits + x + 2 * weight)
    assert both.read == read
    assert both.written == logits + logits + x + 3 * weight
    biased = traffic(node_of(BACKWARD, 100, 8, 50, cuts=3, bias=True))
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
        seconds = model.node(node_of(op, rows, width, columns, cuts=2, dtype=torch.bfloat16)).seconds
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
        node = node_of(op, rows, 16, columns, cuts=chunks, **settings)
        call = call_of(node)
        stated = stated_workspace(call)
        # The profiler that measures loses an event now and then.
        assert any(_measured(call).workspace == stated for _ in range(3)), settings
        if op is BACKWARD and not softcap:
            summed = call_of(node_of(op, rows, 16, columns, cuts=chunks, sum_grad=True, **settings))
            assert any(_measured(summed).workspace == stated_workspace(summed) for _ in range(3)), settings
        probe = WorkspaceProbe()
        assert probe.bytes(node) == stated and not probe.unprobed


@pytest.mark.parametrize("op", BLOCK_NAMES, ids=BLOCK_NAMES.get)
def test_the_stated_workspace_of_blocks_is_what_the_cpu_takes(op: Any) -> None:
    """Logits held and not, a sum in the weight's gradient and beside it, and one block."""
    for dtype, bias, softcap, reduction, (rows, width, columns, block) in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (0.0, 5.0), ("mean", "sum"),
        ((500, 16, 3000, 600), (301, 32, 20000, 4096), (100, 64, 500, 1024)),
    ):  # fmt: skip
        settings = {"dtype": dtype, "bias": bias, "softcap": softcap, "reduction": reduction}
        for summed in (False, True) if op is BLOCKS_BACKWARD and not softcap else (False,):
            call = call_of(node_of(op, rows, width, columns, cuts=block, sum_grad=summed, **settings))
            stated = stated_workspace(call)
            assert any(_measured(call).workspace == stated for _ in range(3)), (settings, block)


def test_the_cost_model_knows_where_blocks_are() -> None:
    """Its arithmetic beside that of the kernels: where the input's sum lies, how many blocks are held."""
    for dtype, (rows, width, columns, block), weighs in itertools.product(
        (torch.float32, torch.bfloat16),
        (
            (500, 16, 3000, 600),
            (301, 32, 20000, 4096),
            (16, 64, 5000, 64),
            (64, 16, 5000, 64),
            (9, 4, 20, 64),
        ),
        (True, False),
    ):
        mask = (True, weighs, False)
        node = node_of(BLOCKS_WITH_GRADIENTS, rows, width, columns, cuts=block, dtype=dtype, mask=mask)
        counted = _Blocks(call_of(node))
        x, weight = (torch.empty(n, width, dtype=dtype) for n in (rows, columns))
        blocks = ClassBlocks(x, weight, None, block)
        gradients = BlockGradients(blocks, x, weight, None, mask)
        held = HeldLogits(blocks, gradients, mask)
        assert counted.front == gradients.front
        places = [held.place(part) for part in blocks.within(0, gradients.front)]
        assert counted.held == sum(place is not None for place in places)
        kept = None if held.at_hand is None else (held.at_hand.start, held.at_hand.stop - held.at_hand.start)
        assert counted.at_hand == kept


def test_flops_and_bytes_of_blocks_by_hand() -> None:
    """50 classes in blocks of 20, 20 and 10, in float32: nothing is summed in a wider dtype."""
    one = 2 * 100 * 8 * 50
    x, weight, logits = 100 * 8 * 4, 50 * 8 * 4, 100 * 50 * 4
    forward = node_of(BLOCKS, 100, 8, 50, cuts=20)
    assert flops(forward) == one
    moved = traffic(forward)
    assert (moved.read, moved.written) == (3 * x + weight + logits, logits)
    backward = node_of(BLOCKS_BACKWARD, 100, 8, 50, cuts=20, bias=True)
    assert flops(backward) == 3 * one
    moved = traffic(backward)
    # Logits, their gradient; gradients of the input, added to from the second block on, of weight and bias.
    assert moved.read == 3 * x + weight + logits + (logits + weight + 2 * x) + (logits + 3 * x) + logits
    assert moved.written == logits + logits + 3 * x + weight + 50 * 4
    # 50 x 8 floats hold no 100 x 20 logits: all are computed again but for one of 20, which is at hand.
    assert flops(node_of(BLOCKS_WITH_GRADIENTS, 100, 8, 50, cuts=20)) == 3 * one + one * 30 // 50
    # 200 x 50 hold five blocks of 100 x 20 of those of 200 classes; 210 x 50 too, and the last full one lies
    # behind them.
    half = flops(node_of(BLOCKS_WITH_GRADIENTS, 100, 50, 200, cuts=20))
    assert half == 2 * 100 * 50 * (3 * 200 + 100)
    more = flops(node_of(BLOCKS_WITH_GRADIENTS, 100, 50, 230, cuts=20))
    assert more == 2 * 100 * 50 * (3 * 230 + 230 - 100 - 20)
    assert flops(node_of(BLOCKS_WITH_GRADIENTS, 20, 50, 200, cuts=20)) == 6 * 20 * 50 * 200
    # In bfloat16 the sum of 100 x 8 takes the place of 200 classes; those of 832 - 1,000 come once more,
    # but for the last block.
    again = flops(node_of(BLOCKS_BACKWARD, 100, 8, 1000, cuts=64, dtype=torch.bfloat16))
    front = (1000 - 200) // 64 * 64
    assert again == 2 * 100 * 8 * (3 * 1000 + (1000 - front) - (1000 - front) % 64)


def test_the_scratch_on_a_gpu_by_hand() -> None:
    """50 rows of 1,000 columns in four chunks: 13 rows, padded to 1,024."""
    assert _ROW_ALIGNMENT == ALIGNED

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
    # Blocks of 100 classes, padded to 128; the sum fits behind 900 rows of the weight's gradient.
    block = 50 * 128 * 2
    assert scratch(BLOCKS, cuts=100) == block + 2 * 50 * 4
    assert scratch(BLOCKS_BACKWARD, cuts=100, bias=True) == block + 4
    assert scratch(BLOCKS_WITH_GRADIENTS, cuts=100) == block + 3 * 50 * 4 + 4
    beside = {"cuts": 100, "mask": (True, False, False)}
    assert scratch(BLOCKS_BACKWARD, **beside) == block + 4 + 50 * 8 * 4


@pytest.mark.parametrize("op", [*NAMES, *BLOCK_NAMES], ids=(NAMES | BLOCK_NAMES).get)
def test_the_scratch_on_a_cpu_is_no_less_than_the_workspace(op: Any) -> None:
    """Generated code is judged by it: what a call takes is never understated, and hardly overstated."""
    for dtype, bias, softcap, (rows, width, columns) in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (0.0, 5.0), ((2048, 64, 20000), (600, 512, 9000))
    ):
        cuts = 2048 if op in BLOCK_NAMES else 2
        node = node_of(op, rows, width, columns, cuts=cuts, dtype=dtype, bias=bias, softcap=softcap)
        stated = stated_workspace(call_of(node))
        found = scratch_bytes(node.target, [getattr(arg, "meta", {}).get("val", arg) for arg in node.args])
        assert stated is not None and stated <= found <= 1.1 * stated, (dtype, bias, softcap, rows)


def test_the_operators_are_priced_as_captured() -> None:
    """Names by which the cost model knows them are those under which they are registered."""
    with _torch.fake_mode():
        node = node_of(WITH_GRADIENTS, 8, 4, 16)
    assert str(node.target.overloadpacket) == "graphopt.linear_cross_entropy_with_gradients"
