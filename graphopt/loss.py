"""The scalar that a training step is differentiated from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt.errors import InputsError, brief

__all__ = ["is_differentiable", "loss_of"]


def loss_of(output: Any, loss_fn: Callable[[Any], torch.Tensor] | None = None) -> torch.Tensor:
    """``loss_fn(output)``, or the output's ``loss``, or the sum of all differentiable tensors in it.

    Of several tensors a single scalar is taken alone. Raises ``InputsError`` where nothing can be
    differentiated, ``loss_fn`` raises, or it returns something else than a tensor of one element.
    """
    if loss_fn is not None:
        try:
            made = loss_fn(output)
        except Exception as error:
            raise InputsError(f"loss_fn raised {brief(error)}") from error
        return _checked(made)
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = [
        t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    if not leaves:
        raise InputsError(
            "nothing in the model's output can be differentiated",
            hint="pass loss_fn=, or inputs with which the model returns a loss",
        )
    scalars = [t for t in leaves if t.dim() == 0]
    if len(scalars) == 1:
        return scalars[0]
    return torch.stack([t.sum() for t in (scalars or leaves)]).sum()


def is_differentiable(output: Any) -> bool:
    """Whether a gradient flows to any tensor in ``output``."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)


def _checked(loss: object) -> torch.Tensor:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    what = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    raise InputsError(f"loss_fn returned {what}: expected a tensor of one element")
