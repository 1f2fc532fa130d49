"""Run a step and put back what it changed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["cuda_devices", "random_state_restored", "restored"]


def cuda_devices(model: torch.nn.Module) -> list[int]:
    """Numbers of the GPUs that a model is on: those whose random state a step may change."""
    state = (*model.parameters(), *model.buffers())
    return sorted({tensor.device.index for tensor in state if tensor.device.type == "cuda"})


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Afterwards the default generators of torch (on the CPU), NumPy and Python are where they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


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
    try:
        with random_state_restored():
            yield
    finally:
        with torch.no_grad():
            for leaf, (gradient, value) in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
            for tensor, value in (*buffers, *others):
                # A write that changes nothing would still be one to a backward that waits.
                if not torch.equal(tensor, value.to(tensor.device)):
                    tensor.copy_(value)
