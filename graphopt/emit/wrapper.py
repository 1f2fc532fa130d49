"""Run Inductor's generated wrapper without data, to see every allocation and release it makes.

The wrapper is ordinary Python: it unpacks its argument list, allocates buffers
(``empty_strided_cuda``, library calls that return tensors), launches kernels, renames buffers to
reuse them and ``del``\\ s names. Run on fake tensors, with every kernel launch replaced by a
mark, Python itself answers which storages live at each launch: aliases, reuse, early releases,
nested functions and partitions need no rules of their own. Nothing is compiled or launched, and
no device is touched, so code generated for a GPU can be read on a machine without one.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt import _torch
from graphopt.emit.scratch import scratch_bytes
from graphopt.errors import LoweringError
from graphopt.program import tensor_leaves

__all__ = ["StorageLife", "WrapperTrace", "trace_wrapper"]


@dataclass
class StorageLife:
    """One storage. ``born`` is the step before which it is allocated (-1: it came in), ``dies`` the
    step after which it is released (``None``: still held on return)."""

    bytes: int
    born: int
    dies: int | None = None


@dataclass
class WrapperTrace:
    """What a run of the wrapper showed.

    ``steps`` are labels of kernel launches and library calls in order, ``scratch`` the bytes that
    each allocates and frees within itself; ``inputs`` and ``outputs``
    give the index in ``storages`` of each graph input and output, ``None`` for one that is no
    tensor or lives on another kind of device.
    """

    steps: list[str] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)
    storages: list[StorageLife] = field(default_factory=list)
    inputs: list[int | None] = field(default_factory=list)
    outputs: list[int | None] = field(default_factory=list)


def trace_wrapper(
    source: str,
    inputs: Sequence[Any],
    *,
    device_type: str,
    constants: Mapping[str, Any] | None = None,
) -> WrapperTrace:
    """Trace the wrapper ``source`` on tensors like ``inputs`` (fake or real; sizes may be symbolic).

    Only storages on ``device_type`` are followed. Bytes are exact, before allocator rounding.
    Raises ``LoweringError`` for a source that has no ``call`` function, that fails on these
    inputs, or whose control flow depends on data.
    """
    tree = _parse(source)
    mode = _torch.fake_mode(numbers=True)
    recorder = _Recorder(device_type)
    watcher = _torch.CallWatcher(recorder.dispatched)
    with torch.no_grad(), mode:
        args = _stand_ins(inputs)
        recorder.enter(args)
        try:
            namespace = _namespace(tree, recorder)
            for name, value in (constants or {}).items():
                namespace[name] = recorder.constant(value, mode) if isinstance(value, torch.Tensor) else value
            with watcher:
                outputs = namespace["call"](args)
        except Exception as error:
            raise LoweringError(
                f"the generated wrapper does not run without data: {type(error).__name__}: {error}",
                hint=f"failed after {len(recorder.trace.steps)} steps; data-dependent sizes cannot be traced",
            ) from error
        recorder.leave(outputs)
    return recorder.trace


def _parse(source: str) -> ast.Module:
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise LoweringError(
            f"generated code is not Python: {error.msg} at line {error.lineno}",
            hint="expected the Python wrapper (cpp_wrapper must be off)",
        ) from error
    defined = {
        name.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for name in node.targets
        if isinstance(name, ast.Name)
    } | {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if any(isinstance(node, ast.Name) and node.id == "CppWrapperCodeCache" for node in ast.walk(tree)):
        raise LoweringError(
            "generated code is a C++ wrapper", hint="cpp_wrapper must be off to predict memory from it"
        )
    if "call" not in defined:
        listing = ", ".join(sorted(defined)) or "nothing"
        raise LoweringError(
            "generated code defines no 'call' function",
            hint=f"expected Inductor's Python wrapper; it defines {listing}",
        )
    checked: ast.Module = ast.fix_missing_locations(_Unchecked().visit(tree))
    return checked


class _Unchecked(ast.NodeTransformer):
    """Leaves out branches that do nothing but raise: they refuse numbers that the program reads out of
    tensors, which are unknown here, and what goes on holds the same either way."""

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if len(node.body) == 1 and isinstance(node.body[0], ast.Raise) and not node.orelse:
            return ast.Pass()
        return node


def _stand_ins(inputs: Sequence[Any]) -> list[Any]:
    """Fake tensors like ``inputs``, each with a storage of its own; call under a fake mode.

    Inputs that share memory are kept apart so that each one's last use is known; who shares
    what is settled where the graphs are put together.
    """
    result: list[Any] = []
    for value in inputs:
        if not isinstance(value, torch.Tensor):
            result.append(_torch.hint(value) if isinstance(value, torch.SymInt) else value)
            continue
        if value.layout is not torch.strided:
            raise LoweringError(
                f"input {len(result)} has layout {value.layout}; only strided tensors are lowered"
            )
        elements = -(-_torch.hint(value.untyped_storage().nbytes()) // value.dtype.itemsize)
        size = [_torch.hint(s) for s in value.shape]
        stride = [_torch.hint(s) for s in value.stride()]
        base = torch.empty(elements, dtype=value.dtype, device=value.device)
        result.append(base.as_strided(size, stride, _torch.hint(value.storage_offset())))
    return result


class _Recorder:
    """Keeps the books: who is alive, and at which step storages come and go."""

    def __init__(self, device_type: str) -> None:
        self.trace = WrapperTrace()
        self._device_type = device_type
        self._index: dict[int, int] = {}
        self._gone: dict[int, Callable[[], bool]] = {}
        self._constants: set[int] = set()
        self._allocated_since_mark = False

    def constant(self, value: torch.Tensor, mode: Any) -> torch.Tensor:
        """A fake tensor like ``value``, whose storage belongs to the program, not to the call."""
        fake: torch.Tensor = mode.from_tensor(value)
        self._constants.add(_torch.storage_key(fake))
        return fake

    def enter(self, args: Sequence[Any]) -> None:
        self.trace.inputs = [self._adopt(a, -1) if isinstance(a, torch.Tensor) else None for a in args]

    def leave(self, outputs: Any) -> None:
        self.trace.outputs = [
            self._index.get(_torch.storage_key(o)) if isinstance(o, torch.Tensor) else None for o in outputs
        ]
        self._sweep()
        held = {index for index in self.trace.outputs if index is not None}
        for index, life in enumerate(self.trace.storages):
            if life.dies is None and index not in held:
                life.dies = len(self.trace.steps) - 1

    def dispatched(self, op: Any, args: tuple[Any, ...], result: Any) -> None:
        """An operator ran: it allocates, writes in place, or is a view and of no interest."""
        fresh = [t for t in tensor_leaves(result) if self._is_new(t)]
        if not fresh and not op._schema.is_mutable:
            return
        self._sweep()
        for tensor in fresh:
            self._adopt(tensor, len(self.trace.steps))
        if getattr(op, "overloadpacket", None) in _ALLOCATORS:
            self._allocated_since_mark = True
        else:
            tensors = tensor_leaves(args)
            self.mark(str(op), scratch_bytes(op, args) if self._on_device(tensors) else 0)

    def _on_device(self, tensors: Sequence[torch.Tensor]) -> bool:
        return any(tensor.device.type == self._device_type for tensor in tensors)

    def mark(self, label: str, scratch: int = 0) -> None:
        """A kernel or library call runs with what is alive now."""
        self._sweep()
        self.trace.steps.append(label)
        self.trace.scratch.append(scratch)
        self._allocated_since_mark = False

    def _is_new(self, tensor: torch.Tensor) -> bool:
        key = _torch.storage_key(tensor)
        return (
            tensor.device.type == self._device_type and key not in self._index and key not in self._constants
        )

    def _adopt(self, tensor: torch.Tensor, born: int) -> int | None:
        key = _torch.storage_key(tensor)
        if key in self._index:
            return self._index[key]
        if tensor.device.type != self._device_type:
            return None
        self._index[key] = len(self.trace.storages)
        self._gone[key] = _torch.storage_watch(tensor)
        self.trace.storages.append(StorageLife(int(tensor.untyped_storage().nbytes()), born))
        return self._index[key]

    def _sweep(self) -> None:
        # A release that is noticed only after a later allocation may have come after it: count
        # both as alive in the coming step, so that the peak is never understated.
        dies = len(self.trace.steps) - (0 if self._allocated_since_mark else 1)
        for key in [key for key, gone in self._gone.items() if gone()]:
            del self._gone[key]
            life = self.trace.storages[self._index.pop(key)]
            life.dies = max(dies, life.born)


_ALLOCATORS = frozenset({torch.ops.aten.empty, torch.ops.aten.empty_strided})


class _Launcher:
    """Stands for a compiled kernel, a stream, a device guard: whatever is done with it, no bytes move.

    Calling a kernel, or its ``run``, marks a step.
    """

    def __init__(self, marked: Callable[[], None] | None = None) -> None:
        self._marked = marked

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self._marked is not None:
            self._marked()

    def __getattr__(self, name: str) -> _Launcher:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Launcher(self._marked)

    def __getitem__(self, grid: Any) -> _Launcher:
        return self


class _Devices:
    """``torch.cuda`` and its like: guards, streams and device selection, without a device."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: nullcontext()


