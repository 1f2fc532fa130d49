"""Dropout by a seed on one GPU: the sum with a residual, attention, and whole training steps.

    python benchmarks/gpu_dropout.py --out benchmarks/results/gpu_dropout.json

``masks``: whether the kernels keep what the reference on the CPU keeps, element by element: those of sums,
of attention's forward, and of the gradient of values (weights are even there, values or gradients a unit
matrix, so that results show the mask).

``sum``: 16,384 x 4,096 elements in bf16, probability 0.1. ``forward_gb_per_s`` counts input, residual and
result. ``kept_mib``: what a forward leaves for the backward, beside operands and result.

``attention``: batch 2, 32 heads of queries and 8 of keys, 4,096 positions, heads of 128 and 64, bf16,
causal, with and without dropout of 0.1: graphopt's kernels, ``scaled_dot_product_attention``, and
torch.compile of the operators written out.

``step``: forward and backward of a transformer encoder of 8 layers, 1,024 wide, 16 heads, whose attention is
written out, dropout of 0.1 on weights and both residuals, 8 sequences of 1,024 in bf16: torch.compile, and
graphopt with and without ``allow=("fuse-dropout",)``. Milliseconds and peak.

The GPU is kept busy while the host gets a call ready; medians after warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import graphopt
import graphopt_kernels.attention
import graphopt_kernels.dropout_add  # noqa: F401  (registers the operators, as the one above)
from graphopt.atomic import write_atomically
from graphopt_kernels.philox import drawn_seed, factors_of_scores

MIB = 2**20
BUSY_CYCLES = 2_000_000
RATE = 0.1
BF16 = torch.bfloat16
ops = torch.ops.graphopt
Row = dict[str, Any]


def milliseconds(run: Callable[[], Any], times: int = 9) -> float:
    for _ in range(3):
        run()
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def fresh() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


# --- masks --------------------------------------------------------------------------------------


def masks() -> Iterator[Row]:
    for count in (1000, 2**20 + 3):
        seed, x = drawn_seed("cuda"), torch.ones(count, device="cuda")
        same = torch.equal(
            ops.dropout_add(x, None, RATE, seed).cpu(), ops.dropout_add(x.cpu(), None, RATE, seed.cpu())
        )
        yield {"what": "masks", "case": f"sum of {count}", "same": same}
    for width, rows, dtype in (
        (64, 333, BF16), (128, 333, torch.float16), (256, 1000, BF16), (64, 77, torch.float32),
    ):  # fmt: skip
        seed = drawn_seed("cuda")
        options: dict[str, Any] = {"device": "cuda", "dtype": dtype}
        unit = torch.eye(width, **options).expand(2, 4, width, width)
        # As many keys as a value is wide: the output shows the weights.
        query, key = torch.zeros(2, 4, rows, width, **options), torch.zeros(2, 4, width, width, **options)
        settings = (1.0, 0.0, None, None, 0.5, seed)
        shown = ops.attention(query, key, unit, None, *settings)[0] > 0
        right = factors_of_scores(seed.cpu(), 0.5, 8, slice(0, rows), slice(0, width), torch.float32) > 0
        yield {
            "what": "masks", "case": f"attention forward, {width}, {dtype}",
            "same": torch.equal(shown.cpu(), right.view_as(shown)),
        }  # fmt: skip
        # As many queries as a value is wide: so does the gradient of values.
        query, key = torch.zeros(2, 4, width, width, **options), torch.zeros(2, 4, rows, width, **options)
        value = torch.zeros(2, 4, rows, width, **options).requires_grad_()
        output = ops.attention(query, key, value, None, *settings)[0]
        (shown,) = torch.autograd.grad(output, value, unit)
        right = factors_of_scores(seed.cpu(), 0.5, 8, slice(0, width), slice(0, rows), torch.float32) > 0
        yield {
            "what": "masks", "case": f"attention backward, {width}, {dtype}",
            "same": torch.equal((shown > 0).cpu().mT, right.view(2, 4, width, rows)),
        }  # fmt: skip


# --- the sum ------------------------------------------------------------------------------------


def sums() -> Iterator[Row]:
    def plain(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, RATE) + r

    def seeded(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return ops.dropout_add(x, r, RATE, drawn_seed("cuda"))  # type: ignore[no-any-return]

    x, r, dy = (torch.randn(16384, 4096, device="cuda", dtype=BF16) for _ in range(3))
    for leaf in (x, r):
        leaf.requires_grad_()
    size = x.numel() * x.element_size()
    for name, function in (("eager", plain), ("compile", torch.compile(plain)), ("graphopt", seeded)):
        fresh()
        output = function(x, r)
        del output
        before = torch.cuda.memory_allocated()
        output = function(x, r)
        kept = torch.cuda.memory_allocated() - before - size
        del output
        with torch.no_grad():
            forward = milliseconds(lambda function=function: function(x, r))
        both = milliseconds(lambda function=function: torch.autograd.grad(function(x, r), (x, r), dy))
        yield {
            "what": "sum", "kind": name, "forward_ms": round(forward, 4), "both_ms": round(both, 4),
            "forward_gb_per_s": round(3 * size / forward / 1e6), "kept_mib": round(kept / MIB, 1),
        }  # fmt: skip


# --- attention ----------------------------------------------------------------------------------


def attentions() -> Iterator[Row]:
    for width in (128, 64):
        made = [
            torch.randn(2, 4096, heads, width, device="cuda", dtype=BF16).transpose(1, 2).requires_grad_()
            for heads in (32, 8, 8)
        ]
        dy = torch.randn_like(made[0])
        hidden = torch.ones(4096, 4096, device="cuda", dtype=torch.bool).triu(1)
        flops = 4.0 * 2 * 32 * width * 4096 * 4097 / 2

        def own(*x: torch.Tensor, p: float, width: int = width) -> torch.Tensor:
            seed = drawn_seed("cuda") if p else None
            return ops.attention(*x, None, width**-0.5, 0.0, None, 0, p, seed)[0]  # type: ignore[no-any-return]

        def library(*x: torch.Tensor, p: float) -> torch.Tensor:
            return F.scaled_dot_product_attention(*x, dropout_p=p, is_causal=True, enable_gqa=True)

        def written(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, p: float, hidden: torch.Tensor = hidden
        ) -> torch.Tensor:
            k, v = (x.repeat_interleave(4, 1) for x in (k, v))
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
            return F.dropout(torch.softmax(scores, -1), p) @ v

        for name, function in (("graphopt", own), ("sdpa", library), ("written", torch.compile(written))):
            for p in (0.0, RATE):
                row: Row = {"what": "attention", "width": width, "kind": name, "p": p}
                try:
                    fresh()
                    with torch.no_grad():
                        forward = milliseconds(lambda f=function, x=made, p=p: f(*x, p=p))
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    both = milliseconds(
                        lambda f=function, x=made, p=p, dy=dy: torch.autograd.grad(f(*x, p=p), x, dy)
                    )
                    row |= {
                        "forward_ms": round(forward, 3), "both_ms": round(both, 3),
                        "forward_tflops": round(flops / forward / 1e9),
                        "both_tflops": round(3.5 * flops / both / 1e9),
                        "extra_mib": round((torch.cuda.max_memory_allocated() - before) / MIB),
                    }  # fmt: skip
                except Exception as error:  # a kind that fails is a row that says so
                    row["error"] = f"{type(error).__name__}: {error}"[:200]
                yield row


# --- steps --------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width: int = 1024, heads: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = self.packed(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        mixed = F.dropout(weights, RATE, self.training) @ v
        x = x + F.dropout(self.out(mixed.transpose(1, 2).reshape(x.shape)), RATE, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.second(x)))), RATE, self.training)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).float().square().mean()  # type: ignore[no-any-return]


def steps() -> Iterator[Row]:
    x = torch.randn(8, 1024, 1024, device="cuda", dtype=BF16)

    def graphopt_with(*allow: str) -> Callable[[nn.Module], Any]:
        return lambda model: graphopt.optimize(model, (x,), allow=allow)

    kinds: tuple[tuple[str, Callable[[nn.Module], Any]], ...] = (
        ("compile", torch.compile),
        ("graphopt", graphopt_with()),
        ("graphopt, fuse-dropout", graphopt_with("fuse-dropout")),
    )
    for name, make in kinds:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Encoder().to("cuda", BF16)
        fast = make(model)

        def step(fast: Any = fast, model: nn.Module = model) -> None:
            fast(x).backward()
            model.zero_grad()

        for _ in range(2):
            step()
        fresh()
        taken = milliseconds(step)
        row = {
            "what": "step", "kind": name, "ms": round(taken, 2),
            "peak_mib": round(torch.cuda.max_memory_allocated() / MIB),
        }  # fmt: skip
        if isinstance(fast, graphopt.Optimized):
            row["passes"] = {record.id: record.status for record in fast.report.steps}
        yield row
        del fast, model, step


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "masks": masks, "sum": sums, "attention": attentions, "step": steps,
}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_dropout.json"))
    options.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_dropout needs a CUDA device")
        return
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_dropout.py",
        "rows": [],
    }
    for part in given.parts:
        for row in PARTS[part]():
            print(json.dumps(row), flush=True)
            document["rows"].append(row)
            write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
