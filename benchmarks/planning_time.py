"""Figure 5: how long planning takes as programs grow to 40,000 nodes, and one step of the search.

    python benchmarks/planning_time.py [--quick]

Programs are a transformers Llama of 2 to 64 layers and a residual net of 1,000 blocks [linear, relu,
linear, add], whole and op by op. Planning is everything that the passes and the planner do between the
captured graph and the plan: rewrites, model of the step, costs (with the probes of kernel workspaces), search
of the frontier, choice. Tracing is not. Targets: 2 s at 5,000 nodes of the joint graph, 20 s at 10,000, 10 s
for the residual net; 0.1 ms for each change of a plan at 5,000 nodes: a storage is given up, peak, excess
and price are read, the change is taken back, for every storage that may be. Planning runs on one thread, and
what it is judged by is its processor time, which other work on the machine does not lengthen. Beside it stand
wall-clock time, the processor time of insert-checkpoints alone, run once more on the same program, and the
load average.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import models
import numpy as np
import torch
from harness import figure, parser
from torch import nn

import graphopt
from graphopt import choosing, offered_schedules, session
from graphopt.cost import CostModel
from graphopt.passes import PassContext
from graphopt.program import Program
from graphopt.session import Session
from graphopt_passes.insert_checkpoints import InsertCheckpoints
from graphopt_passes.insert_checkpoints.incremental import Incremental
from graphopt_passes.insert_checkpoints.model import build_model
from graphopt_passes.insert_checkpoints.portfolio import minimum_cut
from graphopt_passes.insert_checkpoints.realise import saved_storages

SMALL_NODES, SMALL_SECONDS = 5_000, 2.0
LARGE_NODES, LARGE_SECONDS = 10_000, 20.0
DEEP_SECONDS = 10.0
CHANGE_MILLISECONDS = 0.1
LAYERS = ("2", "4", "8", "16", "22", "32", "44", "64")
DEEP = "1,000 blocks"
PLANNING: tuple[tuple[Any, str], ...] = (
    (Session, "_rewrite"),
    (offered_schedules, "frontier_of"),
    (session, "choose_schedules"),
    (choosing, "record_plan"),
)
"""Where what plans is called: a step of one program, captured whole."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + hidden


class Deep(nn.Module):
    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).square().mean()


class PlanningClock:
    """Processor seconds of this process while the session plans, nested calls counted once."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._start = 0.0, 0, 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._depth:
                self._start = time.process_time()
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.process_time() - self._start

        return timed


def built(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name == DEEP:
        return Deep(1_000, 16), (torch.randn(256, 16),)
    return models.llama(layers=int(name), width=64, vocabulary=512, batch=2, length=64)


def change_milliseconds(joint: Program, cost: CostModel) -> dict[str, float]:
    """One change of the plan that keeps everything, and of one that makes much again, in milliseconds."""
    model = build_model(joint, cost, "eager")
    plan = Incremental(model)
    everything = saved_storages(model, model.baseline.saved)
    cut = minimum_cut(model, model.seconds, float(np.median(model.seconds)))
    found = {}
    for name, saved in (("change_ms", everything), ("change_ms_recomputing", cut)):
        plan.load(saved)
        plan.settle()
        target = plan.peak
        taken = []
        for b in [b for b in sorted(plan.kept) if model.again[model.maker[b]]]:
            start = time.process_time()
            mark = plan.mark()
            plan.change(give=[b])
            _ = plan.peak, plan.price, plan.excess(target)
            plan.undo(mark)
            taken.append(1e3 * (time.process_time() - start))
        found[name] = round(statistics.fmean(taken), 4)
    return found


def rows(name: str) -> Iterator[dict[str, Any]]:
    model, inputs = built(name)
    clock = PlanningClock()
    with ExitStack() as stack:
        for owner, function in PLANNING:
            timed = clock.around(getattr(owner, function))
            stack.enter_context(mock.patch.object(owner, function, timed))
        start = time.perf_counter()
        settings = {"emit": "eager", "on_error": "raise", "cache": False}
        optimized = graphopt.optimize(model.train(), inputs, budget="70%", **settings)
        total = time.perf_counter() - start
    joint = next(program for program in optimized.programs if program.level.value == "joint")
    plan = optimized.plan
    cost = optimized._driver.session.cost
    context = PassContext(cost, "train", "eager", None, frozenset())
    start = time.process_time()
    points = sum(len(frontier.points) for frontier in InsertCheckpoints().propose(joint, context))
    search = time.process_time() - start
    yield {
        "model": name if name == DEEP else f"{name} layers",
        "joint_nodes": len(joint.graph.nodes),
        "plan_seconds": round(plan.seconds_to_plan, 3),
        "plan_cpu_seconds": round(clock.seconds, 3),
        "search_cpu_seconds": round(search, 3),
        "total_seconds": round(total, 3),
        "load_average": round(os.getloadavg()[0], 2),
        "points": points,
        "peak_of_baseline": plan.predicted.peak_bytes / plan.baseline.peak_bytes,
        **change_milliseconds(joint, cost),
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]

    def nearest(nodes: int) -> dict[str, Any] | None:
        """The row of about so many nodes."""
        near = [r for r in good if r["model"] != DEEP and 0.9 * nodes <= r["joint_nodes"] <= 1.1 * nodes]
        return min(near, key=lambda row: abs(row["joint_nodes"] - nodes), default=None)

    small, large = nearest(SMALL_NODES), nearest(LARGE_NODES)
    deep = next((row for row in good if row["model"] == DEEP), None)

    def verdict(row: dict[str, Any] | None, key: str, target: float) -> dict[str, Any]:
        return {
            "joint_nodes": row and row["joint_nodes"], key: row and row[key], "target": target,
            "met": row is not None and row[key] <= target,
        }  # fmt: skip

    return {
        "failed": [row["model"] for row in found if "error" in row],
        "small": verdict(small, "plan_cpu_seconds", SMALL_SECONDS),
        "large": verdict(large, "plan_cpu_seconds", LARGE_SECONDS),
        "deep": verdict(deep, "plan_cpu_seconds", DEEP_SECONDS),
        "change": verdict(small, "change_ms", CHANGE_MILLISECONDS),
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    chosen = options.models or (LAYERS[:3] if options.quick else (*LAYERS, DEEP))
    figure("planning_time", options, rows, summary, chosen)
