"""Launches of the kernels that read packed weights, timed one by one on one GPU: what their choice rests on.

    python benchmarks/sweep_packed.py --out benchmarks/results/gpu_sweep_packed.json

For each scheme, weight [columns, inner] and number of rows: all launches that are weighed (``launches`` of
``byte_launch``, ``group_launch``, ``exponent_launch``), and others around them. Each is forced on the
scheme's operator, which is measured as in ``gpu_quantized.py``: packed weights out of the caches, in a CUDA
graph, rounding of x included. ``chosen`` is what the package takes without tuning, ``launches`` are
microseconds by launch, fastest first, ``floor_us`` is the time to read the packed bytes at the read bandwidth
of the same run. Launches that need more shared memory than there is are left out. ``--threads`` processes
compile first.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_quantized import BF16, Packed, microseconds, read_bandwidth

from graphopt.atomic import write_atomically
from graphopt.packing.scheme import scheme_text
from graphopt.plugins import default_host
from graphopt_kernels.quantized import byte_launch, exponent_launch, group_launch
from graphopt_kernels.quantized.byte_launch import Launch
from graphopt_kernels.quantized.group_launch import GroupLaunch
from graphopt_kernels.tuning.lookup import Choice

LAUNCHES = {"packed-bytes": byte_launch, "packed-exponents": exponent_launch, "packed-groups": group_launch}


@contextlib.contextmanager
def asked(forced: Any = None) -> Iterator[list[tuple[str, Any]]]:
    """Kernels and problems that a launch is asked for; ``forced`` is what is answered."""
    found: list[tuple[str, Any]] = []
    usual = Choice.__call__

    def answer(self: Any, problem: Any, device: torch.device) -> Any:
        if self.kernel not in LAUNCHES:
            return usual(self, problem, device)
        found.append((self.kernel, problem))
        return usual(self, problem, device) if forced is None else forced

    Choice.__call__ = answer  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Choice.__call__ = usual  # type: ignore[method-assign]


def candidates(kernel: str, problem: Any, processors: int) -> list[Any]:
    module = LAUNCHES[kernel]
    found = [*module.launches(problem, processors), *_around(kernel, problem)]
    return [each for each in dict.fromkeys(found) if module.check_launch(problem, each) is None]


def _around(kernel: str, problem: Any) -> Iterator[Any]:
    rows = problem.rows
    high = max(8, 1 << (rows - 1).bit_length())
    if high <= 64:
        for wide, inner, slices in itertools.product((16, 32, 64), (32, 64, 128), (4, 8)):
            for parts in (1, 2):
                for stages in (2, 3, 4):
                    if kernel == "packed-groups":
                        yield GroupLaunch("slices", high, wide, slices, parts, slices, stages)
                    else:
                        yield Launch("slices", high, wide, inner, slices, parts, slices, stages)
    if kernel == "packed-bytes" and rows == 1 and not problem.rounded:
        for warps, few, places in itertools.product((2, 4, 8), (1, 2, 4), (2, 4, 8)):
            if few * places <= 16:
                yield Launch("row", 1, warps * few, 512 * places, 1, 1, warps, 1)
    if kernel == "packed-bytes" and problem.rounded and high >= 64:
        for rows, wide, warps, stages in (
            (64, 128, 4, 4), (64, 256, 8, 4), (128, 128, 4, 4), (128, 128, 8, 3), (128, 256, 8, 3),
            (128, 256, 8, 4), (256, 128, 8, 3), (256, 128, 8, 4), (256, 64, 4, 4),
        ):  # fmt: skip
            for inner in (64, 128):
                yield Launch("tiles", rows, wide, inner, 1, 1, warps, stages)


def out_of_resources(error: Exception) -> bool:
    """Triton has a class of its own for it."""
    return type(error).__name__ == "OutOfResources"


def cells(given: argparse.Namespace) -> Iterator[tuple[Packed, torch.Tensor, str, Any, list[Any]]]:
    host = default_host()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for shape in given.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for text in re.split(r",(?![^{]*})", given.schemes):
            torch.manual_seed(0)
            packed = Packed(host.scheme(text), (torch.randn(n, k, device="cuda") / k**0.5).to(BF16))
            for rows in map(int, given.rows.split(",")):
                x = torch.randn(rows, k, device="cuda").to(BF16)
                with asked() as found:
                    packed.calls(x)[0]()
                kernel, problem = found[0]
                yield packed, x, kernel, problem, candidates(kernel, problem, processors)


def compiled(given: argparse.Namespace) -> None:
    """Every ``given.threads``-th launch is called once."""
    number = itertools.count()
    for packed, x, _, _, launches in cells(given):
        for launch in launches:
            if next(number) % given.threads == given.compile:
                with contextlib.suppress(Exception), asked(launch):
                    packed.calls(x)[0]()


def timed(packed: Packed, x: torch.Tensor, launches: list[Any]) -> dict[str, float]:
    found = {}
    for launch in launches:
        try:
            with asked(launch):
                found[" ".join(map(str, launch))] = round(microseconds(packed.calls(x), 0.01), 2)
        except Exception as failed:
            if not out_of_resources(failed):
                raise
    return dict(sorted(found.items(), key=lambda item: item[1]))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_sweep_packed.json"))
    options.add_argument("--schemes", default="int8,fp8,int8-dynamic,int4,nf4,lossless12")
    options.add_argument("--shapes", default="4096x4096,14336x4096")
    options.add_argument("--rows", default="1,16")
    options.add_argument("--threads", type=int, default=12)
    options.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("sweep_packed needs a CUDA device")
        return
    if given.compile is not None:
        compiled(given)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--compile"]
    helpers = [subprocess.Popen([*command, str(number)]) for number in range(given.threads)]
    for helper in helpers:
        helper.wait()
    bandwidth = read_bandwidth()
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/sweep_packed.py",
        "read_gb_per_second": round(bandwidth / 1e9, 1),
        "rows": [],
    }
    for packed, x, kernel, problem, launches in cells(given):
        module = LAUNCHES[kernel]
        launch = module.usual_launch(problem)
        times = timed(packed, x, launches)
        row = {
            "scheme": scheme_text(packed.scheme),
            "rows": x.shape[0],
            "columns": packed.n,
            "inner": packed.k,
            "kernel": kernel,
            "floor_us": round(packed.bytes / bandwidth * 1e6, 2),
            "chosen": " ".join(map(str, launch)),
            "launches": times,
        }
        document["rows"].append(row)
        best = [f"{name}: {time}" for name, time in list(times.items())[:5]]
        print(row["scheme"], row["rows"], row["columns"], "floor", row["floor_us"], "chosen", row["chosen"],
              times.get(row["chosen"]), "median", statistics.median(times.values()), *best, sep=" | ",
              flush=True)  # fmt: skip
        write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
