"""Figure 2: is the measured peak within the budget, and does it fall when the budget falls?

    python benchmarks/obedience.py [--models NAME ...] [--quick]

Twenty budgets for each model, from the least feasible to the baseline peak. Target: the measured peak
is within every budget, and never rises when the budget falls.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from harness import budgets_between, figure, parser, prepare


def rows(name: str, *, count: int) -> Iterator[dict[str, Any]]:
    prepared = prepare(name)
    points = []
    for budget in reversed(budgets_between(prepared.least, prepared.baseline, count)):
        predicted = prepared.under(budget)
        measured = prepared.optimized.measure(repeats=1).peak_bytes
        points.append({"budget": budget, "predicted": predicted, "measured": measured})
    peaks = [point["measured"] for point in points]
    yield {
        "model": name,
        "graphs": prepared.graphs,
        "static": prepared.static,
        "budgets": len(points),
        "within": sum(point["measured"] <= point["budget"] for point in points),
        "rises": sum(later > earlier for earlier, later in itertools.pairwise(peaks)),
        "distinct_peaks": len(set(peaks)),
        "least_of_baseline": points[-1]["measured"] / points[0]["measured"],
        "used_of_budget_worst": min(point["measured"] / point["budget"] for point in points),
        "points": points,
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    within, budgets = sum(row["within"] for row in good), sum(row["budgets"] for row in good)
    rises = sum(row["rises"] for row in good)
    return {
        "models": len(good),
        "failed": [row["model"] for row in found if "error" in row],
        "budgets": budgets,
        "within": within,
        "rises": rises,
        "met": bool(good) and len(good) == len(found) and within == budgets and rises == 0,
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    figure("obedience", options, functools.partial(rows, count=6 if options.quick else 20), summary)