class _Torch:
    """The ``torch`` that the wrapper sees: the real one, but for device runtimes."""

    cuda = xpu = mtia = _Devices()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Libraries:
    """``extern_kernels``: a call that is given its output marks a step; others run on fake tensors."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._table = _torch.inductor_kernels()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("out") is None:
                return getattr(self._table, name)(*args, **kwargs)
            self._recorder.mark(f"extern_kernels.{name}")
            return kwargs["out"]

        return call


def _namespace(tree: ast.Module, recorder: _Recorder) -> dict[str, Any]:
    """Execute the wrapper's definitions, with kernels and runtime helpers replaced."""
    namespace: dict[str, Any] = {
        "__name__": "generated_wrapper",
        **_HELPERS,
        "extern_kernels": _Libraries(recorder),
    }
    kept = set(namespace)
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _import(node, namespace, kept)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            _execute(node, namespace)
        elif (
            isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        ):
            name = node.targets[0].id
            if name in kept:
                continue
            if _is_kernel(node.value):
                namespace[name] = _Launcher(lambda label=name: recorder.mark(label))  # type: ignore[misc]
            elif not _uses(node.value, {"AsyncCompile", "empty_strided_p2p", "_SymmetricMemory"}):
                _execute(node, namespace)
        # What is left (waiting for compilation, the benchmark entry point) has no part in a call.
    return namespace


