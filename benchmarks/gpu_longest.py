"""The longest sequence that a training step takes on 64 GiB of one GPU: graphopt beside its peers.

    python benchmarks/gpu_longest.py --out benchmarks/results/gpu_longest.json

The Llama-3.2-1B-shaped model and the peers of ``gpu_train.py``, batch 1, gradients held. In each process the
allocator is held to the cap and grows its segments. A peer runs at two short lengths, which give the bytes
of a token; the length that these predict is tried, and up to three shorter ones, by 3 % each, or by 10 %
where bytes grow faster than the length. graphopt then runs at the longest length of ``liger-ckpt``, to
compare tokens per second, and at ``--factors`` times that.

One step is timed, after a step on 1,024 tokens for peers that compile nothing; for the others its
kernels' compilation is part of it, but not that of ``graphopt.optimize``, which is reported apart.
``--resume`` keeps the rows of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
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
PEERS = {"compile": (8192, 0.9), "liger-ckpt": (65536, 0.97)}
"""The first of two short lengths, the second is twice that, and what shrinks a length that does not fit."""
ROOM = 0.98
"""Share of the cap that graphopt is given as its budget: the cap holds for what the allocator reserves."""


def shaped(options: argparse.Namespace, length: int) -> argparse.Namespace:
    sizes = {name: getattr(options, name) for name in ("hidden", "layers", "vocab")}
    return argparse.Namespace(**sizes, batch=1, seq=length, steps=1)


def run(mode: str, options: argparse.Namespace, length: int) -> dict[str, Any]:
    """One timed step of ``mode``, or that it ran out of memory."""
    cap = int(options.gib * GIB)
    if gpu_train.device() == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    row: dict[str, Any] = {"mode": mode, "tokens": length}
    try:
        row |= ours(shaped(options, length), cap) if mode == "graphopt" else theirs(mode, options, length)
    except torch.OutOfMemoryError as error:
        return row | {"fits": False, "why": str(error).splitlines()[0][:200]}
    return row | {"fits": True, "tokens_per_second": round(1e3 * length / row["ms"], 1)}


def theirs(mode: str, options: argparse.Namespace, length: int) -> dict[str, Any]:
    shape = shaped(options, length)
    model, ids, _, step = gpu_train.peer_step(mode, shape)
    if mode != "compile":
        one_step(lambda: step(ids[:, :STEP]), model)
    return one_step(lambda: step(ids), model)


def ours(shape: argparse.Namespace, cap: int) -> dict[str, Any]:
    import graphopt

    model, ids, _ = gpu_train.prepared(shape)
    whole = gpu_train.LossOnly(model).train()
    inputs = {"input_ids": ids, "labels": ids}
    begun = time.perf_counter()
    try:
        fast = graphopt.optimize(whole, inputs, budget=int(ROOM * cap), emit="inductor", on_error="raise")
    except graphopt.BudgetError as error:
        raise torch.OutOfMemoryError(f"{error.least_bytes} bytes at least") from error
    taken = time.perf_counter() - begun
    row = one_step(lambda: fast(**inputs), model)
    predicted = fast.plan.predicted
    return row | {
        "optimize_s": round(taken, 1),
        "plan_s": round(fast.plan.seconds_to_plan, 1),
        "predicted_mib": round(predicted.peak_bytes / 2**20, 1),
        "predicted_ms": round((predicted.seconds or 0.0) * 1e3, 1),
        "points": sorted({f"{c.label} {c.alternative}".strip() for c in fast.plan.choices}),
        "reruns": [str(row) for row in fast.plan.reruns],
    }


def one_step(step: Any, model: torch.nn.Module) -> dict[str, Any]:
    gpu_train.synchronize()
    if gpu_train.device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    loss = step()
    gpu_train.synchronize()
    ahead = time.perf_counter() - begun
    loss.backward()
    gpu_train.synchronize()
    taken = time.perf_counter() - begun
    row = {"ms": round(1e3 * taken, 1), "forward_ms": round(1e3 * ahead, 1), "loss": round(float(loss), 4)}
    if gpu_train.device() == "cuda":
        row["whole_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        row["allocator_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    return row


def reach(cap: float, lengths: tuple[int, int], peaks: tuple[float, float]) -> int:
    """The length, a multiple of ``STEP``, that fits ``cap`` bytes if bytes grow by a line."""
    slope = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    return int((cap - peaks[0]) / slope + lengths[0]) // STEP * STEP


def longest(mode: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    """Find and run the longest sequence of a peer; its rows are added to ``rows``."""
    first, shrink = PEERS[mode]
    lengths = (first, 2 * first)
    short = [child(options, mode, length) for length in lengths]
    rows += short
    length = reach(options.gib * GIB, lengths, (short[0]["whole_mib"] * 2**20, short[1]["whole_mib"] * 2**20))
    for _ in range(4):
        row = child(options, mode, length)
        rows.append(row)
        if row["fits"]:
            return length
        length = int(length * shrink) // STEP * STEP
    return 0


def child(options: argparse.Namespace, mode: str, length: int) -> dict[str, Any]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("hidden", "layers", "vocab", "gib")]
    command = [sys.executable, "-W", "ignore", __file__, *sizes, "--one", mode, "--length", str(length)]
    settings = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=settings)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        raise SystemExit(f"{mode} at {length} tokens ended with status {done.returncode} and no result")
    found: dict[str, Any] = json.loads(results[0][7:])
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/gpu_longest.json")
    parser.add_argument("--one")
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--gib", type=float, default=64.0, help="the cap")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--factors", default="1,1.5", help="of liger-ckpt's longest, for graphopt")
    parser.add_argument("--resume", help="results of an earlier run, whose rows are kept")
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(run(options.one, options, options.length)), flush=True)
        return
    if not torch.cuda.is_available():
        print("gpu_longest needs a CUDA device")
        return
    known = json.loads(Path(options.resume).read_text()) if options.resume else {}
    rows: list[dict[str, Any]] = known.get("rows", [])
    found: dict[str, int] = known.get("longest", {})
    for mode in filter(None, options.peers.split(",")):
        found[mode] = longest(mode, options, rows)
        save(options, rows, found)
    for factor in map(float, filter(None, options.factors.split(","))):
        length = -int(-factor * found["liger-ckpt"] // STEP) * STEP
        row = child(options, "graphopt", length)
        rows.append(row)
        if row["fits"]:
            found["graphopt"] = max(found.get("graphopt", 0), length)
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
