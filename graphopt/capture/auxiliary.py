"""Outputs that are cut off from autograd until somebody does differentiate them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch

__all__ = ["reattach"]


def reattach(
    run: Callable[..., Any], gm: fx.GraphModule, indices: Sequence[int], on_use: Callable[[], None]
) -> Callable[..., Any]:
    """``run`` with a gradient for its detached outputs ``indices``, computed only if asked for.

    The first backward through one of them runs ``gm`` (the captured graph) again in eager mode,
    under the random state of its forward, and differentiates that: slow and correct. ``on_use``
    is told, so that later programs can be compiled with the gradient inside.
    """

    def call(*inputs: Any) -> Any:
        state = _random_state(inputs) if torch.is_grad_enabled() else None
        outputs = list(run(*inputs))
        if state is None:
            return outputs
        tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        if tensors:
            apply: Any = _Auxiliary.apply
            for index in indices:
                outputs[index] = apply(outputs[index], (gm, inputs, index, state, on_use), *tensors)
        return outputs

    return call


class _Auxiliary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, replay: Any, *tensors: torch.Tensor) -> torch.Tensor:
        gm, inputs, index, state, on_use = replay
        ctx.replay = (gm, index, state, on_use)
        ctx.layout = [isinstance(x, torch.Tensor) for x in inputs]
        ctx.others = [x for x in inputs if not isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gm, index, state, on_use = ctx.replay
        on_use()
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [_leaf(next(tensors)) if is_tensor else next(others) for is_tensor in ctx.layout]
        devices = sorted({t.device.index for t in ctx.saved_tensors if t.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.set_rng_state(state[0])
            for device, cuda_state in zip(devices, state[1], strict=True):
                torch.cuda.set_rng_state(cuda_state, device)
            output = list(_torch.run_as_captured(gm, inputs))[index]
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        return (None, None, *torch.autograd.grad(output, wanted, gradient, allow_unused=True))


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf to differentiate to; what needs no gradient is copied, since replay may write to it."""
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor.clone()


def _random_state(inputs: Sequence[Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    devices = sorted(
        {x.device.index for x in inputs if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
    )
    return torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
