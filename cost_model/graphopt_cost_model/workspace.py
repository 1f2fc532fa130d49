"""Bytes that a CPU kernel allocates beyond its outputs and frees before it returns, by measuring.

No metadata tells them: a softmax over a transposed tensor copies it first, an ``add`` of bfloat16
and float32 converts one side, a convolution reorders its weights. So each distinct call runs once
on the CPU, on inputs of the same layout, while every allocation is watched; the workspace is the
peak less what is still held at the end (the outputs). docs/cost-model.md lists what was found.

A call that would touch more than ``limit_bytes`` or compute more than ``limit_flops`` is probed at
three smaller sizes of one of its dimensions and extrapolated: by a line where the three are on
one, else by the parabola through them. That is exact for workspaces that grow with that dimension
or its square, and an estimate where a kernel changes its blocking in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt_cost_model.call import Call, Opaque, TensorSpec, call_of
from graphopt_cost_model.flops import work
from graphopt_cost_model.resize import resizable_sizes, resized

__all__ = ["Probe", "WorkspaceProbe"]


@dataclass(frozen=True, slots=True)
class Probe:
    """What one call did: bytes freed before it returned, at their peak, and bytes that it kept."""

    workspace: int
    kept: int


@dataclass
class WorkspaceProbe:
    """Measures workspaces of calls on the CPU, each distinct call once in a process.

    ``unprobed`` maps the name of an operator that could not be probed to the reason; its workspace
    counts as 0. ``mismatched`` maps one whose outputs take other bytes than their metadata says to
    (bytes kept, bytes expected).
    """

    limit_bytes: int = 32 << 20
    limit_flops: int = 10**9
    unprobed: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, tuple[int, int]] = field(default_factory=dict)

    def bytes(self, node: fx.Node) -> int:
        """Workspace of a node in bytes; 0 for views and for what does not run on the CPU."""
        return self.of(call_of(node)) if node.op == "call_function" else 0

    def of(self, call: Call) -> int:
        """Workspace of a call in bytes."""
        specs = (*call.inputs, *call.outputs)
        if not specs or call.is_view or any(spec.device != "cpu" for spec in specs):
            return 0
        try:
            if self._small(call):
                probe = _probe(call)
                self._compare(call, probe)
                return probe.workspace
            return self._extrapolated(call)
        except _CannotProbe as error:
            self.unprobed[call.name] = str(error)
            return 0

    def _small(self, call: Call) -> bool:
        touched = sum(spec.stored_bytes for spec in (*call.inputs, *call.outputs))
        return touched <= self.limit_bytes and work(call).flops <= self.limit_flops

    def _compare(self, call: Call, probe: Probe) -> None:
        held = {spec.storage for spec in call.inputs}
        new: dict[int, int] = {}
        for spec in call.outputs:
            if spec.storage not in held:
                end = (spec.offset + spec.span) * spec.dtype.itemsize
                new[spec.storage] = max(new.get(spec.storage, 0), end)
        if probe.kept != sum(new.values()):
            self.mismatched[call.name] = (probe.kept, sum(new.values()))

    def _extrapolated(self, call: Call) -> int:
        reasons = []
        for size in resizable_sizes(call):
            for divisor in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
                largest = size // divisor // 4 * 4
                if largest < 8:
                    break
                if not self._small(resized(call, size, largest)):
                    continue
                points = (largest, largest // 2, largest // 4)
                try:
                    values = [_probe(resized(call, size, point)).workspace for point in points]
                except _CannotProbe as error:
                    reasons.append(str(error))
                    break
                return _extrapolate(points, values, size)
        raise _CannotProbe(reasons[0] if reasons else "no smaller size of one dimension is small enough")


class _CannotProbe(Exception):
    """Why a call could not be run on made-up inputs."""


_probes: dict[tuple[Call, int, bool], Probe | str] = {}
"""Results by call, thread count and determinism: kernels choose buffers by the last two as well."""


def _probe(call: Call) -> Probe:
    if _torch.profiler_running():
        raise _CannotProbe("another profiler runs on this thread")
    key = (call, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    if key not in _probes:
        _probes[key] = _measured(call)
    found = _probes[key]
    if isinstance(found, str):
        raise _CannotProbe(found)
    return found


def _measured(call: Call) -> Probe | str:
    if any(isinstance(item, Opaque) for item in _flat((call.args, call.kwargs))):
        return "takes an argument that is neither a tensor nor a plain value"
    if not all(spec.strided for spec in call.inputs):
        return "takes a tensor that is not strided"
    reason = ""
    with (
        _torch.without_modes(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        # Indices of 0 are valid wherever there is a row; 1 serves those that divide by integers.
        for whole in (0, 1):
            try:
                return _run(call, whole)
            except Exception as error:  # an operator may raise anything on inputs that it dislikes
                first_line = str(error).partition("\n")[0]
                reason = reason or f"{type(error).__name__}: {first_line}"
    return reason


def _run(call: Call, whole: int) -> Probe:
    storages = _storages(call, whole)
    args = _real(call.args, storages)
    kwargs = {name: _real(value, storages) for name, value in call.kwargs}
    result, events = _torch.cpu_allocations(lambda: call.target(*args, **kwargs))
    running = peak = 0
    for event in events:
        running += event
        peak = max(peak, running)
    del result
    return Probe(peak - max(running, 0), running)


def _storages(call: Call, whole: int) -> dict[int, torch.Tensor]:
    """One flat tensor of bytes for each storage of the inputs, filled with values that most
    operators accept: between 0 and 1, ``whole`` where integers are wanted."""
    extents: dict[int, tuple[int, torch.dtype]] = {}
    for spec in call.inputs:
        end = (spec.offset + spec.span) * spec.dtype.itemsize
        extents[spec.storage] = (max(end, extents.get(spec.storage, (0, spec.dtype))[0]), spec.dtype)
    return {number: _filled(size, dtype, whole) for number, (size, dtype) in extents.items()}


def _filled(size: int, dtype: torch.dtype, whole: int) -> torch.Tensor:
    count = size // dtype.itemsize
    if dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return torch.empty(count, dtype=dtype).uniform_().view(torch.uint8)
    if dtype.is_floating_point:
        return torch.empty(count).uniform_().to(dtype).view(torch.uint8)
    if dtype.is_complex:
        return torch.rand(count, dtype=dtype).view(torch.uint8)
    return torch.full((count,), whole, dtype=dtype).view(torch.uint8)


def _real(value: Any, storages: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, TensorSpec):
        flat = storages[value.storage].view(value.dtype)
        return flat.as_strided(value.shape, value.stride, value.offset)
    return [_real(item, storages) for item in value] if isinstance(value, tuple) else value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _extrapolate(points: tuple[int, int, int], values: list[int], size: int) -> int:
    """The value at ``size`` of the line, or else the parabola, through three measured points."""
    (x1, x2, x3), (y1, y2, y3) = points, values
    slope = (y1 - y3) / (x1 - x3)
    if abs(y3 + slope * (x2 - x3) - y2) <= 0.01 * max(y1, y2, y3):
        return max(y1, round(y1 + slope * (size - x1)))
    first = y1 * (size - x2) * (size - x3) / ((x1 - x2) * (x1 - x3))
    second = y2 * (size - x1) * (size - x3) / ((x2 - x1) * (x2 - x3))
    third = y3 * (size - x1) * (size - x2) / ((x3 - x1) * (x3 - x2))
    return max(y1, round(first + second + third))
