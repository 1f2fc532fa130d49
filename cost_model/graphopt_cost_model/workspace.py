"""Bytes that a CPU kernel allocates beyond its outputs and frees before it returns, by measuring.

No metadata tells them: a softmax over a transposed tensor copies it first, an ``add`` of bfloat16
and float32 converts one side, a convolution reorders its weights. So each distinct call runs once
on the CPU, on inputs of the same layout, while every allocation is watched; the workspace is the
peak less what is still held at the end (the outputs). docs/cost-model.md lists what was found.

A call that would touch more than ``limit_bytes`` or compute more than ``limit_flops`` is probed with
one of its dimensions (all of them where one is not enough) divided by three powers of two, and
extrapolated. That is exact for workspaces that grow with the dimension or its square, and an
estimate for kernels that block differently at the smaller sizes. Operators whose workspace is known
from their source (``graphopt_cost_model.stated_workspace``) are not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from graphopt import _torch
from graphopt_cost_model.call import Call, Opaque, TensorSpec, call_of
from graphopt_cost_model.flops import work
from graphopt_cost_model.resize import resizable_sizes, resized
from graphopt_cost_model.stated_workspace import stated_workspace

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
    counts as 0. ``estimated`` maps one that was extrapolated to its largest estimate.
    ``mismatched`` maps one whose outputs take other bytes than their metadata says to (bytes kept,
    bytes expected).
    """

    limit_bytes: int = 64 << 20
    limit_flops: int = 5 * 10**9
    unprobed: dict[str, str] = field(default_factory=dict)
    estimated: dict[str, int] = field(default_factory=dict)
    mismatched: dict[str, tuple[int, int]] = field(default_factory=dict)

    def bytes(self, node: fx.Node) -> int:
        """Workspace of a node in bytes; 0 for views and for what does not run on the CPU."""
        return self.of(call_of(node)) if node.op == "call_function" else 0

    def of(self, call: Call) -> int:
        """Workspace of a call in bytes."""
        specs = (*call.inputs, *call.outputs)
        if not specs or call.is_view or any(spec.device != "cpu" for spec in specs):
            return 0
        stated = stated_workspace(call)
        if stated is not None:
            return stated
        try:
            if self._small(call):
                probe = _probe(call)
                self._compare(call, probe)
                return probe.workspace
            estimate = self._extrapolated(call)
            self.estimated[call.name] = max(estimate, self.estimated.get(call.name, 0))
            return estimate
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
        sizes = resizable_sizes(call)
        reasons = []
        for chosen in [*((size,) for size in sizes), tuple(sizes)]:
            divisor = self._divisor(call, chosen)
            if divisor is None:
                continue
            divisors = (divisor, 2 * divisor, 4 * divisor)
            try:
                values = [_probe(_divided(call, chosen, by)).workspace for by in divisors]
            except _CannotProbe as error:
                reasons.append(str(error))
                continue
            return _extrapolate(
                [chosen[0] // by for by in divisors], values, chosen[0], _degree(call, chosen)
            )
        raise _CannotProbe(reasons[0] if reasons else "no smaller size of its dimensions is small enough")

    def _divisor(self, call: Call, chosen: tuple[int, ...]) -> int | None:
        """The least power of two that makes the call small when the chosen sizes are divided by it,
        if that leaves at least 8 of each, so that a quarter of it can be probed too."""
        divisor = 2
        while chosen and min(chosen) // divisor >= 8:
            if self._small(_divided(call, chosen, divisor)):
                return divisor
            divisor *= 2
        return None


def _divided(call: Call, sizes: tuple[int, ...], by: int) -> Call:
    return resized(call, {size: size // by for size in sizes})


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
        for random in (False, True):
            try:
                return _run(call, random)
            except Exception as error:  # an operator may raise anything on inputs that it dislikes
                first_line = str(error).partition("\n")[0]
                reason = reason or f"{type(error).__name__}: {first_line}"
    return reason


def _run(call: Call, random: bool) -> Probe:
    storages = _storages(call, random)
    args = _real(call.args, storages)
    kwargs = {name: _real(value, storages) for name, value in call.kwargs}
    outputs: list[Any] = []  # held until the record ends, so that what is released is workspace
    running = peak = 0
    for event in _torch.record_allocations(lambda: outputs.append(call.target(*args, **kwargs))):
        running += event
        peak = max(peak, running)
    return Probe(peak - max(running, 0), running)


def _storages(call: Call, random: bool) -> dict[int, torch.Tensor]:
    """One flat tensor of bytes for each storage of the inputs, filled with made-up values."""
    extents: dict[int, tuple[int, torch.dtype]] = {}
    for spec in call.inputs:
        end = (spec.offset + spec.span) * spec.dtype.itemsize
        extents[spec.storage] = (max(end, extents.get(spec.storage, (0, spec.dtype))[0]), spec.dtype)
    return {
        number: _filled(size // dtype.itemsize, dtype, random).view(torch.uint8)
        for number, (size, dtype) in extents.items()
    }


def _filled(count: int, dtype: torch.dtype, random: bool) -> torch.Tensor:
    """One half and 0 at first: probabilities, and indices that are valid wherever there is a row.
    For operators that refuse those, such as solvers and integer division, random numbers and 1."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.full((count,), int(random), dtype=dtype)
    return torch.rand(count).to(dtype) if random else torch.full((count,), 0.5).to(dtype)


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


def _degree(call: Call, sizes: tuple[int, ...]) -> int:
    """How many dimensions of one tensor change with ``sizes``: nothing grows faster than its tensors."""
    specs = (*call.inputs, *call.outputs)
    return max(sum(size in sizes for size in spec.shape) for spec in specs)


def _extrapolate(points: list[int], values: list[int], size: int, degree: int) -> int:
    """The value at ``size`` of a function measured at three ``points``, each half the one before.

    The line (degree 1) or parabola (degree 2) through the largest of them, if it grows no faster
    than its degree between any two; else, or for a higher degree, the power law of the two largest
    points with an exponent between 0 and ``degree``. Never less than what was measured.
    """
    large, middle, small = values
    fastest = 1.02 * 2**degree
    if degree <= 2 and small <= middle <= large <= fastest * middle and middle <= fastest * small:
        fit = np.polynomial.Polynomial.fit(points[: degree + 1], values[: degree + 1], degree)
        return max(large, round(float(fit(size))))
    exponent = min(max(math.log2(large / middle), 0.0), float(degree)) if large and middle else 1.0
    return max(large, round(float(large * (size / points[0]) ** exponent)))
