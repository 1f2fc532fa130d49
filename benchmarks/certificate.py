"""How far plans of insert-checkpoints are from a proven lower bound, and solvers against every state.

    python benchmarks/certificate.py [--quick]

Cells: each model under ten budgets, evenly spaced from the least peak that its frontier reaches to the
peak without recomputation, that one left out. The plan is the pass's, by default options, on the whole joint
program run op by op. The gap is that of the predicted step, added seconds and those of every operator
once; the gap of added seconds alone stands beside it. Up to 200 operators (of the forward, and of the
backward where they read what the forward made) a cell above 2 % is solved slot by slot for 5 s to raise its
bound.

Random steps: the optimum by each solver against that of going through every state (exhaustive.py).
"""

from __future__ import annotations

import importlib.util
import math
import random
import time
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import models
import torch
from exhaustive import least_seconds, random_step
from harness import figure, parser
from torch import nn

import graphopt
from graphopt.candidate import Frontier
from graphopt.passes import PassContext
from graphopt.program import Level
from graphopt_passes.insert_checkpoints import InsertCheckpoints
from graphopt_passes.insert_checkpoints.evaluate import Evaluator
from graphopt_passes.insert_checkpoints.exact import solve
from graphopt_passes.insert_checkpoints.model import build_model

STACKS = {
    "llama": ["model.layers"], "gpt2": ["transformer.h"], "bert": ["bert.encoder.layer"],
    "t5": ["encoder.block", "decoder.block"], "vit": ["vit.layers"], "mamba": ["backbone.layers"],
    "whisper": ["model.encoder.layers", "model.decoder.layers"], "qwen3-moe": ["model.layers"],
    "mixer": ["blocks"],
}  # fmt: skip
"""Where the layers of a model are: one of each stack makes a block with its embedding and loss."""

ITEMS = [
    *(f"{name}, 1 layer" for name in STACKS),
    *(name for name in models.MODELS if name != "whisper-layerdrop"),
    "llama, 32 layers", "llama, 44 layers", "random steps",
]  # fmt: skip
SMALL, LARGE = 200, 10_000
SMALL_GAP, LARGE_GAP = 0.02, 0.05
PART = 0.9
BUDGETS, STEPS = 10, 500
SECONDS = 5.0
SOLVERS = ["milp", *(["cp-sat"] if importlib.util.find_spec("ortools") else [])]


def built(item: str) -> models.Built:
    name, _, layers = item.partition(", ")
    if layers in ("", "1 layer"):
        model, inputs = models.build(name)
        for path in STACKS[name] if layers else ():
            parent, _, own = path.rpartition(".")
            stack = attrgetter(path)(model)
            setattr(attrgetter(parent)(model) if parent else model, own, type(stack)(*_first(stack)))
        return model, inputs
    torch.manual_seed(0)
    return models.llama(layers=int(layers.split()[0]), width=64, vocabulary=512, batch=2, length=64)


def _first(stack: nn.Module) -> list[Any]:
    """What to make a stack of its first layer from: ``ModuleList`` takes a list, ``Sequential`` modules."""
    layer = next(stack.children())
    return [[layer]] if isinstance(stack, nn.ModuleList) else [layer]


