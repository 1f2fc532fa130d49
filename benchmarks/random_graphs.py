"""Do random graphs compute what eager does, whatever a pass and a budget make of them?

    python benchmarks/random_graphs.py [--first SEED] [--graphs N] [--block N] [--limit N] [--again]

Each graph is a random whole model (``tests/drawn_models.py``: pointwise operators, views, reductions,
products, norms, attention, losses, lookups, conversions, writes in place), made from its seed alone. Every
pass that keeps results is forced to rewrite what it can, and two steps, in training one more under a random
budget, are held to eager and to float64 (``tests/fuzzing.py``): outputs, gradients, buffers, inputs. Blocks
of ``--block`` seeds have a process of their own, one at a time, stopped after ``--limit`` seconds. Results
are stored after each, and a later run goes on from there (``--again`` runs what it is asked for once more).
Graphs that AOTAutograd itself fails on (``backend="aot_eager"``) are ``untraced``: optimized under default
options, they have to run as they did. Target: 2,000 graphs and none that differs, fails or is stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, environment, say

from graphopt.atomic import write_atomically
from tests.fuzzing import check_seed, check_untraced

TARGET = 2000


def attempt(seeds: Sequence[int], out: Path) -> None:
    """Check the graphs of ``seeds``, and write to ``out`` after each how many have been and which failed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed: dict[str, str] = {}
    untraced: list[int] = []
    rewritten = 0
    for number, seed in enumerate(seeds, 1):
        try:
            rewritten += bool(check_seed(seed).report.rewrites)
        except AssertionError as error:
            try:
                known = check_untraced(seed)
            except Exception as also:
                known, error = False, AssertionError(f"under default options: {also}\n\n{error}")
            if known:
                untraced.append(seed)
            else:
                failed[str(seed)] = str(error)[:2000]
        row = {"graphs": number, "rewritten": rewritten, "untraced": untraced, "failed": failed}
        write_atomically(out, json.dumps(row))


def tried(seeds: Sequence[int], limit: float) -> dict[str, Any]:
    """The row of a block, made in a process of its own."""
    out = Path(tempfile.mkdtemp()) / "row.json"
    began = time.time()
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(seeds, out))
    process.start()
    process.join(limit)
    over = process.is_alive()
    if over:
        process.kill()
        process.join()
    empty = {"graphs": 0, "rewritten": 0, "untraced": [], "failed": {}}
    row: dict[str, Any] = json.loads(out.read_text()) if out.exists() else empty
    shutil.rmtree(out.parent)
    if over or process.exitcode:
        why = f"after {limit:g} s" if over else f"exit code {process.exitcode}"
        row["stopped"] = f"{why}, at seed {seeds[row['graphs']]}"
    return {"first": seeds[0], "last": seeds[-1], **row, "seconds": round(time.time() - began, 1)}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    graphs = sum(row["graphs"] for row in rows)
    failed = sorted(int(seed) for row in rows for seed in row["failed"])
    stopped = [f"{row['first']} to {row['last']}" for row in rows if "stopped" in row]
    return {
        "graphs": graphs,
        "rewritten": sum(row["rewritten"] for row in rows),
        "untraced": [seed for row in rows for seed in row.get("untraced", ())],
        "failed": failed,
        "stopped": stopped,
        "met": graphs >= TARGET and not failed and not stopped,
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--first", type=int, default=0, metavar="SEED", help="seed of the first graph")
    options.add_argument("--graphs", type=int, default=TARGET, help="how many seeds from there on")
    options.add_argument("--block", type=int, default=50, help="graphs of one process")
    options.add_argument("--limit", type=float, default=600, help="seconds for one process")
    options.add_argument("--again", action="store_true", help="run also what there is a result of")
    options.add_argument("--out", type=Path, default=RESULTS / "random_graphs.json")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(chosen.out.read_text())["rows"] if chosen.out.exists() else []
    rows: dict[int, dict[str, Any]] = {row["first"]: row for row in stored}
    asked = range(chosen.first, chosen.first + chosen.graphs)
    for start in range(asked.start, asked.stop, chosen.block):
        seeds = range(start, min(start + chosen.block, asked.stop))
        for first in [f for f, row in rows.items() if f in seeds or row["last"] in seeds]:
            if chosen.again or "stopped" in rows[first]:
                del rows[first]
        known = {seed for row in rows.values() for seed in range(row["first"], row["last"] + 1)}
        left = [seed for seed in seeds if seed not in known]
        if not left:
            continue
        rows[left[0]] = row = tried(left, chosen.limit)
        say(f"{row['first']} to {row['last']}: {row}")
        ordered = [rows[first] for first in sorted(rows)]
        record = {
            "figure": "random_graphs", **environment(), "threads": 1, "summary": summary(ordered),
            "rows": ordered,
        }  # fmt: skip
        write_atomically(chosen.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary([rows[first] for first in sorted(rows)]), indent=1))


if __name__ == "__main__":
    main()
