"""Figure 1: peak bytes of a training step, predicted before it runs and measured op by op.

    python benchmarks/prediction.py [--models NAME ...] [--quick]

Each model at its baseline (nothing recomputed) and under three budgets: the least feasible one, and
a third and two thirds of the way up to the baseline. Measured is what torch's CPU allocator held,
parameters, buffers and inputs included. Target: an error of at most 0.1 % everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from harness import budgets_between, figure, parser, prepare

TARGET_PERCENT = 0.1


def rows(name: str) -> Iterator[dict[str, Any]]:
    prepared = prepare(name)
    least, baseline = prepared.least, prepared.baseline
    for budget in [None, *reversed(budgets_between(least, baseline, 4)[:-1])]:
        predicted = prepared.under(budget)
        measured = prepared.optimized.measure(repeats=1).peak_bytes
        yield {
            "model": name,
            "graphs": prepared.graphs,
            "budget": budget,
            "static": prepared.static,
            "predicted": predicted,
            "measured": measured,
            "error_bytes": predicted - measured,
            "error_percent": 100 * abs(predicted - measured) / measured,
        }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    worst = max(good, key=lambda row: row["error_percent"], default=None)
    return {
        "models": len({row["model"] for row in good}),
        "failed": [row["model"] for row in found if "error" in row],
        "points": len(good),
        "exact_to_the_byte": sum(row["error_bytes"] == 0 for row in good),
        "worst_percent": worst and worst["error_percent"],
        "worst_model": worst and worst["model"],
        "target_percent": TARGET_PERCENT,
        "met": worst is not None and len(good) == len(found) and worst["error_percent"] <= TARGET_PERCENT,
    }


if __name__ == "__main__":
    figure("prediction", parser(__doc__).parse_args(), rows, summary)
