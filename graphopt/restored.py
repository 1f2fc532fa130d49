"""Run a step and put back what it changed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["cuda_devices", "random_state_restored", "rebinding_restored", "restored"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def cuda_devices(model: torch.nn.Module) -> list[int]:
    """Numbers of the GPUs that a model is on: those whose random state a step may change."""
    state = (*model.parameters(), *model.buffers())
    return sorted({tensor.device.index for tensor in state if tensor.device.type == "cuda"})


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Afterwards the default generators of torch (on the CPU), NumPy and Python are where they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


_DEEP = 2
"""How far objects are followed from a module: its configuration, and the parts of that. Farther on lies what
other threads may be working with (loggers, queues of data)."""


def _held_tables(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Attributes of modules, of the objects that these hold by name, as configurations, and of what these
    hold."""
    holders: list[Any] = list(model.modules())
    known = {id(module) for module in holders}
    for depth in range(_DEEP + 1):
        found: list[Any] = []
        for holder in holders:
            attributes = vars(holder)
            yield attributes
            for value in attributes.values() if depth < _DEEP else ():
                held = isinstance(getattr(value, "__dict__", None), dict) and not callable(value)
                if held and id(value) not in known and not isinstance(value, (torch.Tensor, ModuleType)):
                    known.add(id(value))
                    found.append(value)
        holders = found


@contextmanager
def rebinding_restored(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards the names of buffers, and attributes of plain values (counters, scales), stand for what they
    stood for: a step may bind them anew rather than write into what they name. So for objects that modules
    hold, as configurations: a first call may settle there what kind of loss it is.

    Names that a step adds are left: models make tables at their first call that later ones rely on.
    """
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        tables.append((vars(module)["_buffers"], dict(vars(module)["_buffers"])))
    for attributes in _held_tables(model):
        plain = {name: value for name, value in attributes.items() if isinstance(value, _PLAIN)}
        tables.append((attributes, plain))
    try:
        yield
    finally:
        for table, names in tables:
            # One by one: guards of compiled code watch whether a table was written to.
            for name, value in names.items():
                if table.get(name) is not value:
                    table[name] = value


@contextmanager
def restored(
    model: torch.nn.Module, leaves: Sequence[torch.Tensor], written: Sequence[torch.Tensor] = ()
) -> Iterator[None]:
    """Afterwards the gradients of ``leaves``, the model's buffers (values and names), its plain attributes,
    what is ``written`` besides and the random state are what they were."""
    # Copies on the host: the step may write into the gradients, and must not find more memory taken.
    gradients = [(t.grad, None if t.grad is None else t.grad.detach().cpu().clone()) for t in leaves]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    others = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in written]
    try:
        with random_state_restored(), rebinding_restored(model):
            yield
    finally:
        with torch.no_grad():
            for leaf, (gradient, value) in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
            for tensor, value in (*buffers, *others):
                # A write that changes nothing would still be one to a backward that waits.
                if not torch.equal(tensor, value.to(tensor.device)):
                    tensor.copy_(value)
