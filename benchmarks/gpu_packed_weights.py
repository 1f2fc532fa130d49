"""From a budget to packed weights on one GPU: what each step takes, and whether bytes are as predicted.

    python benchmarks/gpu_packed_weights.py --out benchmarks/results/gpu_packed_weights.json [--device cpu]

A decoder of Llama's shape (RMSNorm, grouped attention, SwiGLU; random weights, bf16), no package but torch.
Seconds of calibration, of finding weights and scoring every scheme, of packing; for each share of the dense
peak whether ``optimize(allow=("quantize-linear",))`` fits it, with the predicted and the measured peak, bytes
of weights, error, and the KL divergence by token from the dense model.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt import _torch
from graphopt.atomic import write_atomically
from graphopt.quality import measure_quality


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, groups * self.size, bias=False)
        self.v = nn.Linear(width, groups * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        h = self.before(x)
        q = self.q(h).view(rows, length, self.heads, self.size).transpose(1, 2)
        k, v = (
            part(h).view(rows, length, self.groups, self.size).transpose(1, 2) for part in (self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(rows, length, width))
        h = self.after(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self, layers: int, width: int, inner: int, heads: int, groups: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(Layer(width, inner, heads, groups) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, classes, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def held(model: nn.Module) -> int:
    return _torch.storage_bytes([*model.parameters(), *model.buffers()])


def seconds(run: Any, device: str) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", default="cuda")
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--inner", type=int, default=8192)
    options.add_argument("--classes", type=int, default=32000)
    options.add_argument("--rows", type=int, default=1)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--shares", default="90%,70%,60%")
    options.add_argument("--emit", default="auto")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    torch.manual_seed(0)
    heads = max(1, given.width // 64)
    model = Decoder(given.layers, given.width, given.inner, heads, max(1, heads // 4), given.classes)
    model = model.to(device=given.device, dtype=torch.bfloat16).eval()
    shape = (given.rows, given.length)
    batches = [(torch.randint(0, given.classes, shape, device=given.device),) for _ in range(4)]
    row: dict[str, Any] = {"weights": held(model)}
    data, row["calibrate_seconds"] = seconds(lambda: graphopt.calibrate(model, batches), given.device)
    found, row["allocate_seconds"] = seconds(
        lambda: graphopt.weight_frontier(model, batches[0], calibration=data), given.device
    )
    row["least_weights"], row["points"] = found.points[0].bytes, len(found.points)
    twin = copy.deepcopy(model)
    plan, row["quantize_seconds"] = seconds(
        lambda: graphopt.quantize(twin, batches[0], calibration=data, weights="60%"), given.device
    )
    row["quantized_bytes_exact"] = plan.bytes_after == held(twin)
    rows = [row]
    print(json.dumps(row), flush=True)
    del twin
    for share in given.shares.split(","):
        twin = copy.deepcopy(model)
        row = {"budget": share}
        try:
            with torch.no_grad():
                fast, row["optimize_seconds"] = seconds(
                    lambda twin=twin, share=share: graphopt.optimize(
                        twin, batches[0], budget=share, allow=("quantize-linear",), emit=given.emit
                    ),
                    given.device,
                )
            taken = fast.measure()
            cost, packed = fast.plan.predicted, fast.report.quantization
            row |= {
                "budget_bytes": fast.plan.budget, "predicted_peak": cost.peak_bytes,
                "measured_peak": taken.peak_bytes,
                "predicted_weights": cost.weight_bytes, "weights": held(twin),
                "seconds": taken.seconds, "predicted_seconds": cost.seconds,
                "packed": 0 if packed is None else len(packed.packed),
                "error": 0.0 if packed is None else packed.error,
                "quality": measure_quality(model, fast, batches).to_json(),
            }  # fmt: skip
        except graphopt.GraphoptError as error:
            row["error_text"] = str(error)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if given.out is not None:
        kind = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
        write_atomically(
            given.out,
            json.dumps({"device": kind, "torch": torch.__version__, "rows": rows}, indent=1) + "\n",
        )


if __name__ == "__main__":
    main()
