"""Measuring the program against the model that it was made from, on the inputs of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.guard import Guard, attributes_restored, obstacle
from graphopt.loss import is_differentiable, loss_of
from graphopt.restored import cuda_devices, restored

if TYPE_CHECKING:
    from graphopt.capture.driver import Driver

__all__ = ["judge"]


def judge(
    driver: Driver, guard: Guard, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
) -> None:
    """Measure steps of the program and of the model on these inputs, all that they change put back."""
    session = driver.session
    # What made the inputs is no part of the step.
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, _leaf, (args, kwargs))
    inputs = torch.utils._pytree.tree_leaves((args, kwargs))
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    parameters = [p for p in driver.model.parameters() if p.requires_grad]
    leaves = [*parameters, *(t for t in tensors if t.is_leaf and t.requires_grad)]
    budget = session.plan.budget if session.plan is not None else None
    baseline = driver.plan().baseline.peak_bytes
    reason = obstacle(driver.model, training=training)
    if session.asked:
        reason = f"pass {session.asked!r} makes another model of it, as it was asked to"
    elif driver.step is not None:
        reason = "a step is more than one call"
    elif session.taken_over:
        reason = "it was made by an earlier process"
    elif session.writes_inputs():
        reason = "it writes its inputs"
    elif budget is not None and baseline > budget:
        reason = "that does not fit the budget"
    if reason:
        guard.refuse(training, reason)
        return
    absent = [leaf for leaf in leaves if leaf.grad is None]

    def step_of(call: Callable[..., Any]) -> Callable[[], object]:
        def step() -> object:
            output = call(*args, **kwargs)
            if training and is_differentiable(output):
                torch.autograd.backward(loss_of(output, driver.loss_fn), inputs=leaves)
            return output

        return step

    def program(*args: Any, **kwargs: Any) -> Any:
        assert driver.call is not None
        with _torch.quiet_capture():
            session.finish()
            return driver.call(*args, **kwargs)

    known = dict(driver.model.named_parameters())
    written = [known[name] for name in driver.written_parameters() if name in known]
    session.arguments = (args, kwargs)
    devices = cuda_devices(driver.model)
    try:
        with (
            restored(driver.model, leaves, written),
            attributes_restored(driver.model) as reset,
            torch.random.fork_rng(devices=devices),
        ):

            def before() -> None:
                reset()
                for leaf in absent:
                    leaf.grad = None

            guard.judge(
                step_of(program), step_of(driver.model),
                training=training,
                device=tensors[0].device if tensors else torch.device("cpu"),
                static_bytes=session.static_bytes or 0,
                budget=budget,
                before=before,
            )  # fmt: skip
    finally:
        session.arguments = None


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()
