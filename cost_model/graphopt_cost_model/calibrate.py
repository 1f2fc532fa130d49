"""Measure what the present device sustains: copy, read, matmul by dtype, launch gap, host link.

Each figure is the median of several runs after a warm-up, timed with events on CUDA and with the
clock on the CPU. Bandwidths count bytes read and bytes written; where plugins offer a copy or read
kernel that takes the buffers, the faster of it and of ATen counts. What is not measured (vector
rate, dtypes without a plain matmul) stays as the device table has it.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import torch

from graphopt.device import DeviceSpec
from graphopt.errors import GraphoptError, UnknownNameError
from graphopt.plugins import default_host
from graphopt_cost_model.calibration_store import CalibrationWarning
from graphopt_cost_model.devices import load_devices, resolve

__all__ = ["CalibrationError", "CalibrationSizes", "calibrate"]


class CalibrationError(GraphoptError):
    """A device that cannot be measured here."""

    code = "calibrate"


@dataclass(frozen=True)
class CalibrationSizes:
    """How much to measure. Buffers must exceed the caches for a bandwidth to be the memory's."""

    buffer_bytes: int
    matmul_size: int
    launches: int
    repeats: int

    @classmethod
    def of(cls, kind: str) -> CalibrationSizes:
        """Sizes that take a few seconds on a device of this kind."""
        if kind == "cuda":
            return cls(buffer_bytes=1 << 30, matmul_size=8192, launches=2000, repeats=20)
        return cls(buffer_bytes=1 << 28, matmul_size=1024, launches=2000, repeats=7)


