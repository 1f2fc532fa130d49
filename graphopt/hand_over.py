"""Add gradients of parameters to what they are added to as soon as a call's backward has made them.

Autograd adds the gradients of one tensor up before it hands them over. Where two calls of a chain read one
parameter, as a tied embedding and head do, the share of the later call waits, in memory of its own, until
the backward of the earlier one has run::

    without:  head's backward -> 501 MiB wait for the whole backward -> embedding's backward -> added to .grad
    with:     head's backward -> added to .grad ...                  -> embedding's backward -> added to .grad

Each call reads its parameters through ``handing_over``, whose backward adds all of the call's gradients at
once and hands nothing on. Sums are made in another order where ``.grad`` is
not zero: ``(held + late) + early`` instead of ``held + (late + early)``.

Only where nobody could tell otherwise (``held_gradient``): ``.grad`` is there already and looks like its
parameter, the backward that runs would add to it (not ``torch.autograd.grad``, no ``inputs=`` without the
parameter), no graph of the backward is asked for, and no hook waits for the gradient. Everything else goes
autograd's way. Of gradients that the products that make them have added (``graphopt.emit.held_products``)
nothing arrives here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt import _torch

__all__ = ["after_adding", "handing_over", "held_gradient", "is_watched", "leaf_of"]

LARGE = 2 << 20
"""Bytes of a gradient beyond which a launch of its own costs less than it gains."""


def is_watched(parameter: torch.Tensor) -> bool:
    """Whether hooks of the tensor wait for its gradient."""
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def handing_over(values: list[Any], positions: Sequence[int]) -> list[Any]:
    """``values`` with the leaves among ``positions`` that are trained replaced by views, through which their
    gradients go straight to ``.grad`` where that may be. The list is changed in place and returned."""
    leaves = [k for k in positions if _is_plain_leaf(values[k])]
    if leaves and torch.is_grad_enabled():
        views = _HandOver.apply(*(values[k] for k in leaves))  # type: ignore[no-untyped-call]
        for k, view in zip(leaves, views, strict=True):
            values[k] = view
    return values


def _is_plain_leaf(value: Any) -> bool:
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.is_leaf
        and value.requires_grad
        and value.layout == torch.strided
    )


class _HandOver(torch.autograd.Function):
    """Views of leaves; the backward adds to their ``.grad`` what it may and hands on the rest."""

    @staticmethod
    def forward(ctx: Any, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.leaves = leaves
        ctx.stream = _stream_of(leaves[0])
        ctx.set_materialize_grads(False)
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.compiler.is_compiling():
            # Compiled autograd traces the backward: what it adds to is not there yet.
            return gradients
        into: list[torch.Tensor] = []
        added: list[torch.Tensor] = []
        left: list[torch.Tensor | None] = []
        for leaf, gradient in zip(ctx.leaves, gradients, strict=True):
            if gradient is not None and _may_add(leaf, gradient):
                into.append(leaf.grad)
                added.append(gradient)
                left.append(None)
            else:
                left.append(gradient)
        if into:
            _add(into, added)
            after_adding(ctx.stream)
        return tuple(left)


def _add(into: list[torch.Tensor], added: list[torch.Tensor]) -> None:
    """Add tensors to others: small ones in one launch, large ones each in its own, which moves more bytes a
    second."""
    large = [held.numel() * held.element_size() >= LARGE for held in into]
    together = [[t for t, alone in zip(ts, large, strict=True) if not alone] for ts in (into, added)]
    if together[0]:
        torch._foreach_add_(*together)
    for held, gradient, alone in zip(into, added, large, strict=True):
        if alone:
            held.add_(gradient)


def _may_add(leaf: torch.Tensor, gradient: torch.Tensor) -> bool:
    held = held_gradient(leaf) if type(gradient) is torch.Tensor else None
    return (
        held is not None
        and (held.shape, held.dtype, held.device) == (gradient.shape, gradient.dtype, gradient.device)
        and gradient.layout == torch.strided
    )


def held_gradient(leaf: torch.Tensor) -> torch.Tensor | None:
    """``leaf.grad`` where the backward that runs now may add to it in place and nobody could tell; else
    ``None``."""
    held = leaf.grad
    adds = (
        type(held) is torch.Tensor
        and not torch.is_grad_enabled()
        and not held.requires_grad
        and held.layout == torch.strided
        and not is_watched(leaf)
        and _torch.adds_unseen_to_gradient_of(leaf)
    )
    return held if adds else None


def leaf_of(node: Any, position: int) -> torch.Tensor | None:
    """The leaf that gradient number ``position`` of a node of autograd's graph belongs to, whether the node
    was given the leaf itself or its view of ``handing_over``; ``None`` for what was computed."""
    taker, number = _torch.takes_gradient(node, position)
    if _torch.is_backward_of(taker, _HandOver):
        leaf: torch.Tensor = taker.leaves[number]
        return leaf
    return _torch.accumulates_into(taker)


def after_adding(stream: torch.cuda.Stream | None) -> None:
    """Kernels that were queued on ``stream`` have added to gradients: at the end of the backward that runs,
    whoever called it waits for them."""
    if stream is not None:
        _torch.after_backward(lambda: _wait_for(stream))


def _stream_of(leaf: torch.Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(leaf.device) if leaf.device.type == "cuda" else None


def _wait_for(stream: torch.cuda.Stream) -> None:
    """Who called the backward finds the gradients added, as autograd would have it."""
    here = torch.cuda.current_stream(stream.device)
    if here != stream:
        here.wait_stream(stream)
