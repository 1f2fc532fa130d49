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


class AttendingBeside(nn.Module):
    """Attention that has no gradient, of what the second of two calls of a norm gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.w = nn.BatchNorm1d(8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.norm(x), self.norm(x.sin())
        q = (second @ self.w).reshape(1, 2, 8, 8)
        return nn.functional.scaled_dot_product_attention(q, q, q), first.square().mean()


def test_the_backward_is_handed_nothing_that_attention_of_the_forward_alone_reads() -> None:
    torch._dynamo.reset()
    x = X.reshape(-1, 8)[:16]
    plain, model = AttendingBeside(), AttendingBeside()
    fast = graphopt.optimize(model, (x,), emit="eager", cache=False, on_error="raise")
    for module in (plain, fast):
        attended, loss = module(x)
        loss.backward()
    assert torch.equal(attended, AttendingBeside()(x)[0])
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    (_, backward) = fast._driver.session.current[0].lowered
    given = backward.graph.find_nodes(op="placeholder")
    assert [node.name for node in given if not node.users] == []


def test_effects_that_no_order_lists_happen_unless_they_do_elsewhere() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    noise = graph.call_function(torch.ops.aten.rand_like.default, (x,))
    graph.call_function(torch.ops.aten.add_.Tensor, (x, 1))
    graph.output((x,))
    names = [[node.name for node in ordered(graph, (), done).nodes] for done in (set(), {noise.name})]
    assert names == [["x", "rand_like_default", "add__tensor", "output"], ["x", "add__tensor", "output"]]
