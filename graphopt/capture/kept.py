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
            if name := _changed(vars(module), attributes):
                changes.append(f"attribute {name!r}{where}")
                vars(module).clear()
                vars(module).update(attributes)
            for table, entries in tables.items():
                now = vars(module)[table]
                if name := _changed(now, entries):
                    changes.append(f"{name!r} in {table}{where}")
                    now.clear()
                    now.update(entries)
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


def _changed(now: Mapping[str, Any], was: Mapping[str, Any]) -> str:
    """The first name that stands for something else."""
    for name in (*was, *now):
        if name not in now or name not in was:
            return str(name)
        before, after = was[name], now[name]
        plain = type(after) in _PLAIN and type(after) is type(before)
        if after is not before and not (plain and after == before):
            return str(name)
    return ""


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
