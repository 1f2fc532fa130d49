"""A call of an operator as a value: what runs, on tensors of which layout, giving which outputs.

Costs depend on nothing else, so they are functions of a ``Call`` and are memoised by it: the
thousand repeated nodes of a deep model are priced once for each distinct call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.replay import plain_call

__all__ = ["Call", "Opaque", "TensorSpec", "call_of", "tensors_in"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Layout of one tensor of a call.

    ``storage`` numbers the storages of the call in order of appearance: tensors with the same
    number share memory. ``offset`` is in elements, counted from the first element that the call
    touches of that storage. Symbolic sizes appear as the values that they had while tracing.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: str
    strided: bool
    storage: int

    @property
    def elements(self) -> int:
        """Number of elements, repeated ones counted as often as they appear."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last that the tensor reaches."""
        if self.elements == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    @property
    def stored_bytes(self) -> int:
        """Bytes of distinct elements: an expanded dimension (stride 0) is stored once."""
        if not self.strided:
            return self.elements * self.dtype.itemsize
        distinct = 0 if self.elements == 0 else 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            distinct *= size if stride else 1
        return min(distinct, self.span) * self.dtype.itemsize

    @property
    def place(self) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        """Equal for tensors that are the same memory seen the same way."""
        return (self.storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class Opaque:
    """An argument that is neither a tensor nor a plain value, such as a graph module."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """``target(*args, **kwargs)`` and what it returns; lists and tuples of arguments are tuples."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Tensor arguments in order; one that is passed twice appears twice."""
        return tuple(tensors_in((self.args, self.kwargs)))

    @property
    def packet(self) -> Any:
        """The operator without its overload: ``aten.add`` for ``aten.add.Tensor``."""
        return getattr(self.target, "overloadpacket", self.target)

    @property
    def name(self) -> str:
        return str(self.target)

    @property
    def mutates(self) -> bool:
        """Whether the operator writes to one of its arguments."""
        schema = getattr(self.target, "_schema", None)
        return bool(schema is not None and schema.is_mutable)

    @property
    def is_view(self) -> bool:
        """Whether nothing is computed: a view by its schema, or every output is memory of an input
        and nothing is written."""
        if self.mutates:
            return False
        if getattr(self.target, "is_view", False):
            return True
        held = {spec.storage for spec in self.inputs}
        return all(spec.storage in held for spec in self.outputs)

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        given = dict(self.kwargs)
        if name in given:
            return given[name]
        for index, parameter in enumerate(self.target._schema.arguments):
            if parameter.name == name:
                return self.args[index] if index < len(self.args) else default
        return default


def tensors_in(value: Any) -> Iterator[TensorSpec]:
    """Tensor layouts inside nested tuples, in order."""
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)


def call_of(node: fx.Node) -> Call:
    """The call that a ``call_function`` node makes, from ``meta["val"]`` of it and of its inputs."""
    reader = _Reader()
    target, arguments, named = plain_call(node)
    args = tuple(reader.read(arg) for arg in arguments)
    kwargs = tuple((name, reader.read(value)) for name, value in named.items())
    outputs = tuple(tensors_in(reader.read(node.meta.get("val"))))
    if not reader.shifted:
        return Call(target, args, kwargs, outputs)
    shift = reader.lowest
    return Call(target, _shifted(args, shift), _shifted(kwargs, shift), _shifted(outputs, shift))


class _Reader:
    """Turns arguments of a node into values, numbering storages as they appear."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.lowest: dict[int, int] = {}
        self.shifted = False

    def read(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if "val" not in value.meta:
                return Opaque(str(value.target))
            return self.read(value.meta["val"])
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return tuple(self.read(item) for item in value)
        if isinstance(value, slice):
            return (self.read(value.start), self.read(value.stop), self.read(value.step))
        if isinstance(value, dict):
            return tuple((str(key), self.read(item)) for key, item in value.items())
        if isinstance(value, torch.SymInt):
            return _torch.hint(value)
        plain = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
        if value is None or isinstance(value, plain):
            return value
        return Opaque(type(value).__name__)

    def _tensor(self, tensor: torch.Tensor) -> TensorSpec:
        strided = tensor.layout is torch.strided
        shape = tuple(map(_torch.hint, tensor.shape))
        stride = tuple(map(_torch.hint, tensor.stride())) if strided else ()
        offset = _torch.hint(tensor.storage_offset()) if strided else 0
        key = tensor.untyped_storage()._cdata if strided else id(tensor)
        number = self.numbers.setdefault(key, len(self.numbers))
        self.lowest[number] = min(self.lowest.get(number, offset), offset)
        self.shifted |= offset > 0
        return TensorSpec(shape, stride, offset, tensor.dtype, tensor.device.type, strided, number)


def _shifted(value: Any, lowest: dict[int, int]) -> Any:
    """``value`` with offsets counted from the lowest of each storage."""
    if isinstance(value, TensorSpec):
        start = lowest[value.storage]
        return TensorSpec(
            value.shape,
            value.stride,
            value.offset - start,
            value.dtype,
            value.device,
            value.strided,
            value.storage,
        )
    if isinstance(value, tuple):
        return tuple(_shifted(item, lowest) for item in value)
    return value
