"""Semantic graphs of real models for tests, with the arguments that dynamo's runtime passes to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt.capture.semantic import semantic_graph

__all__ = ["Captured", "capture"]


@dataclass
class Captured:
    """One semantic graph, and the real inputs of its first call."""

    gm: fx.GraphModule
    inputs: list[Any]


def capture(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> list[Captured]:
    """Every graph that one call of ``function`` gives. A call leaves the model's buffers as they were."""
    captured: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        entry = Captured(semantic_graph(gm, example_inputs), [])
        captured.append(entry)

        def call(*inputs: Any) -> Any:
            if not entry.inputs:
                entry.inputs = [x.detach().clone() if _is_buffer(x) else x for x in inputs]
            return gm(*inputs)

        return call

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return captured


def _is_buffer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.requires_grad
