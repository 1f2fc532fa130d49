"""Modules that update parameters in their forward, as models write it, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UPDATES", "Trained", "Updates"]

Tensors = list[Tensor]
Update = Callable[[nn.Module, Tensors, Tensors, Tensors, Tensors], object]


class Updates(nn.Module):
    """Parameters, two states of each, a count of steps; ``forward(gradients)`` updates them."""

    def __init__(self, update: Update, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.update = update
        self.p = nn.ParameterList(torch.randn(shape, dtype=dtype) for shape in ((4, 3), (5,), (2, 2, 2)))
        self.m, self.v, self.more = (
            nn.ParameterList(torch.zeros_like(p) for p in self.p).requires_grad_(False) for _ in range(3)
        )
        self.register_buffer("count", torch.zeros(()))

    def forward(self, gradients: Tensors) -> object:
        with torch.no_grad():
            self.count.add_(1)
            return self.update(self, list(self.p), gradients, list(self.m), list(self.v))


def adamw(step: nn.Module, p: Tensors, g: Tensors, m: Tensors, v: Tensors) -> None:
    """Tensor by tensor in place, the rate's correction on the device."""
    for p_, g_, m_, v_ in zip(p, g, m, v, strict=True):
        p_.mul_(1 - 1e-3)
        m_.lerp_(g_, 0.1)
        v_.mul_(0.99).addcmul_(g_, g_, value=0.01)
        root = v_.sqrt() / (1 - 0.99**step.count).sqrt() + 1e-8
        p_.addcdiv_(m_ * (-1e-2 / (1 - 0.9**step.count)), root)


def adam(step: nn.Module, p: Tensors, g: Tensors, m: Tensors, v: Tensors) -> None:
    """As in the paper: corrected averages, a decay that goes through the gradient."""
    for p_, g_, m_, v_ in zip(p, g, m, v, strict=True):
        g_ = g_ + 0.1 * p_
        m_.copy_(0.9 * m_ + 0.1 * g_)
        v_.copy_(0.99 * v_ + 0.01 * g_**2)
        average, square = m_ / (1 - 0.9**step.count), v_ / (1 - 0.99**step.count)
        p_.sub_(1e-3 * average / (square.sqrt() + 1e-8))


def on_lists(step: nn.Module, p: Tensors, g: Tensors, m: Tensors, v: Tensors) -> None:
    torch._foreach_mul_(p, 1 - 1e-3)
    torch._foreach_lerp_(m, g, 0.1)
    torch._foreach_mul_(v, 0.99)
    torch._foreach_addcmul_(v, g, g, 0.01)
    root = torch._foreach_sqrt(v)
    torch._foreach_div_(root, (1 - 0.99**step.count).sqrt())
    torch._foreach_add_(root, 1e-8)
    torch._foreach_addcdiv_(p, m, root, -0.01)


def clipped(step: nn.Module, p: Tensors, g: Tensors, m: Tensors, v: Tensors) -> None:
    """Gradients scaled by a number on the device, an update without corrections."""
    norm = torch.stack([g_.norm() for g_ in g]).norm()
    factor = (1.0 / (norm + 1e-6)).clamp(max=1.0)
    for p_, g_, m_, v_ in zip(p, g, m, v, strict=True):
        g_ = g_ * factor
        m_.lerp_(g_, 0.1)
        v_.mul_(0.99).add_(g_ * g_ * 0.01)
        p_.addcdiv_(m_, v_.sqrt().add_(1e-8), value=-0.01)


def summed(step: nn.Module, p: Tensors, g: Tensors, m: Tensors, v: Tensors) -> None:
    """What is computed of a gradient is one value for the operator."""
    clean = [g_ + g_.tanh() * 2 for g_ in g]
    adamw(step, p, clean, m, v)


def sgd(step: nn.Module, p: Tensors, g: Tensors, m: Tensors, v: Tensors) -> None:
    for p_, g_ in zip(p, g, strict=True):
        p_.copy_(p_ - 0.1 * (g_ + 0.01 * p_))


def momentum(step: nn.Module, p: Tensors, g: Tensors, m: Tensors, v: Tensors) -> None:
    for p_, g_, m_ in zip(p, g, m, strict=True):
        m_.mul_(0.9).add_(g_ + 0.1 * p_, alpha=0.8)
        p_.sub_(m_, alpha=0.1)


def nesterov(step: nn.Module, p: Tensors, g: Tensors, m: Tensors, v: Tensors) -> None:
    """Upwards: maximize=True."""
    for p_, g_, m_ in zip(p, g, m, strict=True):
        g_ = -g_ + 0.1 * p_
        m_.mul_(0.9).add_(g_)
        p_.sub_(g_ + 0.9 * m_, alpha=0.1)


UPDATES = {f.__name__: f for f in (adamw, adam, on_lists, clipped, summed, sgd, momentum, nesterov)}


class Trained(nn.Module):
    """A whole step: forward, gradients, update. Returns the loss. ``whole``: by ``torch.func``, so that
    dynamo makes one graph of it; else by ``torch.autograd.grad``, and the update is a graph of its own."""

    def __init__(self, *, whole: bool, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
        self.model, self.whole = nn.Sequential(*layers, nn.Linear(width, 4)), whole
        self.m, self.v = (
            nn.ParameterList(torch.zeros_like(p) for p in self.model.parameters()).requires_grad_(False)
            for _ in range(2)
        )
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        names, parameters = zip(*self.model.named_parameters(), strict=True)

        def loss_of(given: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(self.model, given, (x,)), y)

        if self.whole:
            found, loss = torch.func.grad_and_value(loss_of)(dict(zip(names, parameters, strict=True)))
            gradients = [found[name] for name in names]
        else:
            loss = F.cross_entropy(self.model(x), y)
            gradients = list(torch.autograd.grad(loss, parameters))
        with torch.no_grad():
            self.count.add_(1)
            adamw(self, list(parameters), gradients, list(self.m), list(self.v))
        return loss.detach()