def calibrate(
    device: torch.device | str | None = None,
    *,
    sizes: CalibrationSizes | None = None,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> DeviceSpec:
    """Measured figures of a present device (default: CUDA if there is one, else the CPU).

    ``progress(step, done, total)`` is called before each step and once at the end. Nothing is
    stored: see ``store_calibration``. Raises ``CalibrationError`` for a device that is not here.
    """
    target = _present(device)
    sizes = sizes or CalibrationSizes.of(target.type)
    meter = _Meter(target, sizes)
    base = _known(target)
    dtypes = _matmul_dtypes(target)
    steps = ["copy", "read", *(f"matmul {name}" for name in dtypes), "launch gap", "host link"]
    figures: dict[str, float] = {}
    measure: list[Callable[[], float]] = [meter.copy, meter.read]
    measure += [functools.partial(meter.matmul, name) for name in dtypes]
    measure += [meter.launch_gap, meter.host_link]
    for index, (step, run) in enumerate(zip(steps, measure, strict=True)):
        progress(step, index, len(steps))
        figures[step] = run()
    progress("done", len(steps), len(steps))
    kept = dict(base.matmul_flops) if base else {}
    matmul = {name: figures[f"matmul {name}"] for name in dtypes}
    vector = dict(base.vector_flops) if base else {"float32": matmul["float32"] / 2}
    reported = _reported_name(target)
    name = base.name if base else reported
    aliases = dict.fromkeys((*(base.aliases if base else ()), reported.lower()))
    return DeviceSpec(
        name=name,
        kind=target.type,
        memory_bytes=_memory_bytes(target),
        copy_bytes_per_second=figures["copy"],
        read_bytes_per_second=figures["read"],
        matmul_flops=kept | matmul,
        vector_flops=vector,
        launch_seconds=figures["launch gap"],
        host_link_bytes_per_second=figures["host link"],
        allocation_granularity=512 if target.type == "cuda" else 1,
        workspace_bytes=_library_workspace(target),
        allocator_slack_bytes=8 * 2**20 if target.type == "cuda" else 0,
        multiprocessors=_multiprocessors(target),
        source=f"graphopt calibrate on {reported}, torch {torch.__version__}, {date.today()}",
        aliases=tuple(alias for alias in aliases if alias != name),
    )


def _present(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise CalibrationError(f"cannot calibrate {device!r}: no such torch device") from error
    if target.type not in ("cpu", "cuda"):
        raise CalibrationError(f"cannot calibrate {target}: only cpu and cuda devices are supported")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise CalibrationError(f"cannot calibrate {target}: this machine has {count} CUDA devices")
    return target


def _known(target: torch.device) -> DeviceSpec | None:
    """The device's entry in the table, without figures of an earlier calibration."""
    try:
        name = resolve(target).name
    except UnknownNameError:
        return None
    return load_devices(calibrated=False).get(name)


def _reported_name(target: torch.device) -> str:
    return torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu"


def _memory_bytes(target: torch.device) -> int:
    if target.type == "cuda":
        return int(torch.cuda.get_device_properties(target).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _multiprocessors(target: torch.device) -> int:
    if target.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(target).multi_processor_count)


def _library_workspace(target: torch.device) -> int:
    """PyTorch's default cuBLAS workspace: 32 MiB from compute capability 9.0 on, else 8,320 KiB."""
    if target.type != "cuda":
        return 0
    return 4096 * 8 * 1024 if torch.cuda.get_device_capability(target)[0] == 9 else 8320 * 1024


def _matmul_dtypes(target: torch.device) -> tuple[str, ...]:
    if target.type == "cpu":
        return ("float32", "bfloat16")
    return ("float64", "float32", "tfloat32", "bfloat16", "float16")


class _Meter:
    """Times operations on one device."""

    def __init__(self, device: torch.device, sizes: CalibrationSizes) -> None:
        self.device, self.sizes = device, sizes
        self.elements = max(sizes.buffer_bytes // 4, 1)

    def seconds(self, run: Callable[[], object]) -> float:
        """Median time of ``run()`` after two runs to warm up."""
        for _ in range(2):
            run()
        return statistics.median(self._once(run) for _ in range(self.sizes.repeats))

    def _once(self, run: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                start.record()
                run()
                end.record()
                end.synchronize()
                return max(float(start.elapsed_time(end)) / 1e3, 1e-9)
        begin = time.perf_counter()
        run()
        return max(time.perf_counter() - begin, 1e-9)

    def fastest(self, runs: list[Callable[[], object]]) -> float:
        return min(self.seconds(run) for run in runs)

    def copy(self) -> float:
        source = torch.ones(self.elements, device=self.device)
        target = torch.empty_like(source)
        runs: list[Callable[[], object]] = [lambda: target.copy_(source)]
        runs += _kernel("probe-copy", source, target)
        return 2 * source.nbytes / self.fastest(runs)

    def read(self) -> float:
        source = torch.ones(self.elements, device=self.device)
        runs: list[Callable[[], object]] = [source.sum]
        runs += _kernel("probe-read", source)
        return source.nbytes / self.fastest(runs)

    def matmul(self, name: str) -> float:
        """FLOP/s of a square product; ``tfloat32`` is float32 with torch's switch for it on."""
        size = self.sizes.matmul_size
        dtype = torch.float32 if name == "tfloat32" else getattr(torch, name)
        left = torch.randn(size, size, device=self.device).to(dtype)
        right = torch.randn(size, size, device=self.device).to(dtype)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tfloat32" else "highest")
        try:
            return 2 * size**3 / self.seconds(lambda: left @ right)
        finally:
            torch.set_float32_matmul_precision(before)

    def launch_gap(self) -> float:
        """Time between small kernels queued one after the other."""
        tiny = torch.zeros(1, device=self.device)

        def run() -> None:
            for _ in range(self.sizes.launches):
                tiny.add_(1)

        return self.seconds(run) / self.sizes.launches

    def host_link(self) -> float:
        """Bytes per second from pinned host memory; on the CPU, of a copy within memory."""
        pinned = self.device.type == "cuda"
        host = torch.ones(self.elements, pin_memory=pinned)
        target = torch.empty(self.elements, device=self.device)
        return host.nbytes / self.seconds(lambda: target.copy_(host, non_blocking=True))


def _kernel(name: str, *args: torch.Tensor) -> list[Callable[[], object]]:
    """A call of the named kernel, if a plugin offers one that takes ``args`` and runs.

    Warns (``CalibrationWarning``) of a kernel that raises; ATen is measured without it.
    """
    spec = default_host().kernels().get(name)
    if spec is None or spec.supports(*args) is not None:
        return []
    namespace, op = spec.op.split("::")
    target = getattr(getattr(torch.ops, namespace), op)
    try:
        target(*args)
    except Exception as error:  # whatever a plugin's kernel or its compiler raises
        first_line = str(error).partition("\n")[0]
        warnings.warn(
            f"measuring without kernel {name!r}: {type(error).__name__}: {first_line}",
            CalibrationWarning,
            stacklevel=2,
        )
        return []
    return [lambda: target(*args)]
