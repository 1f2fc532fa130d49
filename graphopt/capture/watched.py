"""Steps of several graphs: run once, everything put back, to see all that they run and hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.capture.observe import Observer
from graphopt.capture.timeline import timeline_of
from graphopt.errors import (
    BudgetError,
    CaptureError,
    GraphoptError,
    InputsError,
    brief,
)
from graphopt.loss import is_differentiable, loss_of
from graphopt.restored import cuda_devices, restored

if TYPE_CHECKING:
    from graphopt.capture.driver import Driver

__all__ = ["capture_pieces", "decide_step"]

_PACK_FIRST = "weights are not packed for a step of several calls: call graphopt.quantize(model, ...) before"


_KEPT = "a backward keeps its graph for another one, and with it what was saved"


def capture_pieces(driver: Driver, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Several graphs: run the forward once, everything put back, to see them all."""
    session = driver.session
    before = len(session.diagnostics)
    session.whole = False
    session.current = []
    session.captured = []
    session.observer = _observer((driver.model.parameters(), driver.model.buffers(), args, kwargs))
    call = driver.traced(whole=False)
    leaves = [p for p in driver.model.parameters() if p.requires_grad]
    try:
        with session.put_back(driver.model):
            with (
                restored(driver.model, leaves),
                torch.random.fork_rng(devices=cuda_devices(driver.model)),
                _torch.gathers_ended(driver.model),
            ):
                call(*args, **kwargs)
                if session.current and driver.compare:
                    # A first call has things to set up, and may be other graphs than later ones.
                    call(*args, **kwargs)
            if session.current and not driver.is_faithful(call, args, kwargs):
                return
            if session.observer is not None:
                _observe(driver, session.observer, call, args, kwargs)
        # The scalar of a graph was taken for the loss, and is none.
        mistaken = bool(session.differentiated) and not session.attached
        if not mistaken:
            session.finish()
    except Exception as error:
        inner = _torch.inner_error(error)
        if isinstance(inner, GraphoptError):
            raise inner from None
        driver.give_up(inner, args, kwargs)
        return
    if mistaken:
        notes = session.diagnostics[:before]
        session.forget()
        session.attached = True
        session.diagnostics.extend(notes)
        capture_pieces(driver, args, kwargs)
        return
    if not session.current:
        driver.give_up(CaptureError("dynamo captured no graph of the model"), args, kwargs)
        return
    if driver.has_faithful_gradients(call, args, kwargs):
        driver.call = call


def decide_step(driver: Driver, step: Callable[[], object]) -> None:
    session = driver.session
    driver.step = step
    if session.host.capture_hooks():
        session.diagnostics.append("plugins capture single calls: they were not asked for step=")
    if driver.fit is not None and session.budget.weights is not None:
        raise InputsError("a bound of weights is met for single calls, not for step=", hint=_PACK_FIRST)
    session.whole, session.current, session.captured = False, [], []
    session.observer = _observer((driver.model.parameters(), driver.model.buffers()))
    call = driver.traced(whole=False)
    leaves = [p for p in driver.model.parameters() if p.requires_grad]

    def reset() -> None:
        if not driver.gradients_held():
            for leaf in leaves:
                leaf.grad = None

    reason = "the memory of this device cannot be watched"
    try:
        with _torch.quiet_capture():
            with (
                session.put_back(driver.model),
                restored(driver.model, leaves),
                torch.random.fork_rng(devices=cuda_devices(driver.model)),
                _torch.gathers_ended(driver.model),
            ):
                driver._watched = call
                # The first run captures, and has things to set up that later ones find done.
                driver.calls = 0
                reset()
                step()
                calls = driver.calls
                if not session.current:
                    raise InputsError("step never ran the model: expected calls of the module it is given")
                if session.observer is not None and session.see(session.observer.observe_step(step, reset)):
                    reason = ""
                elif session.observer is not None:
                    reason = "programs ran that were not captured"
            driver._watched, driver.calls = None, calls
            if reason:
                _unobserved(driver, reason)
            session.finish()
    except Exception as error:
        inner = _torch.inner_error(error)
        if isinstance(inner, BudgetError) and driver.fit is not None and driver.fit.conversion is not None:
            raise BudgetError(
                inner.message,
                least_bytes=inner.least_bytes,
                budget_bytes=inner.budget_bytes,
                hint=f"{inner.hint}; {_PACK_FIRST}",
            ) from None
        if isinstance(inner, GraphoptError):
            raise inner from None
        raise InputsError(f"step raised {brief(inner)}") from inner
    finally:
        driver._watched = None
    driver.call = call


def _unobserved(driver: Driver, reason: str) -> None:
    driver.session.diagnostics.append(
        f"what runs between the programs is not counted, as no whole step was seen: {reason}"
    )


def _observe(
    driver: Driver,
    observer: Observer,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Run whole steps, everything put back, to see what the programs share and what lies between.

    Raises what such a step raises where the model's own does not.
    """

    def backward(output: Any) -> None:
        if not training or (updates and not is_differentiable(output)):
            return
        if observer.keeps_graph and driver.loss_fn is None:
            # The model differentiates in itself: any of what it returns may be a gradient to differentiate.
            leaves = torch.utils._pytree.tree_leaves(output)
            sums = [leaf.sum() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            if sums:
                torch.autograd.backward(sums)
                return
        torch.autograd.backward(loss_of(output, driver.loss_fn))

    # A step that updates parameters may have differentiated its loss itself.
    updates = driver.written_parameters()
    # Graphs that a model differentiates in itself are trained in inference too, which has no backward.
    training = torch.is_grad_enabled() and any(c.mode == "train" for c in driver.session.current)
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    leaves = [t for t in (*driver.model.parameters(), *tensors) if t.is_leaf and t.requires_grad]
    held = driver.gradients_held()
    try:
        with restored(driver.model, leaves), _torch.gathers_ended(driver.model):
            # The first backward has things to set up that later ones find done.
            for setting_up in (True, False):
                if not held:
                    for leaf in leaves:
                        leaf.grad = None
                if setting_up:
                    backward(call(*args, **kwargs))
                else:
                    seen = observer.observe(lambda: call(*args, **kwargs), backward)
    except Exception as error:
        reason = brief(error)
        with restored(driver.model, leaves), _torch.gathers_ended(driver.model):
            try:
                backward(driver.model(*args, **kwargs))
            except Exception:
                plain = False
            else:
                plain = True
        if plain:
            raise
    else:
        if observer.keeps_graph:
            reason = _KEPT
        elif driver.session.see(seen):
            return
        else:
            reason = "programs ran that were not captured"
    _unobserved(driver, reason)


def _observer(values: Any) -> Observer | None:
    """An observer of the one device that all tensors in ``values`` are on."""
    leaves = [
        leaf
        for value in values
        for leaf in torch.utils._pytree.tree_leaves(list(value) if isinstance(value, Iterator) else value)
    ]
    devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
    timeline = timeline_of(devices.pop()) if len(devices) == 1 else None
    return Observer(timeline) if timeline is not None else None
