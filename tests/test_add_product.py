"""graphopt::add_product: products added where they are computed, and matrices that have no memory yet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt_kernels.add_product import add_product, add_product_reference, add_product_supports
from tests.programs import host


def operands(
    m: int = 6, k: int = 7, n: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=dtype) for shape in ((m, n), (m, k), (k, n)))  # type: ignore[return-value]


def without_memory(like: Tensor) -> Tensor:
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    made.untyped_storage().resize_(0)
    return made.detach()


@pytest.mark.parametrize("sizes", [(6, 7, 5), (1, 9, 1), (4, 0, 3), (0, 4, 3), (70, 33, 65)], ids=str)
def test_it_computes_its_reference(sizes: tuple[int, int, int]) -> None:
    into, left, right = operands(*sizes)
    expected = into.clone()
    add_product_reference(expected, left, right)
    place = into.data_ptr()
    add_product(into, left, right)
    torch.testing.assert_close(into, expected)
    assert into.data_ptr() == place
    assert host().kernels()["add-product"].reference is add_product_reference


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_sum_is_rounded_no_worse_than_product_and_sum(dtype: torch.dtype) -> None:
    into, left, right = operands(32, 64, 32, dtype)
    exact = into.double() + left.double() @ right.double()
    apart = into.clone()
    add_product_reference(apart, left, right)
    add_product(into, left, right)
    assert (into.double() - exact).norm() <= 1.1 * (apart.double() - exact).norm()


def test_operands_and_sum_may_lie_anyhow() -> None:
    into, left, right = operands(8, 10, 12)
    views = (left[:, ::2], left[::2].t()[:5, :4].t(), right[::2, 1:9:2])
    for a in views[:2]:
        held = into.t()[: views[2].shape[1], : a.shape[0]].t().clone(memory_format=torch.preserve_format)
        expected = held + a @ views[2]
        add_product(held, a, views[2])
        torch.testing.assert_close(held, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_a_matrix_without_memory_becomes_the_product(turned: bool) -> None:
    like, left, right = operands()
    like = like.t().contiguous().t() if turned else like
    blank = without_memory(like)
    into = blank.detach()
    add_product(into, left, right)
    torch.testing.assert_close(into, left @ right)
    assert into.stride() == like.stride()
    # The next call begins without memory again.
    assert blank.untyped_storage().nbytes() == 0
    add_product(into, left, right)
    torch.testing.assert_close(into, 2 * (left @ right))


@pytest.mark.parametrize(
    ("device", "dtype", "taken"),
    [("cuda", torch.bfloat16, True), ("cuda", torch.float16, False), ("cpu", torch.bfloat16, False)],
)
def test_a_wider_sum_is_of_a_gpu(device: str, dtype: torch.dtype, taken: bool) -> None:
    """On a GPU that is not there: nothing is run."""
    with torch._subclasses.FakeTensorMode():
        left, right = (torch.empty(4, 4, dtype=dtype, device=device) for _ in range(2))
        found = add_product_supports(torch.empty(4, 4, device=device), left, right)
    reason = f"an operand is {dtype}, what is added to torch.float32"
    assert (None if found is None else found.text) == (None if taken else reason)


@pytest.mark.gpu
def test_products_of_bfloat16_are_added_in_float32() -> None:
    left, right = (torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    held = torch.randn(512, 512, device="cuda")
    blank = torch.empty(512, 512, device="cuda")
    blank.untyped_storage().resize_(0)
    for a, b in ((left, right), (left.t(), right), (left[:, ::2], right[:256]), (left.t()[64:192], right)):
        exact = a.double() @ b.double()
        into = held[: a.shape[0]].clone()
        add_product(into, a, b)
        torch.testing.assert_close(into.double(), held[: a.shape[0]].double() + exact, atol=1e-3, rtol=1e-5)
        made = blank[: a.shape[0]].detach()
        if a.shape[0] == 512:
            add_product(made, a, b)
            torch.testing.assert_close(made.double(), exact, atol=1e-3, rtol=1e-5)


def test_special_values_go_where_they_go_in_eager() -> None:
    into, left, right = operands()
    into[0, 0], left[1, 2], right[3, 4], into[5, 0] = float("nan"), float("inf"), float("nan"), float("-inf")
    expected = into + left @ right
    add_product(into, left, right)
    torch.testing.assert_close(into, expected, equal_nan=True)


def test_what_is_added_to_may_be_an_operand() -> None:
    square, other, _ = operands(6, 6, 6)
    expected = square + square @ other
    add_product(square, square, other)
    torch.testing.assert_close(square, expected)


def test_it_is_an_operator_like_others() -> None:
    torch.library.opcheck(torch.ops.graphopt.add_product.default, operands(dtype=torch.float64))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((torch.ones(2, 2), torch.ones(2, 3), torch.ones(2, 2)), "no product of matrices"),
        ((torch.ones(2, 2), torch.ones(2, 3, 1), torch.ones(3, 2)), "no product of matrices"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2)), r"the product is \[2, 2\]"),
        ((torch.ones(2, 2), torch.ones(2, 3).half(), torch.ones(3, 2)), "an operand is torch.float16"),
        ((torch.ones(2, 2), torch.ones(2, 3, device="meta"), torch.ones(3, 2)), "an operand is on meta"),
        (tuple(torch.ones(2, 2, dtype=torch.int64) for _ in range(3)), "no floating-point type"),
    ],
    ids=["inner", "dimensions", "shape", "dtype", "device", "integers"],
)
def test_what_does_not_fit_is_refused(args: tuple[Tensor, ...], reason: str) -> None:
    found = add_product_supports(*args)
    assert found is not None
    with pytest.raises(ValueError, match=reason):
        if args[1].device.type == "meta":
            raise ValueError(str(found))
        add_product(*args)


def test_its_price_is_one_product_that_reads_what_it_adds_to() -> None:
    args = operands(6, 7, 5)
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in ("into", "left", "right")]
    for node, value in zip(nodes, args, strict=True):
        node.meta["val"] = value
    call = graph.call_function(torch.ops.graphopt.add_product.default, tuple(nodes))
    call.meta["val"] = None
    cost = host().cost_model("roofline").build(host().device("h200")).node(call)
    assert cost.flops == 2 * 6 * 7 * 5
    assert cost.bytes_read == 4 * (6 * 5 + 6 * 7 + 7 * 5) and cost.bytes_written == 4 * 6 * 5
