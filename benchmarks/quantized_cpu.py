"""Linear layers with packed weights on the CPU, beside float32 ones.

    python benchmarks/quantized_cpu.py

x is float32. ``float32`` is the dense layer, ``bfloat16`` the same with x and weight in bfloat16. Least of
many calls, in milliseconds, by one thread; weights change from call to call, as many as make 256 MiB of
float32, so that they come from memory. ``error`` is relative to float64 with unpacked weights.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import environment

from graphopt.atomic import write_atomically
from graphopt.packing import Scheme
from graphopt.packing.scheme import operator_named
from graphopt.plugins import default_host

OUT = Path(__file__).parent / "results" / "quantized_cpu.json"
SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096))
ROWS = (1, 8, 64, 256)
COLD = 256 * 2**20
SCHEMES = ("int8", "int8-dynamic")
SECONDS = 0.7


def milliseconds(calls: Sequence[Callable[[], Any]]) -> float:
    taken: list[float] = []
    started = time.perf_counter()
    for number, call in enumerate(itertools.cycle(calls)):
        before = time.perf_counter()
        call()
        if number:
            taken.append(time.perf_counter() - before)
        if len(taken) >= 4 and time.perf_counter() - started > SECONDS:
            return round(min(taken) * 1e3, 4)
    raise AssertionError("there is nothing to call")


def main() -> None:
    torch.set_num_threads(1)
    schemes: list[Scheme] = [default_host().schemes()[name]() for name in SCHEMES]
    rows = []
    for n, k in SHAPES:
        torch.manual_seed(0)
        copies = max(1, COLD // (4 * n * k))
        weights = [torch.randn(n, k) / k**0.5 for _ in range(copies)]
        halves = [weight.bfloat16() for weight in weights]
        packed = {scheme.name: [scheme.pack(weight, {}) for weight in weights] for scheme in schemes}
        for count in ROWS:
            x = torch.randn(count, k)
            half = x.bfloat16()
            row: dict[str, Any] = {
                "columns": n,
                "inner": k,
                "rows": count,
                "float32": milliseconds([lambda w=w, x=x: F.linear(x, w) for w in weights]),  # type: ignore[misc]
                "bfloat16": milliseconds([lambda w=w, x=half: F.linear(x, w) for w in halves]),  # type: ignore[misc]
            }
            for scheme in schemes:
                op = operator_named(scheme.linear_op)
                tensors = [tuple(copy.values()) for copy in packed[scheme.name]]
                row[scheme.name] = milliseconds(
                    [lambda t=t, x=x, op=op: op(x, *t, None) for t in tensors]  # type: ignore[misc]
                )
                unpacked = scheme.unpack(packed[scheme.name][0], n, k, torch.float32)
                exact = x.double() @ unpacked.double().t()
                found = op(x, *tensors[0], None).double()
                row[f"{scheme.name}_error"] = float((found - exact).norm() / exact.norm())
            print(json.dumps(row), flush=True)
            rows.append(row)
    document = {
        **environment(),
        "rows": rows,
    }
    write_atomically(OUT, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
