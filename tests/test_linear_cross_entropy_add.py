"""Backwards of linear + cross entropy that add to the weight's gradient: numbers, memory, refusals, cost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt_kernels.linear_cross_entropy_add as module
from graphopt.emit.scratch import scratch_bytes
from graphopt_cost_model.call import call_of
from graphopt_cost_model.flops import flops
from graphopt_cost_model.stated_workspace import stated_workspace
from graphopt_cost_model.traffic import traffic
from graphopt_cost_model.workspace import _measured
from tests.cost_graphs import call_node

ops = torch.ops.graphopt
ROWS, WIDTH, COLUMNS = 13, 6, 29
KINDS = {
    "chunks": (ops.linear_cross_entropy_add_backward.default, ops.linear_cross_entropy_backward.default, 4),
    "blocks": (
        ops.linear_cross_entropy_blocks_add_backward.default,
        ops.linear_cross_entropy_blocks_backward.default,
        8,
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def operands(
    cuts: int,
    *,
    rows: int = ROWS,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    reduction: str = "mean",
    summed: bool = False,
    mask: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Any, ...]:
    """Arguments behind what is added to."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(shape).to(dtype) for shape in ((rows, WIDTH), (COLUMNS, WIDTH), (COLUMNS,)))
    target = torch.randint(0, COLUMNS, (rows,))
    target[2:3] = -100
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    logits = x.to(exact) @ w.to(exact).t() + (b.to(exact) if bias else 0)
    sums = (3.0 * torch.tanh(2.0 * logits / 3.0)).logsumexp(1)
    grad = torch.randn(rows if reduction == "none" else (), dtype=exact)
    beside = torch.randn(rows, dtype=exact) if summed else None
    settings = (cuts, reduction, -100, 0.1, 2.0, 3.0, list(mask), beside)
    return (grad, x, w, b if bias else None, target, sums, *settings)


def without_memory(like: Tensor) -> Tensor:
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    made.untyped_storage().resize_(0)
    return made.detach()


@kinds
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_they_add_what_the_backward_makes(kind: str, reduction: str) -> None:
    adds, makes, cuts = KINDS[kind]
    for bias, summed, turned in itertools.product((False, True), repeat=3):
        given = operands(cuts, bias=bias, summed=summed, reduction=reduction, mask=(True, True, bias))
        of_input, of_weight, of_bias = makes(*given)
        held = torch.randn(WIDTH, COLUMNS).double().t() if turned else torch.randn(COLUMNS, WIDTH).double()
        into, blank = held.clone(memory_format=torch.preserve_format), without_memory(held)
        place = into.data_ptr()
        for matrix, expected in ((into, held + of_weight), (blank, of_weight)):
            found = adds(matrix, *given)
            torch.testing.assert_close(found, (of_input, of_bias))
            torch.testing.assert_close(matrix, expected)
            assert matrix.stride() == held.stride()
        assert into.data_ptr() == place
        reference = held.clone()
        found = module.add_backward_reference(reference, *given)
        torch.testing.assert_close(reference, held + of_weight)
        torch.testing.assert_close(found, (of_input, of_bias))


@kinds
def test_other_gradients_that_nobody_needs_are_left_out(kind: str) -> None:
    adds, _, cuts = KINDS[kind]
    into = torch.zeros(COLUMNS, WIDTH, dtype=torch.float64)
    of_input, of_bias = adds(into, *operands(cuts, mask=(False, True, False)))
    assert of_input.numel() == of_bias.numel() == 0 and into.any()


@kinds
def test_without_rows_nothing_is_added(kind: str) -> None:
    adds, _, cuts = KINDS[kind]
    like = torch.randn(COLUMNS, WIDTH).double()
    for into, expected in ((like.clone(), like), (without_memory(like), torch.zeros_like(like))):
        adds(into, *operands(cuts, rows=0, reduction="sum"))
        torch.testing.assert_close(into, expected)


