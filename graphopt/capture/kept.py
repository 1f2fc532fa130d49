"""A model as it was before code of others saw it: what that changed, and putting it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphopt import _torch
from graphopt.capture.stand_in import state_of

__all__ = ["KeptModel"]

_PLAIN = (bool, int, float, str, bytes, type(None))


class KeptModel:
    """Attributes, tables and state of a model. Values are copied to the host: as many bytes as the model
    has."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [
            (path, module, dict(vars(module)), _tables(module))
            for path, module in model.named_modules()
        ]
        self._state = {
            id(tensor): (name, tensor, tensor.requires_grad, tensor.grad, _on_host(tensor))
            for name, tensor in state_of(model).items()
        }

    def put_back(self) -> str:
        """Make the model what it was; the first thing that was not, or ``""``."""
        changes: list[str] = []
        for path, module, attributes, tables in self._modules:
            where = f" of {path!r}" if path else ""
            if name := _restored(vars(module), attributes):
                changes.append(f"attribute {name!r}{where}")
            for table, entries in tables.items():
                if name := _restored(vars(module)[table], entries):
                    changes.append(f"{name!r} in {table}{where}")
        with torch.no_grad():
            for name, tensor, trained, gradient, values in self._state.values():
                for part, value in values:
                    if not torch.equal(_bits(part), _bits(value).to(part.device)):
                        changes.append(f"the values of {name!r}")
                        part.copy_(value)
                if tensor.requires_grad != trained:
                    changes.append(f"requires_grad of {name!r}")
                    tensor.requires_grad_(trained)
                if tensor.grad is not gradient:
                    changes.append(f"the gradient of {name!r}")
                    tensor.grad = gradient
        return changes[0] if changes else ""


def _tables(module: torch.nn.Module) -> dict[str, dict[Any, Any]]:
    return {name: dict(value) for name, value in vars(module).items() if isinstance(value, dict)}


def _restored(now: dict[Any, Any], was: Mapping[Any, Any]) -> str:
    """Make a table what it was; the first name that stood for something else. Tracers put equal copies of
    plain containers in the place of a module's own, which is told of nobody."""
    if now.keys() == was.keys() and all(now[name] is value for name, value in was.items()):
        return ""
    changed = [name for name in (*was, *now) if name not in now or name not in was]
    changed += [name for name, value in was.items() if name in now and not _alike(now[name], value)]
    now.clear()
    now.update(was)
    return str(changed[0]) if changed else ""


def _alike(now: Any, was: Any) -> bool:
    """Whether two values are one object, or equal and made of plain values alone."""
    if now is was:
        return True
    if type(now) is not type(was):
        return False
    if isinstance(now, Mapping):
        return list(now) == list(was) and all(_alike(now[key], was[key]) for key in now)
    if isinstance(now, (list, tuple)):
        return len(now) == len(was) and all(map(_alike, now, was))
    return type(now) in _PLAIN and bool(now == was)


def _on_host(tensor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a tensor is made of, each part with a copy."""
    return [
        (part, part.detach().to("cpu", copy=True))
        for part in _torch.plain_tensors(tensor)
        if part.layout is torch.strided and not part.is_meta and not _torch.is_fake(part)
    ]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN is equal to itself there."""
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
