"""Seconds from a model to the end of its first training step, on the CPU: graphopt beside torch.compile.

    python benchmarks/warm_start.py [--repeats 5] [--out FILE]

A transformers Llama of 16 layers, narrow, because what a start takes goes with the number of operators.
``graphopt`` generates code, without a budget; ``op-by-op`` runs operators one by one within ``--budget``.
Each start is a process of its own. ``cold`` finds empty caches, ``warm`` those that the cold start left. They
take turns, one at a time. Seconds count from the model to the end of the first forward and backward,
importing graphopt included; importing torch and transformers and building the model are left out. ``cpu_s``
are seconds of the processor in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_train import LossOnly, build
from harness import RESULTS, environment, say

from graphopt.atomic import write_atomically

MODES = ("graphopt", "op-by-op", "compile")
TARGET_S = 1.0
"""What a warm start may add to torch.compile's."""


def one(mode: str, shape: argparse.Namespace) -> dict[str, Any]:
    """One start in this process."""
    model = LossOnly(build(shape)).train()
    ids = torch.randint(0, shape.vocab, (shape.batch, shape.seq))
    begun, cpu = time.perf_counter(), time.process_time()
    fast: Any
    if mode == "compile":
        fast = torch.compile(model)
    else:
        import graphopt

        op_by_op = mode == "op-by-op"
        emit, budget = ("eager", shape.budget) if op_by_op else ("inductor", None)
        inputs = {"input_ids": ids, "labels": ids}
        fast = graphopt.optimize(model, inputs, emit=emit, budget=budget, on_error="raise")
    made = time.perf_counter()
    loss = fast(input_ids=ids, labels=ids)
    loss.backward()
    row = {
        "seconds": round(time.perf_counter() - begun, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "optimize_s": 0.0 if mode == "compile" else round(made - begun, 2),
        "loss": round(float(loss.detach()), 4),
    }
    if mode != "compile":
        row["notes"] = list(fast.report.diagnostics)
    return row


def start(mode: str, folder: Path, shape: argparse.Namespace) -> dict[str, Any]:
    """One start in a process of its own, its caches in ``folder``."""
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    # An installed package has its bytecode.
    unset = ("GRAPHOPT_CACHE", "GRAPHOPT_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
    own = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--one", mode]
    for name in ("hidden", "layers", "batch", "seq", "vocab", "budget"):
        command += [f"--{name}", str(getattr(shape, name))]
    load = os.getloadavg()[0]
    shown = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**own, **caches}, cwd=Path(__file__).parent
    )
    found = [line[7:] for line in shown.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        return {"error": f"it failed with {shown.returncode}"}
    return {**json.loads(found[0]), "load_average": round(load, 2)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def middle(mode: str, kind: str, key: str) -> float | None:
        found = [r[key] for r in rows if (r["mode"], r["start"]) == (mode, kind) and key in r]
        return round(statistics.median(found), 2) if found else None

    found = {
        f"{mode}_{kind}_{key}": middle(mode, kind, key)
        for mode in MODES
        for kind in ("cold", "warm")
        for key in ("seconds", "cpu_s")
    }
    for mode in MODES[:-1]:
        for key in ("seconds", "cpu_s"):
            ours, theirs = found[f"{mode}_warm_{key}"], found[f"compile_warm_{key}"]
            found[f"{mode}_added_{key}"] = None if ours is None or theirs is None else round(ours - theirs, 2)
    added = [found[f"{mode}_added_seconds"] for mode in MODES[:-1]]
    met = all(seconds is not None and seconds <= TARGET_S for seconds in added)
    return {**found, "target_s": TARGET_S, "met": met}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS / "warm_start.json")
    made.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    made.add_argument("--repeats", type=int, default=5, help="warm starts of each")
    made.add_argument("--hidden", type=int, default=128)
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--seq", type=int, default=64)
    made.add_argument("--vocab", type=int, default=1024)
    made.add_argument("--budget", default="75%", help="of steps that run op by op")
    return made


def main() -> None:
    shape = parser().parse_args()
    if shape.one:
        print("RESULT " + json.dumps(one(shape.one, shape)), flush=True)
        return
    begun, rows = time.time(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cold", *["warm"] * shape.repeats):
            for mode in MODES:
                rows.append({"mode": mode, "start": kind, **start(mode, Path(folder) / mode, shape)})
                say(json.dumps(rows[-1]))
    record = {
        "figure": "warm_start", **environment(), "cores": os.cpu_count(), "budget": shape.budget,
        "seconds": round(time.time() - begun, 1), "summary": summary(rows), "rows": rows,
    }  # fmt: skip
    write_atomically(shape.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