def _import(node: ast.Import | ast.ImportFrom, namespace: dict[str, Any], kept: set[str]) -> None:
    for alias in node.names:
        bound = (alias.asname or alias.name).split(".")[0]
        if bound in kept:
            continue
        single: ast.stmt = (
            ast.Import([alias])
            if isinstance(node, ast.Import)
            else ast.ImportFrom(node.module, [alias], node.level)
        )
        try:
            _execute(ast.copy_location(single, node), namespace)
        except ImportError:
            # Triton and device runtimes that this machine lacks: only launches use them.
            namespace[bound] = _Launcher()


def _execute(node: ast.stmt, namespace: dict[str, Any]) -> None:
    module = ast.fix_missing_locations(ast.Module([node], []))
    exec(compile(module, "<generated wrapper>", "exec"), namespace)


def _is_kernel(value: ast.expr) -> bool:
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and isinstance(value.func.value, ast.Name)
        and value.func.value.id == "async_compile"
    )


def _uses(value: ast.expr, names: set[str]) -> bool:
    return any(
        (isinstance(n, ast.Name) and n.id in names) or (isinstance(n, ast.Attribute) and n.attr in names)
        for n in ast.walk(value)
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _same(value: Any, *args: Any) -> Any:
    return value


def _reinterpret(
    tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0
) -> torch.Tensor:
    return tensor.as_strided(size, stride, int(tensor.storage_offset()) + offset)


def _from_pool(
    pool: torch.Tensor, offset_bytes: int, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    return pool.view(dtype).as_strided(size, stride, offset_bytes // dtype.itemsize)


def _allocate(device_type: str) -> Callable[..., torch.Tensor]:
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device_type)


# What the wrapper's header binds to C++ functions that go around the dispatcher (and so would
# allocate real memory), or that need a device. The names are those of the generated header.
_HELPERS: dict[str, Any] = {
    "torch": _Torch(),
    "assert_size_stride": _nothing,
    "assert_alignment": _nothing,
    "copy_if_misaligned": _same,
    "reinterpret_tensor": _reinterpret,
    "alloc_from_pool": _from_pool,
    "empty_strided_cpu": _allocate("cpu"),
    "empty_strided_cpu_pinned": _allocate("cpu"),
    "empty_strided_cuda": _allocate("cuda"),
    "empty_strided_xpu": _allocate("xpu"),
    "empty_strided_mtia": _allocate("mtia"),
    "get_raw_stream": _nothing,
    "start_graph": _nothing,
    "end_graph": _nothing,
    "async_compile": _Launcher(),
}
