"""Run a step and put back what it changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

__all__ = ["restored"]


@contextmanager
def restored(
    model: torch.nn.Module, leaves: Sequence[torch.Tensor], written: Sequence[torch.Tensor] = ()
) -> Iterator[None]:
    """Afterwards the gradients of ``leaves``, the model's buffers, what is ``written`` besides and the random
    state are what they were."""
    # Copies on the host: the step may write into the gradients, and must not find more memory taken.
    gradients = [(t.grad, None if t.grad is None else t.grad.detach().cpu().clone()) for t in leaves]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    others = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in written]
    random = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(random)
        with torch.no_grad():
            for leaf, (gradient, value) in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
            for tensor, value in (*buffers, *others):
                tensor.copy_(value)