def rows(item: str) -> Iterator[dict[str, Any]]:
    if item == "random steps":
        yield random_steps(STEPS)
        return
    model, inputs = built(item)
    optimized = graphopt.optimize(model, inputs, emit="eager", on_error="raise", cache=False)
    joint = max((p for p in optimized.programs if p.level is Level.JOINT), key=lambda p: len(p.graph.nodes))
    cost = optimized._driver.session.cost
    step = sum(cost.node(node).seconds for node in joint.nodes())
    reduced = build_model(joint, cost, "eager")
    operators = len(reduced.operators) + len(reduced.slots)
    (frontier,) = InsertCheckpoints().propose(joint, PassContext(cost, "train"))
    assert isinstance(frontier, Frontier)
    low, top = frontier.points[0].peak_bytes, max(point.peak_bytes for point in frontier.points)
    for place in range(BUDGETS):
        target = low + (top - low) * place // BUDGETS
        plan = min(p.seconds for p in frontier.points if p.peak_bytes <= target)
        start = time.perf_counter()
        bound, by = frontier.seconds_bound(target), "linear program"
        if operators <= SMALL and (plan + step) / (bound + step) - 1 > SMALL_GAP:
            finer = solve(Evaluator(reduced), target, "milp", SECONDS).bound
            bound, by = (finer, "integer program") if finer > bound else (bound, by)
        yield {
            "model": item, "nodes": len(joint.graph.nodes), "operators": operators, "peak": target,
            "above_least": place / BUDGETS, "added_seconds": plan, "bound_seconds": bound, "bound_by": by,
            "step_seconds": step, "gap": (plan + step) / (bound + step) - 1,
            "gap_of_added": plan / bound - 1 if bound else (0.0 if not plan else None),
            "seconds": round(time.perf_counter() - start, 2),
        }  # fmt: skip


def random_steps(count: int) -> dict[str, Any]:
    """Optima of random steps by each solver beside that of the oracle; those that nothing fits agree on
    that."""
    equal = dict.fromkeys(SOLVERS, 0)
    spent = dict.fromkeys(SOLVERS, 0.0)
    ran = infeasible = 0
    sizes = []
    oracle_seconds = 0.0
    for seed in range(count):
        draw = random.Random(seed)
        operators = draw.randint(4, 17)
        model = random_step(seed, operators, draw.randint(4, 40 - operators))
        evaluate = Evaluator(model)
        top = evaluate(frozenset(b for b, may in enumerate(model.savable) if may)).peak
        low = min(top, evaluate(frozenset()).peak) * 0.85
        target = int(low + (top - low) * draw.random())
        start = time.perf_counter()
        best = least_seconds(model, target)
        oracle_seconds += time.perf_counter() - start
        sizes.append(operators + len(model.slots))
        infeasible += best == math.inf
        for solver in SOLVERS:
            start = time.perf_counter()
            solved = solve(evaluate, target, solver, 60.0)
            spent[solver] += time.perf_counter() - start
            found = solved.bound if best == math.inf else solved.least
            equal[solver] += found is not None and math.isclose(found, best, rel_tol=1e-5)
        ran += solved.plan is not None and solved.plan.seconds <= best * (1 + 1e-9)
    return {
        "model": "random steps", "steps": count, "largest": max(sizes), "without_plan": infeasible,
        "equal": equal, "run_by_the_evaluator": ran, "oracle_seconds": round(oracle_seconds, 1),
        "solver_seconds": {name: round(value, 1) for name, value in spent.items()},
    }  # fmt: skip


def share(cells: Sequence[dict[str, Any]], limit: float) -> float | None:
    return sum(cell["gap"] <= limit for cell in cells) / len(cells) if cells else None


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    cells = [row for row in found if "gap" in row]
    small = [cell for cell in cells if cell["operators"] <= SMALL]
    large = [cell for cell in cells if cell["operators"] > SMALL and cell["nodes"] <= LARGE]
    drawn = next((row for row in found if "equal" in row), None)
    few, many = share(small, SMALL_GAP), share(large, LARGE_GAP)
    return {
        "failed": [row["model"] for row in found if "error" in row],
        "small_cells": len(small), "small_within": few, "large_cells": len(large), "large_within": many,
        "largest_gap_small": max((cell["gap"] for cell in small), default=None),
        "largest_gap_large": max((cell["gap"] for cell in large), default=None),
        "random_equal": drawn and drawn["equal"], "random_steps": drawn and drawn["steps"],
        "met_small": few is not None and few >= PART,
        "met_large": many is not None and many >= PART,
        "met_random": drawn is not None and all(n == drawn["steps"] for n in drawn["equal"].values()),
    }  # fmt: skip


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    chosen = options.models or (["unet", "mixer, 1 layer"] if options.quick else ITEMS)
    figure("certificate", options, rows, summary, chosen)
