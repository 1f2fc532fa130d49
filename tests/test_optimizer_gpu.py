"""Optimizers on CUDA: ``FusedStep`` beside ``torch.optim``, updates in a program beside the module itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import recording
from graphopt.program import Level
from graphopt_kernels.fused_optimizer import FusedStep
from graphopt_kernels.optimizer_update import adam_update, sgd_update
from tests.update_programs import UPDATES, Trained, Updates

pytestmark = pytest.mark.gpu

SHAPES = ((300, 257), (1024,), (7, 3, 11), (16384 * 2 + 5,), (1,))

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=False),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=False),
}


@pytest.fixture(autouse=True)
def _needs_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fused_steps_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    """In bfloat16 ours rounds once where torch rounds at each operator: as far from the same steps in float64
    as torch's are, and a rounding."""
    torch.manual_seed(0)
    first = [torch.randn(shape, device="cuda").to(dtype) for shape in SHAPES]
    ours, theirs, exact = (
        [nn.Parameter(x.to(kind)) for x in first] for kind in (dtype, dtype, torch.float64)
    )
    step = FusedStep(OPTIMIZERS[name](ours))
    others = OPTIMIZERS[name](theirs), OPTIMIZERS[name](exact)
    for _ in range(3):
        for k, shape in enumerate(SHAPES):
            gradient = torch.randn(shape, device="cuda").to(dtype)
            ours[k].grad, theirs[k].grad, exact[k].grad = gradient.clone(), gradient, gradient.double()
        step()
        for optimizer in others:
            optimizer.step()
    if dtype is torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        return
    for a, b, right in zip(ours, theirs, exact, strict=True):
        errors = [float((x.double() - right).abs().max()) for x in (a, b)]
        assert errors[0] <= 1.1 * errors[1] + 2.0**-8 * float(right.abs().max())


def states(model: nn.Module) -> list[Tensor]:
    return [value.float() for value in model.state_dict().values()]


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_updates_in_a_program_are_those_of_the_module(name: str, emit: str) -> None:
    torch._dynamo.reset()
    ours = Updates(UPDATES[name]).cuda()
    theirs = copy.deepcopy(ours)
    given = [[torch.randn_like(p) for p in ours.p] for _ in range(4)]
    fast = graphopt.optimize(ours, (given[0],), emit=emit, on_error="raise")
    programs = [p for p in fast.programs if p.level is Level.JOINT]
    fused = [n for p in programs for n in p.nodes() if n.target in (adam_update, sgd_update)]
    # Of calls on lists generated code is one kernel already.
    assert bool(fused) == (emit == "eager" or name != "on_lists")
    for each in given:
        fast(each)
        theirs(each)
    torch.testing.assert_close(states(ours), states(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_updates_are_replayed(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step writes the same parameters at each replay."""
    torch._dynamo.reset()
    monkeypatch.setattr(recording, "HOST_BOUND", 0.0)
    ours = Updates(UPDATES["adamw"]).cuda()
    theirs = copy.deepcopy(ours)
    given = [[torch.randn_like(p) for p in ours.p] for _ in range(6)]
    fast = graphopt.optimize(
        ours, (given[0],), emit="inductor", cuda_graphs=cuda_graphs, on_error="raise"
    )  # fmt: skip
    for each in given:
        fast(each)
        theirs(each)
    torch.testing.assert_close(states(ours), states(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_whole_steps_are_those_of_the_module(whole: bool, emit: str) -> None:
    torch._dynamo.reset()
    ours = Trained(whole=whole, width=128).cuda()
    theirs = copy.deepcopy(ours)
    data = [
        (torch.randn(64, 128, device="cuda"), torch.randint(0, 4, (64,), device="cuda")) for _ in range(3)
    ]
    with torch.set_grad_enabled(not whole):
        fast = graphopt.optimize(ours, data[0], emit=emit, on_error="raise")
        for x, y in data:
            torch.testing.assert_close(fast(x, y), theirs(x, y), rtol=1e-4, atol=1e-5)
    # Adam divides by the root of squares: of gradients that are nearly zero the last bits decide.
    torch.testing.assert_close(states(ours), states(theirs), rtol=1e-3, atol=1e-4)
