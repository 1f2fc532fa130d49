"""A model with statistics, a frozen weight and nested outputs, and plugins that capture it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import graphopt
from graphopt.plugins import Capture, CaptureInputs, CaptureOptions, hookimpl

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
WHO = "plugin 'Inline' of inline"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.last.weight.requires_grad_(False)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor, *, bias: float = 0.5) -> dict[str, Any]:
        y = self.last(self.norm(self.first(x)).relu()) * self.scale + bias
        return {"out": y, "parts": (y.square().mean(), x.sum())}


def plugin(act: Callable[..., Any], name: str = "Inline") -> Any:
    def graphopt_capture(model: Any, inputs: Any, options: Any) -> Any:
        return act(model, inputs, options)

    return type(name, (), {"graphopt_api": 1, "graphopt_capture": hookimpl(staticmethod(graphopt_capture))})()


def optimized(act: Callable[..., Any], model: nn.Module, *more: Any, **options: Any) -> graphopt.Optimized:
    torch._dynamo.reset()
    plugins = (plugin(act), *more)
    return graphopt.optimize(model, (X,), plugins=plugins, **{"emit": "eager", "cache": False, **options})


def symbolic(model: nn.Module, inputs: CaptureInputs, options: CaptureOptions) -> Capture:
    return Capture(fx.symbolic_trace(model))


def exported(model: nn.Module, inputs: CaptureInputs, options: CaptureOptions) -> Capture:
    return Capture(torch.export.export(model, inputs.args, dict(inputs.kwargs)))


def lifted(model: nn.Module, inputs: CaptureInputs, options: CaptureOptions) -> Capture:
    """Flat in and out, parameters and buffers as placeholders; on copies, as tracing writes statistics."""
    model = copy.deepcopy(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    leaves, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
    trees: list[Any] = []

    def flat(*given: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(given[len(state) :]), spec)
        named = dict(zip(state, given[: len(state)], strict=True))
        outputs, tree = pytree.tree_flatten(torch.func.functional_call(model, named, args, kwargs))
        trees.append(tree)
        return outputs

    graph = make_fx(flat)(*state.values(), *leaves)
    return Capture(graph, placeholders=(*state, *range(len(leaves))), out_tree=trees[0])


def renamed(model: nn.Module, inputs: CaptureInputs, options: CaptureOptions) -> Capture:
    """A copy of the model under other names."""
    root = nn.Module()
    root.body = copy.deepcopy(model)
    graph = fx.symbolic_trace(root.body).graph
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"body.{node.target}"
    gm = fx.GraphModule(root, graph)
    state = [*dict(gm.named_parameters()), *dict(gm.named_buffers())]
    return Capture(gm, names={name: name.removeprefix("body.") for name in state})


def step(call: Callable[..., Any], model: nn.Module) -> list[torch.Tensor]:
    out = call(X, bias=0.25)
    loss, total = out["parts"]
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [out["out"].detach(), loss.detach(), total, *gradients, *(b.clone() for b in model.buffers())]
