"""Halves of a joint program hold what their schedule lists, and nothing twice."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import nn

import graphopt
from graphopt.partition import ordered
from graphopt.program import Level

X = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))


class Attending(nn.Module):
    """Attention, and the peak at the end of its backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.qkv = nn.Linear(8, 64), nn.Linear(64, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(torch.tanh(self.wide(x))).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return nn.functional.scaled_dot_product_attention(q, k, v).sum()


def test_the_backward_runs_no_attention_of_the_forward() -> None:
    torch._dynamo.reset()
    fast = graphopt.optimize(Attending(), (X,), emit="eager", cache=False)
    nodes = [n for p in fast.programs if p.level is Level.LOWERED for n in p.graph.nodes]
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert sum(node.target is attention for node in nodes) == 1
    assert [n.name for n in nodes if n.op == "call_function" and not n.users] == []
    assert fast.measure(repeats=1).peak_bytes == fast.plan.predicted.peak_bytes


def test_effects_that_no_order_lists_happen_unless_they_do_elsewhere() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    noise = graph.call_function(torch.ops.aten.rand_like.default, (x,))
    graph.call_function(torch.ops.aten.add_.Tensor, (x, 1))
    graph.output((x,))
    names = [[node.name for node in ordered(graph, (), done).nodes] for done in (set(), {noise.name})]
    assert names == [["x", "rand_like_default", "add__tensor", "output"], ["x", "add__tensor", "output"]]
