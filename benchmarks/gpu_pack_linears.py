"""Linear layers of one value apart and as one product, on one GPU, beside what pack-linears predicts.

    python benchmarks/gpu_pack_linears.py --out benchmarks/results/gpu_pack_linears.json

``products``: seconds of single products of bf16 matrices, forward and both gradients, measured and by the
waves of tiles that the pass counts. ``layers``: a norm, layers that read its result, and what reads them
(causal attention over rotated heads, a gate), forward and backward, in code by Inductor: apart, packed with
every pack that the pass finds, beside the change that it predicts, and apart with the gradients of what they
read added up by sum-products. ``autocast``: float32 weights, rounded at every call.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import BUSY_CYCLES, copy_bandwidth, milliseconds

import graphopt
from graphopt.atomic import write_atomically
from graphopt.candidate import Candidate, CostDelta
from graphopt.passes import PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Program
from graphopt_passes.pack_linears import PackLinears
from graphopt_passes.pack_linears.price import ProductTimes

PRODUCTS = (
    (8192, 2048, 2048), (8192, 512, 2048), (8192, 3072, 2048), (8192, 2048, 512), (8192, 2048, 3072),
    (2048, 2048, 8192), (512, 2048, 8192), (3072, 2048, 8192), (8192, 8192, 2048), (8192, 16384, 2048),
    (8192, 2048, 8192), (8192, 2048, 16384), (16384, 2048, 8192), (8192, 1024, 1024), (8192, 3072, 1024),
    (1024, 1024, 8192), (3072, 1024, 8192), (1024, 2048, 2048), (1024, 3072, 2048), (64, 3072, 2048),
)  # fmt: skip
"""Rows, columns and depth: a Llama-3.2-1B's and a ViT-L's layers at 8,192 tokens, and fewer rows."""


@dataclass(frozen=True)
class Layers:
    """``columns`` of each layer; three of them attend, two gate."""

    name: str
    width: int
    columns: tuple[int, ...]
    autocast: bool = False
    rows: int = 8192
    trains: bool = True


LAYERS = (
    Layers("llama qkv", 2048, (2048, 512, 512)),
    Layers("llama gate up", 2048, (8192, 8192)),
    Layers("vit qkv", 1024, (1024, 1024, 1024)),
    Layers("llama qkv, autocast", 2048, (2048, 512, 512), autocast=True),
    Layers("llama gate up, autocast", 2048, (8192, 8192), autocast=True),
    Layers("llama qkv, inference", 2048, (2048, 512, 512), trains=False),
    Layers("llama qkv, 64 rows, inference", 2048, (2048, 512, 512), rows=64, trains=False),
)


class Model(torch.nn.Module):
    def __init__(self, case: Layers, head: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case, self.head = case, head
        self.norm = torch.nn.RMSNorm(case.width, eps=1e-6)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(case.width, n, bias=False) for n in case.columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.case.autocast):
            h = self.norm(x)
            if len(self.layers) == 2:
                gate, up = (layer(h) for layer in self.layers)
                return F.silu(gate) * up
            q, k, v = (layer(h).view(*h.shape[:2], -1, self.head).transpose(1, 2) for layer in self.layers)
            return F.scaled_dot_product_attention(_turned(q), _turned(k), v, is_causal=True, enable_gqa=True)


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * 0.5 + torch.cat((-second, first), -1) * 0.5


@dataclass(frozen=True)
class Always(PackLinears):
    """Packs whatever it gains, and says what is predicted."""

    def propose(self, program: Program, ctx: PassContext) -> Iterator[Proposal]:
        for found in super().propose(program, ctx):
            if isinstance(found, Candidate):
                PREDICTED.append(found.delta.seconds)
                found = replace(found, delta=CostDelta(seconds=-1.0))
            yield found


PREDICTED: list[float] = []


def products(device: str) -> Iterator[dict[str, Any]]:
    times = ProductTimes(default_host().cost_model("roofline").build(default_host().device(device)))
    for rows, columns, depth in PRODUCTS:
        left = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
        right = torch.randn(columns, depth, device="cuda", dtype=torch.bfloat16)
        took = milliseconds(lambda: left @ right.t(), 21)  # noqa: B023
        yield {
            "product": [rows, columns, depth],
            "us": round(1e3 * took, 1),
            "predicted_us": round(1e6 * times.product(rows, columns, depth, torch.bfloat16), 1),
        }


def layers(case: Layers) -> dict[str, Any]:
    row: dict[str, Any] = {"layers": case.name, "columns": list(case.columns), "width": case.width}
    dtype = torch.float32 if case.autocast else torch.bfloat16
    x = torch.randn(4, case.rows // 4, case.width, device="cuda", dtype=dtype, requires_grad=case.trains)
    results: dict[str, torch.Tensor] = {}
    norms = ["fuse-norm", "fuse-norm-gradient"]
    kinds = {
        "apart": ["normalize", *norms],
        "packed": ["normalize", Always(), *norms],
        "summed": ["normalize", *norms, "sum-products"],
    }
    for kind, pipeline in kinds.items():
        torch._dynamo.reset()
        model = Model(case).to("cuda", dtype)
        PREDICTED.clear()
        with torch.set_grad_enabled(case.trains):
            fast = graphopt.optimize(model, (x,), pipeline=pipeline, emit="inductor", on_error="raise")
            y = fast(x)
        gradient = torch.randn_like(y)
        wanted = (x, *model.parameters())

        def step(fast: Any = fast, gradient: Any = gradient, wanted: Any = wanted) -> None:
            with torch.set_grad_enabled(case.trains):
                y = fast(x)
                if case.trains:
                    torch.autograd.grad(y, wanted, gradient)

        # Forward and backward take the host several milliseconds.
        row[f"{kind}_us"] = round(1e3 * milliseconds(step, 21, busy=10 * BUSY_CYCLES), 1)
        results[kind] = y.detach()
        if kind == "packed":
            row["predicted_change_us"] = [round(1e6 * seconds, 1) for seconds in PREDICTED]
    for kind in ("packed", "summed"):
        row[f"{kind}_change_us"] = round(row[f"{kind}_us"] - row["apart_us"], 1)
        row[f"{kind}_difference"] = float((results[kind] - results["apart"]).abs().max())
    return row


def main(arguments: Iterable[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--device", default="h200", help="the device that is predicted for")
    chosen = options.parse_args(None if arguments is None else list(arguments))
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        data = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "copy_gb_per_s": copy,
            "rows": rows,
        }
        write_atomically(chosen.out, json.dumps(data, indent=1) + "\n")

    copy = round(copy_bandwidth())
    for row in products(chosen.device):
        report(row)
    for case in LAYERS:
        try:
            report(layers(case))
        except Exception as error:  # a case that fails is a row that says so
            report({"layers": case.name, "error": f"{type(error).__name__}: {error}"[:300]})


if __name__ == "__main__":
    main()
