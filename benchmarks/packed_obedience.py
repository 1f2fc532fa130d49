"""Are budgets kept that packed weights alone can meet?

    python benchmarks/packed_obedience.py [--models NAME ...] [--quick]

Inference of each model of ``models.py`` in float32, weights in ``int8`` and ``int4`` allowed. ``weights``:
parameters and buffers within a share of what they take, 60, 40 and 30 %; ``whole``: the peak of the step
within what it takes less half of what weights in eight bits save. Kept is a budget within which lie the bytes
that the module's tensors take, or the measured peak; ``refused`` is what ``BudgetError`` said where nothing
allowed fits. ``change`` is how far outputs are from those of the dense model, relative.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from harness import figure, parser
from models import build
from torch.utils._pytree import tree_leaves

import graphopt
from graphopt import _torch
from graphopt.errors import BudgetError

SHARES = (60, 40, 30)
ALLOWED = ("quantize-linear{schemes=[int8,int4]}",)


def held(model: torch.nn.Module) -> int:
    return _torch.storage_bytes([*model.parameters(), *model.buffers()])


def outputs(value: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(dict(value) if hasattr(value, "keys") else value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def rows(name: str) -> Iterator[dict[str, Any]]:
    model, inputs = build(name)
    model.eval().requires_grad_(False)
    dense = held(model)
    with torch.no_grad():
        exact = outputs(model(**inputs))
        plain = graphopt.optimize(model, inputs, on_error="raise", cache=False)
        baseline = plain.measure(repeats=1).peak_bytes
    # Eight bits of 32, and a scale for each row.
    whole = baseline - (dense - dense * 9 // 32) // 2
    budgets: list[tuple[str, int, Any]] = [
        (f"weights {share} %", dense * share // 100, graphopt.Budget(weights=dense * share // 100))
        for share in SHARES
    ]
    for label, bound, budget in [*budgets, ("whole", whole, whole)]:
        torch._dynamo.reset()
        packed = copy.deepcopy(model)
        row: dict[str, Any] = {"model": name, "budget": label, "bound": bound, "dense": dense}
        with torch.no_grad():
            try:
                fast = graphopt.optimize(
                    packed, inputs, budget=budget, allow=ALLOWED, on_error="raise", cache=False
                )
            except BudgetError as error:
                yield {**row, "refused": str(error).splitlines()[0][:300]}
                continue
            found = outputs(fast(**inputs))
            measured = fast.measure(repeats=1).peak_bytes
        taken = held(packed)
        changes = [
            float((a - b).double().norm() / b.double().norm().clamp_min(1e-30))
            for a, b in zip(found, exact, strict=True)
        ]
        yield {
            **row,
            "weights": taken,
            "measured": measured,
            "predicted": fast.plan.predicted.peak_bytes if fast.plan is not None else None,
            "kept": measured <= bound if label == "whole" else taken <= bound,
            "change": max(changes),
        }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tried = [row for row in found if "kept" in row]
    return {
        "models": len({row["model"] for row in found}),
        "budgets": len(tried),
        "kept": sum(row["kept"] for row in tried),
        "refused": [f"{row['model']}, {row['budget']}" for row in found if "refused" in row],
        "failed": [row["model"] for row in found if "error" in row],
        "met": bool(tried) and all(row["kept"] for row in tried) and not any("error" in row for row in found),
    }


if __name__ == "__main__":
    figure("packed_obedience", parser(__doc__).parse_args(), rows, summary)
