"""Budgeted, unbudgeted and eager steps give the same numbers, whatever the model does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from graphopt.program import Level
from tests.steps import budgeted

Tensor = torch.Tensor


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.mid = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU())
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.mid(self.embed(ids))).flatten(0, 1), ids.flatten())


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).square().mean()


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        part = (nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.3), nn.LayerNorm(32))
        self.body = nn.Sequential(*[copy.deepcopy(layer) for _ in range(3) for layer in part])

    def forward(self, x: Tensor) -> Tensor:
        return (F.dropout(self.body(x), 0.5, training=self.training) * torch.rand_like(x)).square().mean()


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.gelu(self.b(F.gelu(self.a(x))))
        return self.c(h.float()).square().mean()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.view(-1, 4, 8)[:, 1].mul_(2.0)
        g = torch.sigmoid(h).clone()
        g[:, :8] += h[:, 8:16]
        g.transpose(0, 1)[3].add_(1.0)
        k = F.relu_(self.b(g).t().contiguous().t())
        return (k.exp() * h).mean()


class Pytree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, extra: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
        h = torch.tanh(self.a(x))
        k = torch.tanh(self.b(h)) * extra["w"][0] * scale
        return {"pair": (k, [h, None]), "none": None, "number": 3, "text": "a", "loss_like": k.detach().sum()}


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.softmax(self.teacher(x), -1)
        h = torch.tanh(self.student(torch.sigmoid(self.student(x)).exp())).exp()
        with torch.no_grad():
            h = h + target
        return (torch.tanh(self.student(x)).exp() * h - target).square().mean()


class Mutates(nn.Module):
    """Buffers read before and after they are written, and one replaced by an index write."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("mean", torch.ones(16))
        self.register_buffer("history", torch.zeros(4, 16))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x) * self.mean.clone())
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
            self.history[1] = h[0]
            self.count += 1
        k = torch.sigmoid(self.b(h) + self.mean + self.history.sum(0))
        return (k * h.exp()).mean() + self.count


CASES = {
    "tied weights": (Tied, (torch.randint(0, 50, (8, 12)),)),
    "batch norm": (Norms, (torch.randn(6, 3, 12, 12),)),
    "dropout": (Drops, (torch.randn(64, 32),)),
    "autocast": (Autocast, (torch.randn(64, 32),)),
    "views and in-place": (InPlace, (torch.randn(8, 16),)),
    "pytrees": (Pytree, (torch.randn(64, 16), {"w": [torch.randn(16)]})),
    "inputs with gradients": (
        Pytree,
        (torch.randn(64, 16, requires_grad=True), {"w": [torch.randn(16, requires_grad=True)]}, 2.0),
    ),
    "no_grad regions": (NoGrad, (torch.randn(64, 16),)),
    "mutated buffers": (Mutates, (torch.randn(64, 16),)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_budget_changes_no_number(case: str) -> None:
    make, inputs = CASES[case]
    fast = budgeted(make, inputs)
    assert fast.report.diagnostics == ()


class Regions(nn.Module):
    """``torch.utils.checkpoint`` by the user: plain, and with a policy of its own."""

    def __init__(self, policy: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 16), nn.Tanh())
            for _ in range(3)
        )
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if self.policy:
            options["context_fn"] = _save_products
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False, **options)
        return x.square().mean()


def _save_products() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


@pytest.mark.parametrize("policy", [False, True])
def test_the_users_checkpoint_regions_are_kept(policy: bool) -> None:
    fast = budgeted(lambda: Regions(policy), (torch.randn(64, 16),))
    assert fast.report.diagnostics == ()
    joint = next(p for p in fast.programs if p.level is Level.JOINT)
    saved = {node.name: node for node in joint.find(fast.plan.choices[0].schedule.saved)}
    tagged = {node.name for node in joint.nodes() if node.meta.get("recompute") is not None}
    assert tagged
    assert not any("gelu" in name or "dropout" in name for name in saved), sorted(saved)
