"""Storages: who holds them, when they come and go."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from graphopt._torch.fakes import without_modes
from graphopt._torch.sizes import hint

__all__ = [
    "CallWatcher",
    "FilledMemory",
    "holders",
    "mark",
    "plain_tensors",
    "profiler_running",
    "random_state_bytes",
    "record_allocations",
    "record_timeline",
    "storage_bytes",
    "storage_key",
    "storage_watch",
    "weak_storage",
    "weak_tensor",
    "writes",
]


def plain_tensors(value: object) -> list[torch.Tensor]:
    """The tensors with memory of their own that a tensor wraps: of a DTensor this rank's part; of a plain
    tensor itself."""
    if not is_traceable_wrapper_subclass(value):
        return [value] if isinstance(value, torch.Tensor) else []
    names, _ = value.__tensor_flatten__()
    return [tensor for name in names for tensor in plain_tensors(getattr(value, name))]


def random_state_bytes(device: torch.device) -> int:
    """Size of the state of a device's default generator."""
    with without_modes():
        return torch.Generator(device).get_state().numel()


def record_allocations(step: Callable[[], object]) -> list[int]:
    """Signed bytes of every CPU allocation (+) and release (-) that ``step()`` made, in time order."""
    return [size for size in record_timeline(step, "") if size is not None]


def record_timeline(step: Callable[[], object], marks: str) -> list[int | None]:
    """What ``record_allocations`` yields, with ``None`` wherever ``mark(marks)`` was called."""
    # Typed as any: torch's stubs of these differ from what they return.
    autograd: Any = torch._C._autograd
    profiler: Any = torch._C._profiler
    config = profiler.ProfilerConfig(
        profiler.ProfilerState.CPU, False, True, False, False, False, profiler._ExperimentalConfig()
    )
    autograd._enable_profiler_legacy(config)
    try:
        step()
    finally:
        threads = autograd._disable_profiler_legacy()
    origin: Any = next((event for thread in threads for event in thread), None)
    events = [
        (origin.cpu_elapsed_us(event), event.cpu_memory_usage() if event.kind() == "memory_alloc" else None)
        for thread in threads
        for event in thread
        if event.kind() == "memory_alloc" or (event.kind() == "push" and event.name() == marks)
    ]
    if len(threads) > 1:
        events.sort(key=lambda pair: pair[0])
    return [size for _, size in events]


def mark(name: str) -> None:
    """Leave a mark in what ``record_allocations`` records."""
    with torch.autograd.profiler.record_function(name):
        pass


def weak_storage(storage: torch.UntypedStorage) -> Any:
    """A weak reference to a storage: ``expired()`` says whether its memory is gone."""
    from torch.multiprocessing.reductions import StorageWeakRef

    reference: Any = StorageWeakRef
    return reference(storage)


def weak_tensor(tensor: torch.Tensor) -> Any:
    """A weak reference to a tensor, not to its memory: ``expired()`` says whether nothing holds it any more,
    autograd's graph included."""
    native: Any = torch._C
    return native._WeakTensorRef(tensor)


class CallWatcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports every dispatched op after it ran: ``seen(op, args, result)``.

    An op with an ``out`` argument is not run: its result is that argument.
    """

    def __init__(self, seen: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = kwargs["out"] if kwargs.get("out") is not None else func(*args, **kwargs)
        self._seen(func, args, result)
        return result


_WITHOUT_VALUES = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
)


class FilledMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Memory that is made without values in the block (``torch.empty`` and its like) is filled with ones.

    Dynamo compiles and finds nothing in the block: what it compiled has to enter it itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.fill_(1) if func._schema.name in _WITHOUT_VALUES else result


def storage_watch(tensor: torch.Tensor) -> Callable[[], bool]:
    """A function that says whether the storage of ``tensor`` is gone; it does not keep it alive."""
    watch: Any = StorageWeakRef
    expired: Callable[[], bool] = watch(tensor.untyped_storage()).expired
    return expired


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage; not given again while a watch of that storage exists."""
    return int(tensor.untyped_storage()._cdata)


def writes(tensor: torch.Tensor) -> int | None:
    """How often torch has written to the storage of ``tensor``, as it counts; ``None`` where it does not, for
    tensors made in inference mode."""
    return None if tensor.is_inference() else int(tensor._version)


def profiler_running() -> bool:
    """Whether the calling thread is being profiled; profilers do not nest."""
    return torch._C._autograd._profiler_enabled()


def storage_bytes(values: Any) -> int:
    """Bytes of the distinct storages under a pytree of tensors, on this rank where they are distributed."""
    found: dict[int, int] = {}
    for value in torch.utils._pytree.tree_leaves(values):
        for tensor in plain_tensors(value):
            if tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                found[storage._cdata] = hint(storage.nbytes())
    return sum(found.values())


def holders(tensor: torch.Tensor) -> tuple[int, ...]:
    """References to a tensor and to its storage, those of Python and those of C++. To be compared with those
    of another tensor in the same place of the same code."""
    storage = tensor.untyped_storage()
    return (
        sys.getrefcount(tensor),
        tensor._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
    )
