"""Figure 5: how long planning takes as a transformers Llama grows from 2 to 64 layers.

    python benchmarks/planning_time.py [--quick]

Planning is everything that the passes and the planner do between the captured graph and the plan:
rewrites, model of the step, costs (with the probes of kernel workspaces), search of the frontier,
choice. Target: at most 10 s at 32 layers, a joint graph of about 7,500 nodes. Beside wall-clock time
stands the processor time of insert-checkpoints alone, run once more on the same program, and the
load average: other work on the machine lengthens the one, not the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import models
import torch
from harness import figure, parser

import graphopt
from graphopt.passes import PassContext
from graphopt_passes.insert_checkpoints import InsertCheckpoints

TARGET_SECONDS = 10.0
LAYERS = ("2", "4", "8", "16", "32", "64")


def rows(layers: str) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = models.llama(layers=int(layers), width=64, vocabulary=512, batch=2, length=64)
    start = time.perf_counter()
    optimized = graphopt.optimize(model.train(), inputs, budget="70%", emit="eager", on_error="raise")
    total = time.perf_counter() - start
    joint = next(program for program in optimized.programs if program.level.value == "joint")
    plan = optimized.plan
    context = PassContext(optimized._driver.session.cost, "train", "eager", None, frozenset())
    start = time.process_time()
    points = sum(len(frontier.points) for frontier in InsertCheckpoints().propose(joint, context))
    search = time.process_time() - start
    yield {
        "model": f"{layers} layers",
        "layers": int(layers),
        "joint_nodes": len(joint.graph.nodes),
        "plan_seconds": round(plan.seconds_to_plan, 3),
        "search_cpu_seconds": round(search, 3),
        "total_seconds": round(total, 3),
        "load_average": round(os.getloadavg()[0], 2),
        "points": points,
        "peak_of_baseline": plan.predicted.peak_bytes / plan.baseline.peak_bytes,
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_layers = {row["layers"]: row for row in found if "error" not in row}
    at_32 = by_layers.get(32)
    return {
        "failed": [row["model"] for row in found if "error" in row],
        "joint_nodes_32": at_32 and at_32["joint_nodes"],
        "plan_seconds_32": at_32 and at_32["plan_seconds"],
        "search_cpu_seconds_32": at_32 and at_32["search_cpu_seconds"],
        "target_seconds": TARGET_SECONDS,
        "met": at_32 is not None and at_32["plan_seconds"] <= TARGET_SECONDS,
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    figure("planning_time", options, rows, summary, options.models or LAYERS[: 3 if options.quick else None])
