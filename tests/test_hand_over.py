"""Gradients go to ``.grad`` call by call: the same sums, less memory, and nobody who watches is passed by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphopt
from graphopt.hand_over import handing_over, is_watched


class Shared:
    """One parameter that two calls read, another that one reads."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.shared, self.own = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def loss(self) -> torch.Tensor:
        first = handing_over([self.shared, 2.0, self.own], [0, 1, 2])
        (second,) = handing_over([self.shared], [0])
        return (first[0] * first[1] * first[2]).sum() + (second**2).sum()

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        shared, own = self.shared.detach(), self.own.detach()
        return 2.0 * own + 2.0 * shared, 2.0 * shared


def test_gradients_are_added_up() -> None:
    model = Shared()
    for count in range(1, 4):
        model.loss().backward()
        for parameter, expected in zip((model.shared, model.own), model.expected(), strict=True):
            torch.testing.assert_close(parameter.grad, count * expected)


def test_what_is_held_is_added_to_in_place_and_before_the_backward_ends() -> None:
    model = Shared()
    model.loss().backward()
    held = model.shared.grad
    assert held is not None
    seen: list[torch.Tensor] = []
    first = handing_over([model.shared], [0])[0]
    middle = first * 1.0
    # Runs after the later reader's share has arrived, before the earlier reader's.
    middle.register_hook(lambda _: seen.append(held.clone()))
    before = held.clone()
    (middle.sum() + (handing_over([model.shared], [0])[0] ** 2).sum()).backward()
    torch.testing.assert_close(seen[0], before + 2.0 * model.shared.detach())
    assert model.shared.grad is held


def _asked_for(model: Shared) -> None:
    found = torch.autograd.grad(model.loss(), [model.shared, model.own])
    for gradient, expected in zip(found, model.expected(), strict=True):
        torch.testing.assert_close(gradient, expected)


def _left_out(model: Shared) -> None:
    assert model.own.grad is not None
    before = model.own.grad.clone()
    model.loss().backward(inputs=[model.own])
    torch.testing.assert_close(model.own.grad - before, model.expected()[1])


def _differentiable(model: Shared) -> None:
    (gradient,) = torch.autograd.grad(model.loss(), [model.shared], create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), [model.own])
    torch.testing.assert_close(second, torch.full((3,), 2.0))


@pytest.mark.parametrize("use", [_asked_for, _left_out, _differentiable])
def test_gradients_that_are_only_asked_for_are_not_added(use: Callable[[Shared], None]) -> None:
    model = Shared()
    model.loss().backward()
    assert model.shared.grad is not None
    before = model.shared.grad.clone()
    use(model)
    assert torch.equal(model.shared.grad, before)


def test_hooks_see_the_whole_gradient() -> None:
    model = Shared()
    model.loss().backward()
    seen: list[torch.Tensor] = []
    handle = model.shared.register_hook(lambda gradient: seen.append(gradient.clone()))
    assert is_watched(model.shared) and not is_watched(model.own)
    model.loss().backward()
    handle.remove()
    assert not is_watched(model.shared)
    handle = model.own.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    assert is_watched(model.own)
    model.loss().backward()
    handle.remove()
    torch.testing.assert_close(seen, [model.expected()[0], 3.0 * model.expected()[1]])


def test_without_gradients_nothing_is_wrapped() -> None:
    model = Shared()
    with torch.no_grad():
        assert handing_over([model.shared], [0])[0] is model.shared
    made = model.shared * 2.0
    assert handing_over([made, None, 3], [0, 1, 2])[0] is made


class Tied(nn.Module):
    """A wide table that the first and the last call read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8192, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        return (x @ self.table.weight[:64].t()).square().mean()


def _held(*, watched: bool) -> graphopt.Optimized:
    torch.manual_seed(0)
    model = Tied()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if watched:
        model.table.weight.register_hook(lambda gradient: gradient)
    torch._dynamo.reset()
    return graphopt.optimize(model, (torch.arange(16),), emit="inductor", on_error="raise")


def test_the_later_share_of_a_tied_table_does_not_wait_for_the_earlier() -> None:
    free, watched = _held(watched=False), _held(watched=True)
    table = free.table.weight.nbytes
    # Both shares at once where a hook waits for their sum.
    assert watched.plan.predicted.peak_bytes - free.plan.predicted.peak_bytes == pytest.approx(table, rel=0.1)
    for fast in (free, watched):
        assert fast.measure(repeats=1).peak_bytes == pytest.approx(fast.plan.predicted.peak_bytes, rel=0.02)
