"""Where the time of one training step goes on one GPU, kernel by kernel.

    python benchmarks/gpu_step_kernels.py --out benchmarks/results/gpu_step_kernels.json

The step of gpu_train.py without a budget, launched kernel by kernel. ``kernels`` are milliseconds a step of
products, attention, fills of gradients (which the step begins with) and all else, by torch's profiler;
``busy_ms`` is when any kernel ran, ``step_ms`` the median of steps that were not profiled. ``floor_ms`` is
what products and attention take when nothing else runs: each product of the step and its attention timed
alone, back to back, on random numbers, in the same process. ``largest`` are the kernels that take longest.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_train import LossOnly, prepared

import graphopt
from graphopt.atomic import write_atomically

STEPS = 3
CLASSES = (
    ("products", ("nvjet", "gemm", "cutlass", "xmma")),
    ("attention", ("sdpa", "flash", "fmha", "cudnn")),
    ("fills", ("FillFunctor",)),
)


def class_of(kernel: str) -> str:
    return next((name for name, parts in CLASSES if any(part in kernel for part in parts)), "others")


def alone(shape: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the products and the attention of a step, each kind timed by itself."""
    rows, hidden, width = shape.batch * shape.seq, shape.hidden, 4 * shape.hidden
    heads, few = hidden // 64, max(hidden // 256, 1)
    packed = (heads + 2 * few) * 64
    products = 0.0
    kinds = [
        (packed, hidden, shape.layers),
        (hidden, hidden, shape.layers),
        (width, hidden, 2 * shape.layers),
    ]
    for n, k, times in [*kinds, (hidden, width, shape.layers), (shape.vocab, hidden, 1)]:
        x, w, g = (
            torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((rows, k), (n, k), (rows, n))
        )
        held = torch.zeros_like(w)
        for run in (lambda: x @ w.t(), lambda: g @ w, lambda: held.addmm_(g.t(), x)):  # noqa: B023
            products += times * back_to_back(run)
    q, k_, v = (
        torch.randn(
            shape.batch, count, shape.seq, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        for count in (heads, few, few)
    )
    run = torch.nn.functional.scaled_dot_product_attention
    y = run(q, k_, v, is_causal=True, enable_gqa=True)
    gy = torch.randn_like(y)
    forward = back_to_back(lambda: run(q, k_, v, is_causal=True, enable_gqa=True))
    backward = back_to_back(lambda: torch.autograd.grad(y, (q, k_, v), gy, retain_graph=True))
    return {"products": products, "attention": shape.layers * (forward + backward)}


def back_to_back(run: Any, times: int = 20) -> float:
    """Mean milliseconds of ``times`` calls in a row, after as many to warm up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for k in range(2 * times):
        if k == times:
            start.record()
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_step_kernels.json"))
    for name, number in (("hidden", 2048), ("layers", 16), ("batch", 4), ("seq", 2048), ("vocab", 128256)):
        options.add_argument(f"--{name}", type=int, default=number)
    shape = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_step_kernels needs a CUDA device")
        return
    model, ids, _ = prepared(shape)
    inputs = {"input_ids": ids, "labels": ids}
    fast = graphopt.optimize(
        LossOnly(model).train(), inputs, emit="inductor", on_error="raise", cuda_graphs=False
    )

    def step() -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        fast(**inputs).backward()

    taken = []
    for k in range(13):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if k >= 4:
            taken.append((time.perf_counter() - begun) * 1e3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    busy = end = 0.0
    for event in sorted(events, key=lambda event: event.time_range.start):
        by_name[event.name].append(event.time_range.elapsed_us())
        busy += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end = max(end, event.time_range.end)
    classes: dict[str, float] = collections.Counter()
    for name, times in by_name.items():
        classes[class_of(name)] += sum(times) / STEPS / 1e3
    document = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_step_kernels.py",
        "shape": {k: getattr(shape, k) for k in ("hidden", "layers", "batch", "seq", "vocab")},
        "step_ms": round(statistics.median(taken), 2),
        "busy_ms": round(busy / STEPS / 1e3, 2),
        "kernels": {name: round(value, 2) for name, value in classes.items()},
        "floor_ms": {name: round(value, 2) for name, value in alone(shape).items()},
        "largest": [
            {"kernel": name[:100], "times": len(times) / STEPS, "ms": round(sum(times) / STEPS / 1e3, 3)}
            for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:25]
        ],
    }
    write_atomically(shape.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps({k: v for k, v in document.items() if k != "largest"}))


if __name__ == "__main__":
    main()
