"""Inputs that may be needed again, held so that they take none of the memory that a budget is of.

A batch that a model was optimized with would otherwise stay beside the batches that it trains on. What is
traced again needs no numbers (``TracedInputs``); what is measured or compared again does (``KeptExample``).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.program import InputSpec

__all__ = ["KeptExample", "Look", "Looks", "Made", "TracedInputs"]

_HOST = ("cpu", "meta")
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True)
class Look:
    """A tensor of a call without its numbers. ``place``: which of the storages of the call it lies in."""

    place: int
    bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    trained: bool


class Looks:
    """Looks of the tensors of one call, and tensors made of them: equal storages become one, numbers zero."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._known: dict[int, Look] = {}

    @staticmethod
    def can(value: Any) -> bool:
        """Whether a tensor that looks like ``value`` can stand for it."""
        return type(value) in _PLAIN and value.layout is torch.strided and not _torch.is_fake(value)

    def of(self, value: torch.Tensor) -> Look:
        if id(value) not in self._known:
            self._known[id(value)] = Look(
                self._places.setdefault(_torch.storage_key(value), len(self._places)),
                value.untyped_storage().nbytes(),
                tuple(value.shape),
                tuple(value.stride()),
                int(value.storage_offset()),
                value.dtype,
                value.device,
                value.requires_grad,
            )
        return self._known[id(value)]


class Made:
    """Tensors of zeros that look like those of one call; one look is one tensor."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._tensors: dict[int, torch.Tensor] = {}

    def tensor(self, look: Look) -> torch.Tensor:
        if id(look) not in self._tensors:
            if look.place not in self._storages:
                zeros = torch.zeros(look.bytes, dtype=torch.uint8, device=look.device)
                self._storages[look.place] = zeros.untyped_storage()
            empty = torch.empty(0, dtype=look.dtype, device=look.device)
            made = empty.set_(self._storages[look.place], look.offset, look.shape, look.stride)
            self._tensors[id(look)] = made.requires_grad_(look.trained)
        return self._tensors[id(look)]


class TracedInputs:
    """Inputs of a graph that dynamo made, which is traced with them and may be again. The model's own are
    kept; others may go, and dynamo's descriptions of them, their symbols included, then stand for them."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], specs: Sequence[InputSpec]) -> None:
        self._kept: list[Any] = []
        for node, value, spec in zip(gm.graph.find_nodes(op="placeholder"), inputs, specs, strict=True):
            described = node.meta.get("example_value")
            own = spec.role in ("parameter", "buffer")
            lets_go = not own and type(value) in _PLAIN and _torch.is_fake(described)
            self._kept.append(_Given(weakref.ref(value), described) if lets_go else value)

    def inputs(self) -> list[Any]:
        return [value.there() if isinstance(value, _Given) else value for value in self._kept]


@dataclass(frozen=True, eq=False)
class _Given:
    value: weakref.ref[torch.Tensor]
    described: torch.Tensor

    def there(self) -> torch.Tensor:
        value = self.value()
        return self.described if value is None else value


class KeptExample:
    """Example inputs in any structure. Tensors on other devices than the host wait there."""

    def __init__(self, inputs: Any) -> None:
        known: dict[int, Any] = {}

        def kept(value: torch.Tensor) -> Any:
            if value.device.type in _HOST or type(value) not in _PLAIN or _torch.is_fake(value):
                return value
            if id(value) not in known:
                known[id(value)] = _away(value)
            return known[id(value)]

        self._inputs = torch.utils._pytree.tree_map_only(torch.Tensor, kept, inputs)

    def inputs(self) -> Any:
        """The inputs on their devices; those that waited are copied there anew."""
        there: dict[int, torch.Tensor] = {}

        def back(value: _Away) -> torch.Tensor:
            if id(value) not in there:
                copied = value.values.to(value.device).expand(value.shape)
                there[id(value)] = copied.requires_grad_(value.trained)
            return there[id(value)]

        return torch.utils._pytree.tree_map_only(_Away, back, self._inputs)


@dataclass(frozen=True, eq=False)
class _Away:
    values: torch.Tensor
    shape: torch.Size
    device: torch.device
    trained: bool


def _away(value: torch.Tensor) -> Any:
    """``value`` on the host, once for what is repeated by a stride of 0. What copies would lay out otherwise,
    and so be another call, stays where it is."""
    once = value.detach()
    for dim, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[dim] > 1:
            once = once.narrow(dim, 0, 1)
    copied = once.to("cpu", copy=True)
    laid_out = copied.expand(value.shape).stride() == value.stride()
    return _Away(copied, value.shape, value.device, value.requires_grad) if laid_out else value
