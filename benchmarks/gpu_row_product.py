"""A token's products of a Llama-3.1-8B layer with what is around them, on one GPU.

    python benchmarks/gpu_row_product.py

Each of ``graphopt::row_product``'s calls in a layer, for weights of bf16, int8 and float8: queries, keys and
values of a normed row; the output with its residual; the gate and what it gates, of a normed row; the way
down with its residual. ``us`` is the median of replays of a CUDA graph that runs the call on the weights of
``LAYERS`` layers, so that none is read from the cache; ``gb_per_second`` counts the weight alone, ``of_read``
is its share of what the same process reads at (a sum of 1 GiB). ``launches`` are the fastest of all that are
weighed, ``default`` is what is started. ``library_us``: the bare product of bf16 by the library, without
norm, gate and residual, weights side by side as well. ``layer`` rows are all four calls in turn. ``error`` is
the distance from float64, ``library_error`` that of ATen operators in bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from turns import await_turn, in_turns

from graphopt.atomic import write_atomically
from graphopt_kernels.quantized import bytes_triton
from graphopt_kernels.row_product import (
    RowProblem,
    launch_row_product,
    row_launch,
    row_launches,
    row_product,
    row_product_reference,
)

LAYERS = 8
BF16 = torch.bfloat16
KINDS = {"bf16": BF16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
CALLS = {
    # columns, inner, normed, gate
    "qkv": (6144, 4096, True, ""),
    "out": (4096, 4096, False, ""),
    "gate-up": (14336, 4096, True, "silu"),
    "down": (4096, 14336, False, ""),
}


def drawn(kind: torch.dtype, rows: int, inner: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = torch.randn(rows, inner, device="cuda") / inner**0.5
    if kind is BF16:
        return weight.to(kind), None
    scales = weight.abs().amax(1) / (127 if kind is torch.int8 else 448)
    weight /= scales[:, None]
    return (weight.round() if kind is torch.int8 else weight).to(kind), scales


def microseconds(call: Callable[[], Any], repeats: int = 8) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        graph.replay()
    taken = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(taken)


def one(kind: str) -> None:
    torch.manual_seed(0)
    codes = KINDS[kind]
    weights = [
        {name: drawn(codes, n * (2 if gate else 1), k) for name, (n, k, _, gate) in CALLS.items()}
        for _ in range(LAYERS)
    ]
    row, norm = torch.randn(1, 1, 4096, device="cuda", dtype=BF16), torch.rand(4096, device="cuda").to(BF16)
    calls: dict[str, tuple[RowProblem, Any, Any]] = {}
    for name, (n, k, normed, gate) in CALLS.items():
        x = row if k == 4096 else torch.randn(1, 1, k, device="cuda", dtype=BF16)
        around = (None, norm if normed else None, normed, 1e-5, 0.0, None if normed else row, gate)
        problem = RowProblem(n, k, BF16, codes, normed, bool(gate))
        calls[name] = problem, x, around
        for launch in row_launches(problem):
            if k % launch.inner == 0:
                started(problem, launch, x, weights[0][name], around)
        torch.nn.functional.linear(x, weights[0][name][0].to(BF16))
    await_turn()
    source = torch.randn(2**28, device="cuda")
    read = source.nbytes / microseconds(source.sum) / 1e3
    del source
    for name, (problem, x, around) in calls.items():
        held = weights[0][name][0].nbytes
        found = row_product(x, *weights[0][name], *around)
        given = (x, *weights[0][name], *around)
        wide = [t.float() if isinstance(t, torch.Tensor) and t.dtype is BF16 else t for t in given]
        exact = row_product_reference(*wide)
        apart = row_product_reference(x, *weights[0][name], *around)

        def run(
            launch: Any, name: str = name, problem: Any = problem, x: Any = x, around: Any = around
        ) -> float:
            return (
                microseconds(lambda: [started(problem, launch, x, w[name], around) for w in weights]) / LAYERS
            )

        timed = sorted(
            (run(launch), launch) for launch in row_launches(problem) if problem.inner % launch.inner == 0
        )
        default = next(us for us, launch in timed if launch == row_launch(problem))
        line = {
            "weight": kind, "call": name, "us": round(default, 2),
            "gb_per_second": round(held / default / 1e3),
            "of_read": round(held / default / 1e3 / read, 3), "error": distance(found, exact),
            "library_error": distance(apart, exact), "default": list(row_launch(problem)),
            "launches": [[round(us, 2), *launch] for us, launch in timed[:5]],
        }  # fmt: skip
        if codes is BF16:
            line["library_us"] = round(
                microseconds(lambda n=name, x=x: [torch.nn.functional.linear(x, w[n][0]) for w in weights])
                / LAYERS,
                2,
            )
        print("RESULT " + json.dumps(line), flush=True)

    def layers() -> None:
        for held in weights:
            for name, (problem, x, around) in calls.items():
                started(problem, row_launch(problem), x, held[name], around)

    us = microseconds(layers) / LAYERS
    total = sum(weight.nbytes for weight, _ in weights[0].values())
    line = {"weight": kind, "call": "layer", "us": round(us, 2), "gb_per_second": round(total / us / 1e3),
            "of_read": round(total / us / 1e3 / read, 3), "read_gb_per_second": round(read)}  # fmt: skip
    print("RESULT " + json.dumps(line), flush=True)


def started(problem: RowProblem, launch: Any, x: Any, weight: Any, around: Any) -> Any:
    bias, norm, _, eps, offset, added, gate = around
    return launch_row_product(bytes_triton, problem, launch, x, *weight, bias, norm, eps, offset, added, gate)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return round(float((found.double() - exact.double()).norm() / exact.double().norm()), 6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_row_product.json"))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seconds", type=int, default=150)
    parser.add_argument("--one")
    given = parser.parse_args()
    if given.one:
        one(given.one)
        return
    commands = {kind: [sys.executable, __file__, "--one", kind] for kind in given.kinds.split(",")}
    rows: list[Any] = []
    for kind, lines in in_turns(commands, at_once=3, seconds=given.seconds):
        found = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
        for line in found or [{"weight": kind, "call": "none: it failed"}]:
            print(json.dumps(line), flush=True)
        rows += found
        document = {
            "device": torch.cuda.get_device_name(),
            "versions": {name: version(name) for name in ("torch", "triton")},
            "date": datetime.now(UTC).date().isoformat(),
            "command": "python benchmarks/gpu_row_product.py",
            "rows": rows,
        }
        write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
