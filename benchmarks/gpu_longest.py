"""The longest sequence that a training step takes on 64 GiB of one GPU: graphopt beside its peers.

    python benchmarks/gpu_longest.py --out benchmarks/results/gpu_longest.json

The Llama-3.2-1B-shaped model and the peers of ``gpu_train.py``, batch 1, gradients held, one step after one
that compiles. The allocator is held to the cap in each process. Lengths are found in steps of 1,024 tokens:
two short ones give the bytes of a token, the length that these predict is tried, and up to three
shorter ones by 3 % each where it does not fit. graphopt's are predicted by its planner, without a step. At
the end graphopt runs at the longest length of ``liger-ckpt``, to compare tokens per second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_train
import torch

from graphopt.atomic import write_atomically

GIB, STEP = 2**30, 1024
PEERS = ("compile", "liger-ckpt")


def shaped(options: argparse.Namespace, length: int) -> argparse.Namespace:
    sizes = {name: getattr(options, name) for name in ("hidden", "layers", "vocab")}
    return argparse.Namespace(**sizes, batch=1, seq=length, steps=1)


def run(mode: str, options: argparse.Namespace, length: int) -> dict[str, Any]:
    """One timed step of ``mode``, or that it ran out of memory."""
    cap = int(options.gib * GIB)
    if gpu_train.device() == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    shape = shaped(options, length)
    row: dict[str, Any] = {"mode": mode, "tokens": length}
    try:
        if mode == "graphopt":
            row |= ours(shape, cap)
        else:
            row |= gpu_train.peer(mode, shape, warm=0)
    except torch.OutOfMemoryError:
        return row | {"fits": False}
    return row | {"mode": mode, "fits": True, "tokens_per_second": round(1e3 * length / row["ms"], 1)}


def ours(shape: argparse.Namespace, cap: int) -> dict[str, Any]:
    import graphopt

    model, ids, static = gpu_train.prepared(shape)
    whole = gpu_train.LossOnly(model).train()
    inputs = {"input_ids": ids, "labels": ids}
    begun = time.perf_counter()
    try:
        fast = graphopt.optimize(whole, inputs, budget=cap, emit="inductor", on_error="raise")
    except graphopt.BudgetError as error:
        raise torch.OutOfMemoryError(f"{error.least_bytes} bytes at least") from error
    taken = time.perf_counter() - begun
    row = gpu_train.timed(lambda: fast(**inputs), model, static, 1, warm=0)
    predicted = fast.plan.predicted.peak_bytes
    return row | {"optimize_s": round(taken, 1), "predicted_mib": round(predicted / 2**20, 1)}


def least(options: argparse.Namespace, length: int) -> int:
    """Bytes of the least peak that graphopt's planner finds at a length."""
    import graphopt

    model, ids, _ = gpu_train.prepared(shaped(options, length))
    inputs = {"input_ids": ids, "labels": ids}
    curve = graphopt.pareto(gpu_train.LossOnly(model).train(), inputs, emit="inductor")
    return int(min(point.peak_bytes for point in curve.points))


def reach(cap: float, lengths: tuple[int, int], peaks: tuple[float, float]) -> int:
    """The length, a multiple of ``STEP``, that fits ``cap`` bytes if bytes grow by a line."""
    slope = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    return int((cap - peaks[0]) / slope + lengths[0]) // STEP * STEP


def longest(mode: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    """Find and run the longest sequence of ``mode``; its rows are added to ``rows``."""
    cap, lengths = options.gib * GIB, (options.short, 2 * options.short)
    if mode == "graphopt":
        peaks = tuple(float(child(options, "--least", str(length))["bytes"]) for length in lengths)
    else:
        short = [child(options, "--one", mode, "--length", str(length)) for length in lengths]
        rows += short
        peaks = tuple(float(row["whole_bytes"]) for row in short)
    length = reach(cap, lengths, (peaks[0], peaks[1]))
    for _ in range(4):
        row = child(options, "--one", mode, "--length", str(length))
        rows.append(row)
        if row["fits"]:
            return length
        length = int(length * 0.97) // STEP * STEP
    return 0


def child(options: argparse.Namespace, *what: str) -> dict[str, Any]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("hidden", "layers", "vocab", "gib", "short")]
    command = [sys.executable, "-W", "ignore", __file__, *sizes, *what]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(next(x for x in out.splitlines() if x.startswith("RESULT "))[7:])
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/gpu_longest.json")
    parser.add_argument("--one")
    parser.add_argument("--least", type=int, default=0)
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--gib", type=float, default=64.0, help="the cap")
    parser.add_argument("--short", type=int, default=8192, help="the first of the two short lengths")
    parser.add_argument("--modes", default=",".join((*PEERS, "graphopt")))
    options = parser.parse_args()
    if options.least:
        print("RESULT " + json.dumps({"bytes": least(options, options.least)}), flush=True)
        return
    if options.one:
        print("RESULT " + json.dumps(run(options.one, options, options.length)), flush=True)
        return
    if not torch.cuda.is_available():
        print("gpu_longest needs a CUDA device")
        return
    rows: list[dict[str, Any]] = []
    found: dict[str, int] = {}
    for mode in options.modes.split(","):
        found[mode] = longest(mode, options, rows)
        save(options, rows, found)
    if "graphopt" in found and found.get("liger-ckpt"):
        rows.append(child(options, "--one", "graphopt", "--length", str(found["liger-ckpt"])))
        save(options, rows, found)


def save(options: argparse.Namespace, rows: list[dict[str, Any]], found: dict[str, int]) -> None:
    document = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_longest.py",
        "gib": options.gib,
        "longest": found,
        "rows": rows,
    }
    write_atomically(Path(options.out), json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