@kinds
def test_nan_and_infinities_go_where_they_went(kind: str) -> None:
    adds, makes, cuts = KINDS[kind]
    given = operands(cuts)
    given[1][5, 2], given[1][7, 1] = float("nan"), float("inf")
    into = torch.randn(COLUMNS, WIDTH).double()
    into[3, 3] = float("inf")
    expected = into + makes(*given)[1]
    adds(into, *given)
    torch.testing.assert_close(into, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_blocks_are_rounded_no_worse_than_gradient_and_sum(dtype: torch.dtype) -> None:
    adds, makes, cuts = KINDS["blocks"]
    given = operands(cuts, rows=64, dtype=dtype)
    held = torch.randn(COLUMNS, WIDTH).to(dtype)
    floats = [isinstance(arg, Tensor) and arg.is_floating_point() for arg in given]
    wide = [arg.double() if is_float else arg for arg, is_float in zip(given, floats, strict=True)]
    right = held.double() + makes(*wide)[1]
    apart = held + makes(*given)[1]
    adds(held, *given)
    errors = [float((found.double() - right).norm()) for found in (held, apart)]
    assert errors[0] <= 1.1 * errors[1]


@kinds
def test_they_are_operators_like_others(kind: str) -> None:
    adds, _, cuts = KINDS[kind]
    into = torch.randn(COLUMNS, WIDTH).double()
    for summed in (False, True):
        torch.library.opcheck(adds, (into, *operands(cuts, summed=summed)))


@kinds
@pytest.mark.parametrize(
    ("into", "reason"),
    [
        (torch.zeros(COLUMNS, WIDTH + 1), r"the weight is \[29, 6\], what is added to \[29, 7\]"),
        (torch.zeros(COLUMNS, WIDTH).double(), "the weight is torch.float32, what is added to torch.float64"),
        (torch.zeros(COLUMNS, WIDTH, device="meta"), "the weight is on cpu, what is added to on meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_what_does_not_fit_is_refused(kind: str, into: Tensor, reason: str) -> None:
    adds, _, cuts = KINDS[kind]
    given = operands(cuts, dtype=torch.float32)
    name = "add_backward_supports" if kind == "chunks" else "blocks_add_backward_supports"
    found = getattr(module, name)(into, *given)
    with pytest.raises(ValueError, match=reason):
        if into.is_meta:
            raise ValueError(str(found))
        adds(into, *given)


def test_a_wider_sum_is_of_a_gpu() -> None:
    """On a GPU that is not there: nothing is run."""
    with torch._subclasses.FakeTensorMode():
        for device, dtype, taken in (
            ("cuda", torch.bfloat16, True),
            ("cuda", torch.float16, False),
            ("cpu", torch.bfloat16, False),
        ):
            weight = torch.empty(4, 3, dtype=dtype, device=device)
            into = torch.empty(4, 3, device=device)
            assert (module._into_refused(into, weight) is None) is taken


# --- cost ---------------------------------------------------------------------------------------------


def node_of(
    kind: str, rows: int, width: int, columns: int, cuts: int, dtype: torch.dtype, *, adds: bool
) -> Any:
    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    x, weight, sums = tensor(rows, width), tensor(columns, width), tensor(rows, dtype=torch.float32)
    one, target = tensor(dtype=torch.float32), torch.zeros(rows, dtype=torch.int64)
    given = (one, x, weight, tensor(columns), target, sums, cuts, "mean", -100, 0.0, 1.0, 0.0, [True] * 3)
    if adds:
        return call_node(KINDS[kind][0], (weight.clone(), *given), (tensor(rows, width), tensor(columns)))
    return call_node(KINDS[kind][1], given, (tensor(rows, width), weight, tensor(columns)))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_workspace_is_what_the_cpu_takes(kind: str, dtype: torch.dtype) -> None:
    for rows, columns in ((500, 3000), (301, 20000)):
        cuts = 4 if kind == "chunks" else 1024
        node = node_of(kind, rows, 16, columns, cuts, dtype, adds=True)
        call = call_of(node)
        stated = stated_workspace(call)
        assert any(_measured(call).workspace == stated for _ in range(3)), (rows, columns)
        found = scratch_bytes(node.target, [getattr(arg, "meta", {}).get("val", arg) for arg in node.args])
        assert stated is not None and stated <= found


@kinds
def test_they_cost_what_the_backward_does_and_a_reading_of_the_sum(kind: str) -> None:
    adds, makes = (node_of(kind, 100, 8, 50, 4, torch.float32, adds=adds) for adds in (True, False))
    assert flops(adds) == flops(makes)
    read, before = traffic(adds), traffic(makes)
    assert (read.read - before.read, read.written) == (50 * 8 * 4, before.written)


def test_in_blocks_the_sum_of_the_input_has_its_own_memory() -> None:
    adds, makes = (node_of("blocks", 100, 8, 1000, 64, torch.bfloat16, adds=adds) for adds in (True, False))
    # What lies in the gradient of the weight has to be computed once more.
    assert flops(adds) == 2 * 100 * 8 * 3 * 1000 < flops(makes)
    found = [
        scratch_bytes(node.target, [getattr(arg, "meta", {}).get("val", arg) for arg in node.args])
        for node in (adds, makes)
    ]
    assert found[0] - found[1] == 100 * 8 * 4
