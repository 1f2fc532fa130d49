"""A 1,001-layer bottleneck ResNet on one GPU: graphopt under budgets beside eager and checkpoints.

    python benchmarks/gpu_resnet1000.py --out benchmarks/results/gpu_resnet1000.json

The workload of Chen et al. 2016: 83+83+83+84 blocks, width 64, batch 32 of 224 x 224, bfloat16 autocast,
channels last, forward + backward, gradients allocated beforehand and held. Every case runs in a process
of its own. ``act_mib`` is ``max_memory_allocated`` minus what was there before (parameters, gradients,
buffers, input); ``ms`` are medians after warm-up; ``first_step_s`` is all from ``optimize`` to the end of
the first step.

``NAME+graph``: forward and backward captured once in a CUDA graph by hand and replayed, which takes the
cost of launching some ten thousand kernels away; ``pool_mib`` is what the graph's memory pool reserved.
Nothing is moved to the host there: such copies wait for those of the step before.

The allocator runs with expandable segments: without them it hands out up to 1 MiB more than is asked for
with every block, and a net of a thousand layers holds hundreds. ``requested_mib`` is what was asked for.

Peers: ``eager``; ``sqrt-ckpt`` (``torch.utils.checkpoint.checkpoint_sequential`` with the square root of
the number of layers).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

MIB = 2**20


class Block(nn.Module):
    def __init__(self, entering: int, width: int, leaving: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(entering), nn.Conv2d(entering, width, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, leaving, 1, bias=False)
        plain = stride == 1 and entering == leaving
        self.short = nn.Identity() if plain else nn.Conv2d(entering, leaving, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        y = self.conv2(torch.relu(self.norm2(y)))
        return self.conv3(torch.relu(self.norm3(y))) + self.short(x)


def layers(blocks: list[int], width: int) -> nn.Sequential:
    found: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1))]
    channels = width
    for stage, count in enumerate(blocks):
        middle = width * 2**stage
        for number in range(count):
            found.append(Block(channels, middle, 4 * middle, 2 if number == 0 and stage else 1))
            channels = 4 * middle
    head = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found.append(nn.Sequential(*head, nn.Linear(channels, 1000)))
    return nn.Sequential(*found)


class Training(nn.Module):
    """The loss of a batch; with ``segments`` under square-root checkpointing."""

    def __init__(self, net: nn.Sequential, device: str, segments: int = 0) -> None:
        super().__init__()
        self.net, self.device, self.segments = net, device, segments

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            if self.segments:
                from torch.utils.checkpoint import checkpoint_sequential

                out = checkpoint_sequential(self.net, self.segments, images, use_reentrant=False)
            else:
                out = self.net(images)
            return nn.functional.cross_entropy(out, labels)


def peaks(static: int) -> dict[str, int]:
    asked = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    return {
        "act_mib": round((torch.cuda.max_memory_allocated() - static) / MIB),
        "requested_mib": round((asked - static) / MIB),
    }


def captured(
    step: Callable[[], torch.Tensor], row: dict[str, Any], static: int
) -> Callable[[], torch.Tensor]:
    """The step as a CUDA graph; notes what capturing it took."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    row |= peaks(static)
    row["pool_mib"] = round((torch.cuda.memory_reserved() - reserved) / MIB)

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def case(full_name: str, args: argparse.Namespace) -> dict[str, Any]:
    name, _, mode = full_name.partition("+")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net = layers(args.blocks, args.width).to(device, memory_format=torch.channels_last).train()
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (args.batch,), device=device)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    static = torch.cuda.memory_allocated() if device == "cuda" else 0
    begun = time.perf_counter()
    row: dict[str, Any] = {"name": full_name, "static_mib": round(static / MIB)}
    model: nn.Module = Training(net, device, int(math.sqrt(len(net))) if name == "sqrt-ckpt" else 0)
    if name.startswith("graphopt"):
        import graphopt

        _, _, bound = name.partition("@")
        budget = static + int(bound) * MIB if bound else None
        pipeline = ["normalize", "compress-saved", "insert-checkpoints"] if mode == "graph" else "default"
        model = graphopt.optimize(model, (images, labels), budget=budget, emit="inductor", pipeline=pipeline)
        plan = model.plan
        row |= {
            "budget_mib": budget and round(budget / MIB),
            "predicted_act_mib": round((plan.predicted.peak_bytes - static) / MIB),
            "predicted_ms": round(plan.predicted.seconds * 1e3, 1),
            "optimize_s": round(time.perf_counter() - begun, 1),
            "planning_s": round(plan.seconds_to_plan, 1),
            "rows_again": len(plan.reruns),
            "moved_mib": round(sum(v.bytes for c in plan.choices for v in c.offloaded) / MIB),
            "diagnostics": list(model.report.diagnostics)[:3],
        }

    def step() -> torch.Tensor:
        loss = model(images, labels)
        loss.backward()
        return loss.detach()

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    synchronize()
    row["first_step_s"] = round(time.perf_counter() - begun, 1)
    run = captured(step, row, static) if mode == "graph" else step
    run()
    synchronize()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(args.steps):
        start = time.perf_counter()
        loss = run()
        synchronize()
        taken.append((time.perf_counter() - start) * 1e3)
    return {**(peaks(static) if device == "cuda" else {}), **row} | {
        "ms": round(statistics.median(taken), 1),
        "loss": round(float(loss), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[83, 83, 83, 84])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit", type=float, default=500, help="seconds for all cases")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["graphopt@2440", "graphopt@2440+graph", "eager", "eager+graph", "sqrt-ckpt"],
    )
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.case:
        print("RESULT " + json.dumps(case(args.case, args)), flush=True)
        return
    if not torch.cuda.is_available():
        print("gpu_resnet1000 needs a CUDA device")
        return
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    begun, rows = time.monotonic(), []
    for name in args.cases:
        command = [sys.executable, "-W", "ignore", *sys.argv, "--case", name]
        left = args.limit - (time.monotonic() - begun)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(left, 1), env=environment
            )
        except subprocess.TimeoutExpired:
            rows.append({"name": name, "error": "out of time"})
            continue
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        error = {"name": name, "error": done.stderr.strip()[-2000:]}
        rows.append(json.loads(found[-1][7:]) if found else error)
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        import graphopt

        record = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "graphopt": graphopt.__version__,
            "date": datetime.now(UTC).date().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "rows": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
