"""An update that a program writes out, on one GPU: with and without ``fuse-optimizer``, op by op, compiled.

    python benchmarks/gpu_written_update.py --out benchmarks/results/gpu_written_update.json

AdamW over parameters shaped as those of a Llama-3.2-1B (bfloat16, and float32), gradients given, the count of
steps a tensor. ``tensors``: written tensor by tensor; ``lists``: with ``torch._foreach_*``. ``torch-fused``
is ``torch.optim.AdamW(fused=True)`` over the same parameters. ``percent`` is of the copy bandwidth that the
same run measures, on the bytes that an update must move: parameters, gradients and states read, parameters
and states written. ``peak_mib`` is what a step takes above what is there before it. Medians after warm-up;
kernels are launched one by one, not replayed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_optimizer import copy_bandwidth, median_ms, shapes
from torch import Tensor, nn

import graphopt
from graphopt.atomic import write_atomically
from graphopt.pipeline import Pipeline
from graphopt.plugins import default_host

PASS = "fuse-optimizer"


class Update(nn.Module):
    """AdamW of its parameters; ``forward(gradients)``."""

    def __init__(self, layers: int, dtype: torch.dtype, *, lists: bool) -> None:
        super().__init__()
        made = [torch.randn(shape, device="cuda").to(dtype) / 50 for shape in shapes(layers)]
        self.weights = nn.ParameterList(made)
        self.averages, self.squares = (
            nn.ParameterList(torch.zeros_like(x) for x in made).requires_grad_(False) for _ in range(2)
        )
        self.register_buffer("count", torch.zeros((), device="cuda"))
        self.lists = lists

    def forward(self, gradients: list[Tensor]) -> None:
        with torch.no_grad():
            self.count.add_(1)
            rate, root = 1e-5 / (1 - 0.9**self.count), (1 - 0.999**self.count).sqrt()
            given = list(self.weights), gradients, list(self.averages), list(self.squares)
            (_on_lists if self.lists else _by_tensors)(*given, rate, root)


def _by_tensors(p: Any, g: Any, m: Any, v: Any, rate: Tensor, root: Tensor) -> None:
    for p_, g_, m_, v_ in zip(p, g, m, v, strict=True):
        p_.mul_(1 - 1e-7)
        m_.lerp_(g_, 0.1)
        v_.mul_(0.999).addcmul_(g_, g_, value=0.001)
        p_.sub_(rate * m_ / (v_.sqrt() / root + 1e-8))


def _on_lists(p: Any, g: Any, m: Any, v: Any, rate: Tensor, root: Tensor) -> None:
    torch._foreach_mul_(p, 1 - 1e-7)
    torch._foreach_lerp_(m, g, 0.1)
    torch._foreach_mul_(v, 0.999)
    torch._foreach_addcmul_(v, g, g, 0.001)
    below = torch._foreach_sqrt(v)
    torch._foreach_div_(below, root)
    torch._foreach_add_(below, 1e-8)
    torch._foreach_mul_(below, -1 / rate)
    torch._foreach_addcdiv_(p, m, below)


def peak_mib(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rows(dtype: torch.dtype, layers: int, repeats: int, bandwidth: float) -> list[dict[str, Any]]:
    found = []

    def note(case: str, emit: str, peer: str, step: Callable[[], object], least: int, **more: Any) -> None:
        device, host = median_ms(step, repeats)
        row = {
            "case": case,
            "emit": emit,
            "dtype": str(dtype).removeprefix("torch."),
            "peer": peer,
            "ms": round(device, 3),
            "host_ms": round(host, 3),
            "percent": round(100 * least / (device / 1e3) / bandwidth, 1),
            "peak_mib": round(peak_mib(step), 1),
            **more,
        }
        print(json.dumps(row), flush=True)
        found.append(row)

    default = Pipeline.of("default", default_host()).steps
    for lists in (False, True):
        for emit in ("eager", "inductor"):
            for fused in (False, True):
                torch._dynamo.reset()
                torch.cuda.empty_cache()
                model = Update(layers, dtype, lists=lists)
                gradients = [torch.randn_like(p) / 1000 for p in model.weights]
                least = sum(7 * p.nbytes for p in model.weights)
                passes = [step for step in default if fused or step.name != PASS]
                fast = graphopt.optimize(
                    model, (gradients,), emit=emit, pipeline=passes, cuda_graphs=False, on_error="raise"
                )
                fast(gradients)
                said = [record.reason for record in fast.report.steps if record.id == PASS]
                peer = "graphopt" if fused else "without"
                case = "lists" if lists else "tensors"
                note(case, emit, peer, lambda f=fast, g=gradients: f(g), least, said=said)  # type: ignore[misc]
                del fast, model, gradients
    params = [nn.Parameter(torch.randn(s, device="cuda").to(dtype) / 50) for s in shapes(layers)]
    for parameter in params:
        parameter.grad = torch.randn_like(parameter) / 1000
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)
    note("optimizer", "torch", "torch-fused", optimizer.step, sum(7 * p.nbytes for p in params))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_written_update.json"))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_written_update needs a CUDA device")
        return
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    document = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_written_update.py",
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
