"""Whole training steps, run eagerly and optimized, to be compared number by number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

import graphopt
from graphopt.step_cost import step_curve

__all__ = ["Step", "assert_close", "assert_same", "budgeted", "deterministic", "loss_of", "run_step"]


@dataclass
class Step:
    """What one step left behind: outputs, gradients of parameters and inputs, buffers, random state."""

    outputs: list[Any]
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    random: torch.Tensor


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def loss_of(output: Any) -> torch.Tensor:
    """The output's ``loss``, or the sum of its scalars, or a weighted sum of everything in it."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    scalars = [t for t in leaves if t.dim() == 0]
    return torch.stack([t.float().sum() for t in (scalars or leaves)]).sum()


def run_step(
    module: torch.nn.Module, inputs: Any, loss: Callable[[Any], torch.Tensor] = loss_of, *, seed: int = 7
) -> Step:
    """One forward and backward under ``seed``, gradients absent at its beginning."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    for tensor in (*module.parameters(), *tensors):
        tensor.grad = None
    torch.manual_seed(seed)
    output = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    loss(output).backward()
    gradients = {name: _copy(p.grad) for name, p in module.named_parameters()}
    gradients |= {f"input {i}": _copy(t.grad) for i, t in enumerate(tensors)}
    outputs = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in pytree.tree_leaves(output)]
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    return Step(outputs, gradients, buffers, torch.get_rng_state())


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def assert_same(left: Step, right: Step) -> None:
    """Bit for bit."""
    _compare(left, right, lambda a, b: a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)))
    assert torch.equal(left.random, right.random), "the random generators stand elsewhere"


def assert_close(left: Step, right: Step, tolerance: float = 1e-4) -> None:
    """Within rounding: other kernels may sum in another order."""

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)

    _compare(left, right, close)
    assert torch.equal(left.random, right.random), "the random generators stand elsewhere"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(tensor) if tensor.is_floating_point() else tensor


def _compare(left: Step, right: Step, equal: Callable[[torch.Tensor, torch.Tensor], bool]) -> None:
    assert len(left.outputs) == len(right.outputs)
    for index, (a, b) in enumerate(zip(left.outputs, right.outputs, strict=True)):
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape and equal(a, b), f"output {index} differs: {a} and {b}"
        elif isinstance(a, (str, int, float, bool)) or a is None:
            assert a == b, f"output {index} differs: {a} and {b}"
        else:
            assert type(a) is type(b), f"output {index} differs: {a} and {b}"
    for kind in ("gradients", "buffers"):
        ours, theirs = getattr(left, kind), getattr(right, kind)
        assert ours.keys() == theirs.keys()
        for name, a in ours.items():
            b = theirs[name]
            assert (a is None) == (b is None), f"{kind} of {name}: {a} and {b}"
            assert a is None or equal(a, b), f"{kind} of {name} differ: {a} and {b}"


def budgeted(
    make: Callable[[], torch.nn.Module],
    inputs: Any,
    loss: Callable[[Any], torch.Tensor] = loss_of,
    *,
    part: float = 0.0,
    recomputes: bool = True,
    tolerance: float = 1e-4,
    steps: int = 2,
    slack: int = 64,
    **options: Any,
) -> graphopt.Optimized:
    """Run ``steps`` steps of a model eagerly, unbudgeted and budgeted, and compare all of them.

    The budget lies at ``part`` of the way from the least peak that any plan reaches to the
    baseline's. Returns the budgeted module. Both give the same bits, unless the budgeted one runs an
    alternative, which rounds in another order. Asserts that something is recomputed unless told not to,
    and that both peaks are as predicted within 0.1 % (``slack`` bytes for the smallest models).
    """
    torch.manual_seed(0)
    plain = make()
    options = {"emit": "eager", "on_error": "raise", **options}
    free_model, tight_model = copy.deepcopy(plain), copy.deepcopy(plain)
    torch._dynamo.reset()
    with deterministic():
        free = graphopt.optimize(free_model, inputs, **options)
        front = step_curve(free._driver.session, free._driver.session.static_bytes or 0)
        least, most = front[0][0], free.plan.baseline.peak_bytes
        tight = graphopt.optimize(tight_model, inputs, budget=int(least + part * (most - least)), **options)
        again = [name for choice in tight.plan.choices for name in choice.schedule.recomputed]
        assert again or not recomputes, "the least plan recomputes nothing: the test proves nothing"
        rewritten = _forms(tight) != _forms(free)
        for number in range(steps):
            expected = run_step(plain, inputs, loss, seed=number)
            unbudgeted = run_step(free, inputs, loss, seed=number)
            within = run_step(tight, inputs, loss, seed=number)
            assert_close(unbudgeted, expected, tolerance)
            if rewritten:
                assert_close(within, unbudgeted, tolerance)
            else:
                assert_same(within, unbudgeted)
        for module in (free, tight):
            predicted = module.plan.predicted.peak_bytes
            measured = module.measure(inputs, repeats=1).peak_bytes
            assert abs(measured - predicted) <= max(predicted // 1000, slack), (predicted, measured)
    return tight


def _forms(module: graphopt.Optimized) -> list[str]:
    return [choice.alternative for choice in module.plan.choices]
