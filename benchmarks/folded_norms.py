"""Errors of batch norms that are folded into convolutions, against float64, over those of separate operators.

    python benchmarks/folded_norms.py

Residual and inverted blocks of 32 channels with random weights, their running statistics those of 40 random
batches, in float32 on the CPU by one thread and by two: libraries choose other kernels with them.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
from harness import environment
from torch import nn

import graphopt
from graphopt.atomic import write_atomically

OUT = Path(__file__).parent / "results" / "folded_norms.json"
NETWORKS = 8


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


@torch.no_grad()
def ratio(model: nn.Module) -> float:
    model.train()
    for _ in range(40):
        model(torch.randn(8, 32, 56, 56))
    model.eval()
    x = torch.randn(8, 32, 56, 56)
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
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = []
        for seed in range(NETWORKS):
            for make in (Bottleneck, Inverted):
                torch.manual_seed(seed)
                found.append(round(ratio(make()), 3))
        mean = math.exp(sum(map(math.log, found)) / len(found))
        rows.append({"threads": threads, "mean": round(mean, 3), "most": max(found), "ratios": found})
        print(json.dumps(rows[-1]), flush=True)
    document = {
        **environment(),
        "command": "python benchmarks/folded_norms.py",
        "rows": rows,
    }
    write_atomically(OUT, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
