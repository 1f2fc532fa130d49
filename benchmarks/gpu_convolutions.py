"""Inference of convolutions with sums and ReLUs behind them, on one GPU: graphopt beside torch.compile.

    python benchmarks/gpu_convolutions.py --out benchmarks/results/gpu_convolutions.json

Bottleneck blocks of the four stages of a ResNet-50 (He et al. 2015) without norms, as they are once norms are
folded: 64 images, bf16, channels last. ``apart`` is graphopt without fuse-convolution. The GPU is kept busy
while the host queues a call, medians after warm-up. ``error`` is the distance from float64 over that of eager
mode.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import BUSY_CYCLES, milliseconds

import graphopt
from graphopt.atomic import write_atomically
from graphopt_passes.fuse_convolution import FuseConvolution

STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
"""Channels and height of each stage."""


class Bottleneck(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 4
        self.narrow = torch.nn.Conv2d(width, inner, 1)
        self.square = torch.nn.Conv2d(inner, inner, 3, padding=1)
        self.wide = torch.nn.Conv2d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.square(F.relu(self.narrow(x))))
        return F.relu(self.wide(y) + x)


def measured(width: int, height: int, blocks: int = 3) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Bottleneck(width) for _ in range(blocks))).cuda().eval()
    x = torch.randn(64, width, height, height, device="cuda")
    model, x = (
        m.to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for m in (model, x)
    )
    row: dict[str, Any] = {"channels": width, "height": height}
    with torch.no_grad():
        exact = model.double()(x.double())
        model.bfloat16()
        usual = float((model(x).double() - exact).norm())
        kinds: dict[str, Any] = {
            "graphopt": graphopt.optimize(model, (x,), emit="inductor", on_error="raise"),
            "apart": graphopt.optimize(
                model, (x,), pipeline=["normalize", "functionalize"], emit="inductor", on_error="raise"
            ),
            "compile": torch.compile(model),
        }
        for kind, run in kinds.items():
            row[f"{kind}_us"] = round(1e3 * milliseconds(lambda: run(x), 21, 5 * BUSY_CYCLES), 1)  # noqa: B023
        row["error"] = round(float((kinds["graphopt"](x).double() - exact).norm()) / usual, 3)
        steps = {step.id: step.status for step in kinds["graphopt"].report.steps}
        row["fused"] = steps[FuseConvolution.name]
    return row


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_convolutions.json"))
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_convolutions needs a CUDA device")
        return
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_convolutions.py",
        "rows": [],
    }
    for width, height in STAGES:
        torch._dynamo.reset()
        document["rows"].append(measured(width, height))
        print(json.dumps(document["rows"][-1]), flush=True)
        write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
