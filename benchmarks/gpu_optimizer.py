"""The update of an optimizer on one GPU: graphopt's fused step beside torch's fused and foreach ones.

    python benchmarks/gpu_optimizer.py --out benchmarks/results/gpu_optimizer.json

AdamW over parameters shaped as those of a Llama-3.2-1B (bfloat16, and float32), gradients there. ``update``:
the step alone. ``clipped``: gradients clipped by their norm, the step, gradients set to 0; torch's by
``clip_grad_norm_``, ``step`` and ``zero_grad(set_to_none=False)``. ``random`` rounds bfloat16 at random,
which torch does not have. ``percent`` is of the copy bandwidth that the same run measures, on the bytes that
the update alone must move: parameters, gradients and states read, parameters and states written. The GPU is
kept busy while the host gets a step ready; ``host_ms`` is what the host takes for one. Medians after warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from graphopt.atomic import write_atomically
from graphopt_kernels.fused_optimizer import FusedStep

BUSY_CYCLES = 20_000_000
"""About ten milliseconds: longer than the host takes for a step."""


def shapes(layers: int) -> list[tuple[int, ...]]:
    width, inner, narrow = 2048, 8192, 512
    block = [(width, width), (narrow, width), (narrow, width), (width, width), (inner, width)]
    block += [(inner, width), (width, inner), (width,), (width,)]
    return [(128256, width), *(block * layers), (width,)]


def median_ms(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Milliseconds of the device and of the host."""
    for _ in range(3):
        step()
    device, host = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begun = time.perf_counter()
        step()
        host.append((time.perf_counter() - begun) * 1e3)
        end.record()
        torch.cuda.synchronize()
        device.append(start.elapsed_time(end))
    return statistics.median(device), statistics.median(host)


def copy_bandwidth() -> float:
    """Bytes per second, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source), 10)[0] / 1e3)


def rows(dtype: torch.dtype, layers: int, repeats: int, bandwidth: float) -> list[dict[str, Any]]:
    params = [torch.nn.Parameter(torch.randn(s, device="cuda").to(dtype) / 50) for s in shapes(layers)]
    for parameter in params:
        parameter.grad = torch.randn_like(parameter) / 1000
    least = sum(7 * p.nbytes for p in params)

    def torch_step(clipped: bool, **settings: Any) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(params, lr=1e-5, **settings)

        def step() -> None:
            if clipped:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            if clipped:
                optimizer.zero_grad(set_to_none=False)

        return step

    def our_step(clipped: bool, random: bool = False) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(params, lr=1e-5)
        return FusedStep(
            optimizer, max_norm=1.0 if clipped else None, zero_gradients=clipped, random_rounding=random
        )

    made: list[tuple[str, str, Callable[[], Callable[[], object]]]] = []
    for name, clipped in (("update", False), ("clipped", True)):
        made.append((name, "torch-fused", lambda c=clipped: torch_step(c, fused=True)))
        made.append((name, "torch-foreach", lambda c=clipped: torch_step(c, foreach=True)))
        made.append((name, "graphopt", lambda c=clipped: our_step(c)))
        if dtype is torch.bfloat16:
            made.append((name, "graphopt-random", lambda c=clipped: our_step(c, random=True)))
    found = []
    for name, peer, make in made:
        device, host = median_ms(make(), repeats)
        row = {
            "case": name,
            "dtype": str(dtype).removeprefix("torch."),
            "peer": peer,
            "ms": round(device, 3),
            "host_ms": round(host, 3),
            "percent": round(100 * least / (device / 1e3) / bandwidth, 1),
        }
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_optimizer.json"))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_optimizer needs a CUDA device")
        return
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    document = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_optimizer.py",
        "shape": {"layers": options.layers, "repeats": options.repeats},
        "copy_bytes_per_second": round(bandwidth),
        "rows": [
            row
            for dtype in (torch.bfloat16, torch.float32)
            for row in rows(dtype, options.layers, options.repeats, bandwidth)
        ],
    }
    write_atomically(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
