"""Errors of batch norms that are folded into convolutions, against float64, over those of separate operators.

    python benchmarks/folded_norms.py

Single layers of several kinds, residual and inverted blocks of 32 channels, with random weights, scales and
biases, their running statistics those of random batches, in float32 on the CPU by one thread and by two:
libraries choose other kernels with them, and for other processors: there is a result of one with AVX-512
and of one without. Layers whose sums begin with the bias are folded (``bias_first``).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from harness import environment
from torch import nn

import graphopt
from graphopt.atomic import write_atomically

CAPABILITY = torch.backends.cpu.get_cpu_capability()
"""What instructions libraries choose by."""
OUT = Path(__file__).parent / "results" / f"folded_norms_{CAPABILITY.lower()}.json"
NETWORKS = 4


class Bottleneck(nn.Module):
    def __init__(self, wide: int = 32, narrow: int = 8) -> None:
        super().__init__()
        self.first, self.middle = (
            nn.Conv2d(wide, narrow, 1, bias=False),
            nn.Conv2d(narrow, narrow, 3, padding=1),
        )
        self.last = nn.Conv2d(narrow, wide, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (narrow, narrow, wide))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](self.first(x)).relu()
        return (x + self.norms[2](self.last(self.norms[1](self.middle(y)).relu()))).relu()


class Inverted(nn.Module):
    def __init__(self, narrow: int = 32, wide: int = 64) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(narrow, wide, 1, bias=False),
                nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
                nn.Conv2d(wide, narrow, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (wide, wide, narrow))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolution(y))
            y = y.clamp(0, 6) if number < 2 else y
        return x + y


def layer(channels: int, made: int, size: int, **options: int) -> nn.Module:
    convolution = nn.Conv2d(channels, made, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(made))


KINDS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "3 x 3": (32, lambda: layer(32, 32, 3)),
    "3 x 3, strides": (32, lambda: layer(32, 32, 3, stride=2)),
    "1 x 1": (32, lambda: layer(32, 32, 1)),
    "1 x 1, 128 channels": (128, lambda: layer(128, 32, 1)),
    "1 x 1, strides": (32, lambda: layer(32, 32, 1, stride=2)),
    "grouped": (32, lambda: layer(32, 32, 3, groups=8)),
    "depthwise": (32, lambda: layer(32, 32, 3, groups=32)),
    "residual block": (32, Bottleneck),
    "inverted block": (32, Inverted),
}


@torch.no_grad()
def ratio(model: nn.Module, channels: int) -> float:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
    model.train()
    for _ in range(20):
        model(torch.randn(8, channels, 56, 56))
    model.eval()
    x = torch.randn(8, channels, 56, 56)
    exact = copy.deepcopy(model).double()(x.double())
    fast = graphopt.optimize(
        copy.deepcopy(model),
        (x,),
        pipeline=["fold-batch-norm{bias_first=true}"],
        allow=("fold-batch-norm",),
        emit="eager",
        on_error="raise",
    )
    applied = next(step for step in fast.report.steps if step.id == "fold-batch-norm")
    assert applied.status == "applied", applied
    ours, theirs = (float((y.double() - exact).norm()) for y in (fast(x), model(x)))
    return ours / theirs


def main() -> None:
    rows = []
    for (kind, (channels, make)), threads in itertools.product(KINDS.items(), (1, 2)):
        torch.set_num_threads(threads)
        found = []
        for seed in range(NETWORKS):
            torch.manual_seed(seed)
            found.append(round(ratio(make(), channels), 3))
        mean = math.exp(sum(map(math.log, found)) / len(found))
        rows.append(
            {"kind": kind, "threads": threads, "mean": round(mean, 3), "most": max(found), "ratios": found}
        )
        print(json.dumps(rows[-1]), flush=True)
    document = {
        **environment(),
        "command": "python benchmarks/folded_norms.py",
        "capability": CAPABILITY,
        "rows": rows,
    }
    write_atomically(OUT, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
