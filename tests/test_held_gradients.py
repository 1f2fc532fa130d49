"""Gradients that a forward computed are multiplied in their own memory where nobody else can see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import graphopt_kernels.linear_cross_entropy_blocks  # noqa: F401  (registers the operators)
from graphopt.measure import allocator_peak

ops = torch.ops.graphopt
OPERATORS = {
    "rows": (ops.linear_cross_entropy_with_gradients, 4),
    "classes": (ops.linear_cross_entropy_blocks_with_gradients, 8),
}


def results(kind: str, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    operator, cuts = OPERATORS[kind]
    target = torch.arange(x.shape[0]) % weight.shape[0]
    settings = (cuts, "sum", -100, 0.0, 1.0, 0.0, x.dtype, [True, True, False])
    found: tuple[torch.Tensor, ...] = operator(x, weight, None, target, *settings)
    return found


def leaves(rows: int = 12) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (rows, 33)]


def tripled() -> list[torch.Tensor]:
    """What the backward of three times the loss must give."""
    return [3 * gradient for gradient in results("rows", *leaves())[1:3]]


def places(tensors: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@pytest.fixture(params=list(OPERATORS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(
    kind: str, hold: Callable[[tuple[torch.Tensor, ...]], Any] = lambda found: None, **settings: Any
) -> tuple[bool, Any]:
    """Whether the gradients are in the memory of those that were kept, and what ``hold`` made of these."""
    given = leaves()
    found = results(kind, *given)
    kept, held, loss = places(found[1:3]), hold(found), found[0]
    del found
    gradients = torch.autograd.grad(3 * loss, given, **settings)
    for ours, expected in zip(gradients, tripled(), strict=True):
        torch.testing.assert_close(ours, expected)
    return places(gradients) == kept, held


def test_what_nobody_else_has_is_written_over(kind: str) -> None:
    assert [run(kind)[0] for _ in range(3)] == [True] * 3


def test_a_gradient_of_a_leaf_is_that_memory(kind: str) -> None:
    given = leaves()
    found = results(kind, *given)
    kept, loss = places(found[1:3]), found[0]
    del found
    (3 * loss).backward()
    assert places(leaf.grad for leaf in given) == kept


@pytest.mark.parametrize(
    "hold",
    [
        lambda gradient: gradient,
        lambda gradient: gradient.detach(),
        lambda gradient: gradient[2:],
        lambda gradient: gradient.untyped_storage(),
        lambda gradient: gradient.numpy(),
    ],
    ids=["tensor", "detached", "view", "storage", "array"],
)
def test_what_somebody_holds_stays_as_it_is(kind: str, hold: Callable[[torch.Tensor], Any]) -> None:
    given = leaves()
    found = results(kind, *given)
    before = [gradient.clone() for gradient in found[1:3]]
    where, loss, held = places(found[1:3]), found[0], [hold(gradient) for gradient in found[1:3]]
    del found
    gradients = torch.autograd.grad(3 * loss, given)
    assert not set(places(gradients)) & set(where)
    for part, ours, expected in zip(held, gradients, before, strict=True):
        torch.testing.assert_close(ours, 3 * expected)
        if isinstance(part, torch.UntypedStorage):
            part = torch.empty(0, dtype=torch.float64).set_(part, 0, expected.shape)
        part = torch.as_tensor(part)
        assert torch.equal(part, expected[-part.shape[0] :])


def test_a_graph_that_is_kept_gives_the_same_twice(kind: str) -> None:
    given = leaves()
    loss = 3 * results(kind, *given)[0]
    for keeps in (True, True, False):
        gradients = torch.autograd.grad(loss, given, retain_graph=keeps)
        for ours, expected in zip(gradients, tripled(), strict=True):
            torch.testing.assert_close(ours, expected)


def test_another_graph_that_saved_them_is_not_broken(kind: str) -> None:
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    in_place, product = run(kind, lambda found: (factor * found[2]).sum())
    assert not in_place
    (gradient,) = torch.autograd.grad(product, factor)
    torch.testing.assert_close(gradient, results(kind, *leaves())[2].sum())


@pytest.mark.parametrize(
    "hooks",
    [
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        torch.autograd.graph.save_on_cpu,
    ],
    ids=["same", "on-cpu"],
)
def test_hooks_on_saved_tensors_get_the_same_gradients(kind: str, hooks: Callable[[], Any]) -> None:
    given = leaves()
    with hooks():
        loss = results(kind, *given)[0]
    for ours, expected in zip(torch.autograd.grad(3 * loss, given), tripled(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_what_a_hook_keeps_stays_as_it_is(kind: str) -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    given = leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        loss = results(kind, *given)[0]
    before = [tensor.clone() for tensor in kept]
    for ours, expected in zip(torch.autograd.grad(3 * loss, given), tripled(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert before and all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_checkpoints_get_the_same_gradients(kind: str) -> None:
    given = leaves()
    loss = checkpoint(lambda x, w: results(kind, x, w)[0], *given, use_reentrant=False)
    for ours, expected in zip(torch.autograd.grad(3 * loss, given), tripled(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradients_are_in_memory_once(kind: str) -> None:
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(4096, 64, requires_grad=True)

    def step() -> None:
        torch.autograd.grad(results(kind, x, weight)[0], (x, weight))

    step()
    gradients = x.nbytes + weight.nbytes
    # The profiler that counts loses an event now and then.
    peaks = sorted(allocator_peak(step, torch.device("cpu")) for _ in range(3))
    assert gradients < peaks[1] < gradients + 64 * 1024 * 4 + 2**14


def test_compiled_they_are_multiplied_once(kind: str) -> None:
    torch._dynamo.reset()
    given = leaves()
    loss = torch.compile(lambda x, w: 3 * results(kind, x, w)[0], backend="aot_eager", fullgraph=True)(*given)
    for ours, expected in zip(torch.autograd.grad(loss, given), tripled(), strict=True):
        torch.testing.assert_close(ours, expected)
