"""What the order of the operators takes off the peak: with order-backward and without it.

    python benchmarks/backward_order.py [--quick]

Models run op by op. For both pipelines: the peak of the step without recomputation, and the least peak
that any schedule of insert-checkpoints reaches; activations, gradients and transients, above parameters and
inputs. Planning is processor seconds of the pass alone and of the search of checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import models
import torch
from harness import figure, geomean, parser

import graphopt
from graphopt.candidate import Candidate, Frontier
from graphopt.capture.joint import save_everything
from graphopt.passes import PassContext
from graphopt.program import Level, Program
from graphopt_passes.insert_checkpoints import InsertCheckpoints
from graphopt_passes.order_backward import OrderBackward

ITEMS = [name for name in models.MODELS if name != "whisper-layerdrop"]


def rows(item: str) -> Iterator[dict[str, Any]]:
    model, inputs = models.build(item)
    optimized = graphopt.optimize(
        model, inputs, emit="eager", on_error="raise",
        pipeline=["normalize", "causal-attention"],
    )  # fmt: skip
    joint = max((p for p in optimized.programs if p.level is Level.JOINT), key=lambda p: len(p.graph.nodes))
    context = PassContext(optimized._driver.session.cost, "train")
    before = measured(joint, context)
    start = time.process_time()
    found = [item for item in OrderBackward().propose(joint, context) if isinstance(item, Candidate)]
    spent = time.process_time() - start
    with joint.edit("order-backward") as edit:
        for candidate in found:
            candidate.apply(edit)
    after = measured(joint, context) if found else before
    yield {
        "model": item, "nodes": len(joint.graph.nodes), "offered": bool(found),
        "peak_before": before[0], "peak_after": after[0], "least_before": before[1], "least_after": after[1],
        "peak_ratio": after[0] / before[0], "least_ratio": after[1] / before[1],
        "order_cpu_seconds": round(spent, 3), "search_cpu_seconds": round(before[2], 3),
    }  # fmt: skip


def measured(joint: Program, context: PassContext) -> tuple[int, int, float]:
    """Peak without recomputation, least peak of the frontier, processor seconds of the search."""
    peak = context.cost.memory([(joint, save_everything(joint))]).peak_bytes
    start = time.process_time()
    (frontier,) = InsertCheckpoints().propose(joint, context)
    assert isinstance(frontier, Frontier)
    return peak, min(point.peak_bytes for point in frontier.points), time.process_time() - start


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    return {
        "failed": [row["model"] for row in found if "error" in row],
        "offered": sum(row["offered"] for row in good),
        "peak_ratio": geomean([row["peak_ratio"] for row in good]),
        "least_ratio": geomean([row["least_ratio"] for row in good]),
        "largest_share_of_planning": max(
            (row["order_cpu_seconds"] / row["search_cpu_seconds"] for row in good), default=None
        ),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    options = parser(__doc__).parse_args()
    chosen = options.models or (ITEMS[:3] if options.quick else ITEMS)
    figure("backward_order", options, rows, summary, chosen)
