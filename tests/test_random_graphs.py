"""Random networks under random budgets: the numbers of the unbudgeted run, the peak as predicted.

Each network is drawn from a seed: products, reductions, views, writes in place, dropout, batch
statistics, weights used again. A failure names its seed; ``Net(seed)`` is the whole example.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.steps import budgeted

ROWS, WIDTH = 48, 32


class Net(nn.Module):
    """Twelve random steps over a pool of ``[ROWS, WIDTH]`` values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.steps = [(draw.choice(STEPS), draw.random(), draw.random()) for _ in range(12)]
        drawn = [torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(3)]
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in drawn)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = [x]
        for step, first, second in self.steps:
            a, b = pool[int(first * len(pool))], pool[-1]
            pool.append(step(self, a, b, self.weights[int(second * len(self.weights))]))
        return torch.stack([value.tanh().mean() for value in pool[-3:]]).sum()


def _product(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.gelu(b @ w + a)


def _linear(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(a, w).sigmoid() * b


def _dropout(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.dropout(b.exp().clamp(max=3.0), 0.25, net.training) - a


def _noise(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return b.tanh() * torch.rand_like(a) + a.sin()


def _softmax(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.softmax(b, -1) * a + (b.square().mean(-1, keepdim=True) + 1.0).rsqrt()


def _views(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    halves = b.view(ROWS, 2, WIDTH // 2).transpose(1, 2).reshape(ROWS, WIDTH)
    return halves.sin() * a.t().contiguous().t()


def _split(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    left, right = b.chunk(2, dim=-1)
    return torch.cat([right.exp().clamp(max=2.0), left * a[:, : WIDTH // 2]], dim=-1)


def _in_place(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    c = (b * 1.5).neg_()
    c[:, ::2] += a[:, ::2].tanh()
    c.view(-1, 2)[:, 1].mul_(0.5)
    return c


def _batch_norm(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return net.norm(b).tanh() + a


def _buffer(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    before = net.seen.clone()
    with torch.no_grad():
        net.seen.mul_(0.5).add_(b.mean(0), alpha=0.5)
    return b.cos() * (1.0 + before) + a * 0.5


def _attention(net: Net, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.view(1, ROWS, 4, WIDTH // 4).transpose(1, 2) for t in (a @ w, b @ w.t(), b))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(ROWS, WIDTH)


STEPS = [
    _product,
    _linear,
    _dropout,
    _noise,
    _softmax,
    _views,
    _split,
    _in_place,
    _batch_norm,
    _buffer,
    _attention,
]


def check(seed: int) -> None:
    """Compare the network of ``seed`` at a random budget with itself unbudgeted and with eager."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    needs_gradient = draw.random() < 0.5
    x = torch.randn(ROWS, WIDTH, requires_grad=needs_gradient)
    part = draw.choice([0.0, 0.0, draw.random()])
    budgeted(lambda: Net(seed), (x,), part=part, recomputes=False, tolerance=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_keep_their_numbers_and_their_peak(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_random_networks_keep_their_numbers_and_their_peak(seed: int) -> None:
    check(seed)
