"""Products that read packed weights on one GPU, beside dense bf16 ones, for the shapes of Llama-3.1-8B.

    python benchmarks/gpu_quantized.py --out benchmarks/results/gpu_quantized.json

Every scheme that is registered is measured as its options stand. A CUDA graph holds a call for each of as
many weights as make 256 MiB together, more than caches hold, and is replayed; ``us`` is the median time of a
replay over the calls, launches included. x is bf16, the same for all calls, and rounding it is part of
dynamic schemes; one channel in 512 is an outlier of ``llm-int8``. ``ratio`` is the time of the dense product
over that. ``read`` is the rate at which packed bytes are read, as a share of the read bandwidth that the same
run measures by summing a vector of 1 GiB (``graphopt::probe_read``). ``error`` is the distance of the first
16 rows and 256 columns from float64 with unpacked weights, relative; that of dense products in bf16 is what
rounding the result makes. What would take the run beyond ``--seconds`` is left out and named.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.atomic import write_atomically
from graphopt.packing import Scheme
from graphopt.packing.scheme import operator_named, scheme_text
from graphopt.plugins import default_host
from graphopt_kernels import bandwidth
from graphopt_kernels.quantized.byte_launch import Problem, launch_for, predicted_seconds

SHAPES = ((4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
"""Results and products of each: output and gate projections and so on; the last is the head."""

ROWS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
OUTLIER = 512
"""One channel of so many is said to have large inputs, for schemes that keep its weights as they are."""

COLD = 256 * 2**20
MOST_COPIES = 24
BF16 = torch.bfloat16


def microseconds(calls: Sequence[Callable[[], Any]], seconds: float = 0.02) -> float:
    """Of one of ``calls``, all of them in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in (calls[0], calls[-1]):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    taken: list[float] = []
    started = time.perf_counter()
    for number in range(40):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number:
            taken.append(start.elapsed_time(end) * 1e3 / len(calls))
        if len(taken) >= 5 and time.perf_counter() - started > seconds:
            break
    return statistics.median(taken)


def read_bandwidth() -> float:
    """Bytes a second."""
    data = torch.empty(2**30 // 4, device="cuda")
    return 2**30 / microseconds([lambda: bandwidth.probe_read(data)] * 4) * 1e6


def copies_for(held: int) -> int:
    return max(2, min(MOST_COPIES, -(-COLD // held)))


def distance(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    exact = x[:16].double() @ weight[:256].double().t()
    return float((found[:16, :256].double() - exact).norm() / exact.norm())


def dense_row(x: torch.Tensor, weight: torch.Tensor) -> tuple[float, float]:
    """Microseconds and error of the dense product."""
    weights = [weight.clone() for _ in range(copies_for(weight.nbytes))]
    time_ = microseconds([lambda w=w: F.linear(x, w) for w in weights])  # type: ignore[misc]
    return time_, distance(F.linear(x, weight), x, weight)


def statistics_of(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What calibration would have found: the largest size of each input."""
    largest = torch.full((weight.shape[1],), 4.0, device=weight.device)
    largest[::OUTLIER] = 60.0
    return {"largest": largest}


class Packed:
    """Copies of one packed weight."""

    def __init__(self, scheme: Scheme, weight: torch.Tensor) -> None:
        self.scheme, (self.n, self.k) = scheme, weight.shape
        packed = scheme.pack(weight, statistics_of(weight))
        self.bytes = sum(tensor.nbytes for tensor in packed.values())
        self.unpacked = scheme.unpack(packed, self.n, self.k, torch.float32)[:256].clone()
        self.copies = [packed]
        for _ in range(copies_for(self.bytes) - 1):
            self.copies.append({name: tensor.clone() for name, tensor in packed.items()})

    def calls(self, x: torch.Tensor) -> list[Callable[[], Any]]:
        linear, constants = operator_named(self.scheme.linear_op), self.scheme.constants(self.n, self.k)
        held = [tuple(copy.values()) for copy in self.copies]
        return [lambda tensors=tensors: linear(x, *tensors, None, *constants) for tensors in held]  # type: ignore[misc]


def problem_of(packed: Packed, rows: int) -> Problem | None:
    """Of the kernels for weights of a byte, if they are these."""
    codes = packed.copies[0].get("codes")
    if codes is None or codes.dtype not in (torch.int8, torch.float8_e4m3fn):
        return None
    if codes.shape != (packed.n, packed.k):
        return None
    rounded = packed.scheme.name not in ("int8", "fp8")
    return Problem(rows, packed.n, packed.k, BF16, codes.dtype, rounded)


def measured(packed: Packed, x: torch.Tensor, dense: tuple[float, float], bandwidth: float) -> dict[str, Any]:
    rows = x.shape[0]
    calls = packed.calls(x)
    time_ = microseconds(calls)
    row = {
        "scheme": scheme_text(packed.scheme),
        "rows": rows,
        "columns": packed.n,
        "inner": packed.k,
        "us": round(time_, 2),
        "dense_us": round(dense[0], 2),
        "ratio": round(dense[0] / time_, 3),
        "read": round(packed.bytes / time_ * 1e6 / bandwidth, 3),
        "error": round(distance(calls[0](), x, packed.unpacked), 6),
        "dense_error": round(dense[1], 6),
    }
    problem = problem_of(packed, rows)
    if problem is not None:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        launch = launch_for(problem, processors)
        row["launch"] = " ".join(map(str, launch))
        row["predicted_us"] = round(predicted_seconds(problem, launch, processors) * 1e6, 2)
    return row


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_quantized.json"))
    options.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of rows, by commas")
    options.add_argument("--shapes", default="", help="numbers of shapes from 0, by commas; all else")
    options.add_argument("--schemes", default="", help="schemes, by commas: int8,int4{group=64}; all else")
    options.add_argument("--seconds", type=float, default=150)
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_quantized needs a CUDA device")
        return
    started = time.perf_counter()
    wanted = [text for text in re.split(r",(?![^{]*})", given.schemes) if text]
    chosen = [SHAPES[int(number)] for number in given.shapes.split(",") if number] or list(SHAPES)
    host = default_host()
    schemes = [host.scheme(text) for text in wanted or host.schemes()]
    bandwidth = read_bandwidth()
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_quantized.py",
        "read_gb_per_second": round(bandwidth / 1e9, 1),
        "rows": [],
        "left_out": [],
    }
    for n, k in chosen:
        torch.manual_seed(0)
        weight = (torch.randn(n, k, device="cuda") / k**0.5).to(BF16)
        inputs = [torch.randn(int(rows), k, device="cuda").to(BF16) for rows in given.rows.split(",")]
        dense = [dense_row(x, weight) for x in inputs]
        for scheme in schemes:
            reason = scheme.refuses(n, k, BF16, weight.device) or scheme.lacks(k, statistics_of(weight))
            reason = reason or scheme.refuses_numbers(weight, statistics_of(weight))
            if reason is None and time.perf_counter() - started > given.seconds:
                reason = "no time is left"
            if reason is not None:
                left = {"scheme": scheme_text(scheme), "shape": [n, k], "why": str(reason)}
                document["left_out"].append(left)
                continue
            packed = Packed(scheme, weight)
            for x, beside in zip(inputs, dense, strict=True):
                row = measured(packed, x, beside, bandwidth)
                print(json.dumps(row), flush=True)
                document["rows"].append(row)
            del packed
            write_atomically(given.out, json.dumps(document, indent=1) + "\n")
    write_atomically(given.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps({"seconds": round(time.perf_counter() - started, 1), "left_out": document["left_out"]}))


if __name__ == "__main__":
    main()
