"""Fake tensors, and the contexts under which they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode

__all__ = [
    "call_on_fakes",
    "capture_context",
    "context_fake_mode",
    "fake_attribute",
    "fake_inputs",
    "fake_mode",
    "fake_mode_of",
    "is_fake",
    "outside_of_fake_mode",
    "packed_like",
    "propagate_fakes",
    "python_dispatcher",
    "static_context",
    "within",
    "without_modes",
]


def is_fake(value: object) -> bool:
    return isinstance(value, FakeTensor)


def capture_context() -> TracingContext | None:
    """Dynamo's tracing context of the compilation under way, to be re-entered later."""
    return TracingContext.try_get()


@contextmanager
def within(context: TracingContext | None) -> Iterator[None]:
    """Run under ``context``, as if dynamo's call of the backend were still under way."""
    with tracing(context):
        yield


def context_fake_mode() -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())


def fake_inputs(gm: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """Arguments for dynamo's graph as fakes of ``mode``, sizes symbolic where dynamo made them so.

    Each is an alias of the fake that AOTAutograd will be given later, so that tracing an in-place
    operator leaves that one as it is.
    """
    context = TracingContext.try_get()
    fakes: list[Any] = []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        example = node.meta.get("example_value")
        if isinstance(example, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            fakes.append(example)
        elif not isinstance(value, torch.Tensor):
            fakes.append(value)
        else:
            if not is_fake(value):
                known: Any = context.tensor_to_context if context is not None else {}
                symbols = known.get(value)
                source = getattr(symbols, "tensor_source", None)
                value = mode.from_tensor(value, symbolic_context=symbols, source=source)
            fakes.append(_alias(value))
    return fakes


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.requires_grad and not tensor.is_leaf:
        # Autograd forbids to write to a leaf, and this is none: it may be written.
        return tensor.detach().requires_grad_().clone()
    return tensor.detach().requires_grad_(tensor.requires_grad)


def static_context() -> TracingContext:
    """A tracing context of its own, in which every size is a number."""
    return TracingContext(FakeTensorMode())


def fake_mode_of(tensors: Sequence[torch.Tensor]) -> FakeTensorMode:
    """The mode that makes fake tensors to go with the given ones."""
    return next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None) or fake_mode()


def python_dispatcher() -> contextlib.AbstractContextManager[Any]:
    """Operators are taken apart by torch's decompositions in Python, which know sizes that are symbols; those
    in C++ do not all (``linear`` in torch 2.11)."""
    context: contextlib.AbstractContextManager[Any] = enable_python_dispatcher()
    return context


def call_on_fakes(
    like: torch.Tensor, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What a call gives under the mode of the fake tensor ``like``."""
    with fake_mode_of([like]), torch.no_grad(), python_dispatcher():
        return target(*args, **kwargs)


def packed_like(value: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """A fake tensor of the shape and dtype of the fake ``value``, without gaps, in the memory format that
    torch finds in ``like``: channels last, or contiguous. Contiguous where that is ``None``."""
    from torch._prims_common import suggest_memory_format

    kind = torch.contiguous_format if like is None else suggest_memory_format(like)
    with fake_mode_of([value]), torch.no_grad():
        return torch.empty_like(value, memory_format=kind)


@contextmanager
def outside_of_fake_mode() -> Iterator[None]:
    """Operators run for real, whatever mode is active around."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


def fake_mode(*, numbers: bool = False) -> FakeTensorMode:
    """A fresh mode in which tensors have shapes, dtypes, devices and storages, but no data. ``numbers``:
    those that are read out of tensors are symbols, of which nothing is known; else reading one raises."""
    symbols = torch.fx.experimental.symbolic_shapes.ShapeEnv(allow_scalar_outputs=True) if numbers else None
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=symbols)


@contextmanager
def without_modes() -> Iterator[None]:
    """Run on real tensors although a tracing mode (fake, functional, proxy) is active."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def fake_attribute(node: fx.Node, mode: FakeTensorMode) -> Any:
    """What a ``get_attr`` node reads, a tensor as a fake one of ``mode``."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) and not is_fake(value) else value


def propagate_fakes(gm: fx.GraphModule, values: Sequence[Any], mode: FakeTensorMode) -> None:
    """Run a graph on fakes of ``mode``: every call gets its value, views of one storage share it."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    others = [(node, dict(node.meta)) for node in gm.graph.nodes if node.op != "call_function"]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*values)
    for node, meta in others:
        node.meta = meta
