"""Traces of the Hessian of the loss, weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphopt.loss import loss_of

__all__ = ["hessian_traces"]


def hessian_traces(
    model: nn.Module,
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss_fn: Callable[[Any], torch.Tensor] | None,
    samples: int,
) -> dict[str, float]:
    """Trace of the Hessian of the loss with respect to each of the parameters ``names``, by element.

    Hutchinson's estimate: the mean of v^T H v over ``samples`` random vectors v of signs, drawn from a
    generator of their own. One is drawn for all weights at once; what weights have in common averages out.
    Source: HAWQ-V2 (arXiv:1911.03852).
    """
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    chosen = [parameters[name] for name in names]
    generator = torch.Generator().manual_seed(0)
    found = dict.fromkeys(names, 0.0)
    try:
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(model(*args, **kwargs), loss_fn)
            gradients = torch.autograd.grad(loss, chosen, create_graph=True, allow_unused=True)
            live = [
                (name, p, g)
                for name, p, g in zip(names, chosen, gradients, strict=True)
                if g is not None and g.requires_grad
            ]
            for _ in range(samples if live else 0):
                signs = [_signs(p, generator) for _, p, _ in live]
                products = torch.autograd.grad(
                    [g for _, _, g in live],
                    [p for _, p, _ in live],
                    signs,
                    retain_graph=True,
                    allow_unused=True,
                )
                for (name, p, _), sign, product in zip(live, signs, products, strict=True):
                    if product is not None:
                        found[name] += float((sign * product).double().sum()) / (samples * p.numel())
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
    return found


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return drawn.to(device=like.device, dtype=like.dtype).mul_(2).sub_(1)
