"""CUDA graphs of whole steps: the same numbers as steps that are launched kernel by kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt
from graphopt import recording

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(recording, "HOST_BOUND", 0.0)


class Net(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layers = [
            torch.nn.Sequential(
                torch.nn.LayerNorm(512),
                torch.nn.Linear(512, 1024),
                torch.nn.GELU(),
                torch.nn.Linear(1024, 512),
            )
            for _ in range(4)
        ]
        self.layers, self.dropout = torch.nn.ModuleList(layers), torch.nn.Dropout(dropout)
        self.norm = torch.nn.BatchNorm1d(512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.dropout(layer(x))
        return self.norm(x).square().mean()


def steps(cuda_graphs: bool, *, dropout: float = 0.0, count: int = 6) -> tuple[Any, list[torch.Tensor], Any]:
    torch.manual_seed(0)
    net = Net(dropout).cuda()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # Sizes that another test ran with would be symbols, and the guard may find replaying no faster.
    torch._dynamo.reset()
    fast = graphopt.optimize(
        net, (torch.randn(256, 512, device="cuda"),), emit="inductor", cuda_graphs=cuda_graphs, guard="off"
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator("cuda").manual_seed(1)
    torch.manual_seed(2)
    losses = []
    for _ in range(count):
        optimizer.zero_grad(set_to_none=False)
        x = torch.randn(256, 512, device="cuda", generator=generator)
        loss = fast(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return fast, losses, net


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_bitwise_the_same_replayed(dropout: float) -> None:
    launched, before, one = steps(False, dropout=dropout)
    replayed, after, other = steps(True, dropout=dropout)
    notes = [note for note in replayed.report.diagnostics if note.startswith("steps")]
    assert len(notes) == 1 and "replayed from a CUDA graph" in notes[0], notes
    assert not [note for note in launched.report.diagnostics if note.startswith("steps")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    states = one.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gradients_that_are_only_asked_for_are_those_of_the_replayed_forward() -> None:
    fast, _, net = steps(True, dropout=0.3, count=3)
    x = torch.randn(256, 512, device="cuda")
    state = torch.cuda.get_rng_state()
    loss = fast(x)
    found = torch.autograd.grad(loss, list(net.parameters()))
    torch.cuda.set_rng_state(state)
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    fast(x).backward()
    for one, parameter in zip(found, net.parameters(), strict=True):
        assert torch.equal(one, parameter.grad)


def test_inference_is_replayed() -> None:
    torch.manual_seed(0)
    net = Net().cuda().eval()
    torch._dynamo.reset()
    fast = graphopt.optimize(net, (torch.randn(64, 512, device="cuda"),), emit="inductor", guard="off")
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(64, 512, device="cuda")
            torch.testing.assert_close(fast(x), net(x))
    notes = fast.report.diagnostics
    assert any("replayed from a CUDA graph" in note for note in notes), notes
