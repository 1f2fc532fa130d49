"""Many steps under a budget: the curve is that of eager bit for bit, nothing grows or is compiled again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

import graphopt

WARM = 5
"""Steps after which the optimizer has its state and every program was compiled."""


class Decoder(nn.Module):
    """Two layers of causal attention over characters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(32, 24), nn.Parameter(torch.randn(16, 24) * 0.1)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(24), "qkv": nn.Linear(24, 72), "out": nn.Linear(24, 24),
                    "after": nn.LayerNorm(24), "up": nn.Linear(24, 96), "down": nn.Linear(96, 24),
                }
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(24, 32)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place
        for layer in self.layers:
            parts = layer["qkv"](layer["norm"](x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (2, 12)).transpose(1, 2) for part in parts)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + nn.functional.dropout(layer["out"](mixed.transpose(1, 2).flatten(2)), 0.1)
            x = x + layer["down"](nn.functional.gelu(layer["up"](layer["after"](x))))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences in which each character follows from the one before it, and one in ten from nothing."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, 32, (16, 17), generator=generator)
    noise = torch.rand(16, 17, generator=generator) < 0.1
    for at in range(1, 17):
        rows[:, at] = torch.where(noise[:, at], rows[:, at], (3 * rows[:, at - 1] + 7) % 32)
    return rows[:, :-1], rows[:, 1:]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operators of this size take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors() -> tuple[int, int]:
    """How many tensors there are, and bytes of their storages. Fake ones have none."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not is_fake(x)]
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in found if not x.is_meta}
    return len(found), sum(sizes.values())


def fakes() -> int:
    return sum(issubclass(type(x), torch.Tensor) and is_fake(x) for x in gc.get_objects())


def train(module: nn.Module, steps: int) -> tuple[list[float], list[tuple[int, int]], list[int]]:
    """(losses; tensors and bytes; graphs that dynamo has compiled), the latter a few times on the way."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    torch.manual_seed(1)
    losses, alive, compiled = [], [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = module(*batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        del loss
        if step >= WARM and step % max(steps // 10, 5) == 0:
            alive.append(tensors())
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return losses, alive, compiled


@pytest.mark.parametrize("steps", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_long_training_is_eagers_and_nothing_grows(steps: int) -> None:
    torch._dynamo.reset()
    expected, _, _ = train(Decoder(), steps)
    model = Decoder()
    fast = graphopt.optimize(model, batch(0), budget="85%", emit="eager", cache=False, on_error="raise")
    assert any(choice.recomputed for choice in fast.plan.choices)
    found, alive, compiled = train(fast, steps)
    assert found == expected
    assert sum(found[-10:]) < 0.95 * sum(found[:10])
    assert len(alive) >= 5 and len(set(alive)) == 1, alive
    assert len(set(compiled)) == 1 and len(fast._driver.session.captured) == 1


def of_torch() -> nn.Module:
    """Dynamo compiles code of its own for modules of torch, and keeps that for good."""
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


KINDS = {"own": (Decoder, lambda: batch(0), "85%"), "nn": (of_torch, lambda: (torch.ones(8, 16),), None)}


def fakes_that_torch_leaves(kind: str) -> int:
    """Descriptions of inputs that each compilation leaves behind, without graphopt."""
    make, inputs, _ = KINDS[kind]
    counts = []
    for _ in range(3):
        torch._dynamo.reset()
        torch.compile(make(), backend="eager")(*inputs()).sum().backward()
        torch._dynamo.reset()
        gc.collect()
        counts.append(fakes())
    return counts[-1] - counts[-2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cycles", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_what_was_optimized_and_deleted_is_gone(kind: str, cycles: int) -> None:
    make, inputs, budget = KINDS[kind]
    left = fakes_that_torch_leaves(kind)
    seen: list[tuple[int, int]] = []
    counts = []
    for _ in range(cycles):
        model = make()
        fast = graphopt.optimize(model, inputs(), budget=budget, emit="eager", cache=False, on_error="raise")
        fast(*inputs()).sum().backward()
        gone = [weakref.ref(model), weakref.ref(fast), weakref.ref(fast._driver.session)]
        del model, fast
        seen.append(tensors())
        counts.append(fakes())
        assert [kept() for kept in gone] == [None, None, None]
    # The first cycle leaves what torch sets up once.
    assert len(set(seen[1:])) == 1, seen
    assert counts[-1] - counts[1] <= left * (cycles - 2), counts
