"""The section of docs/benchmarks.md on random graphs, from ``results/random_graphs.json``."""

from __future__ import annotations

from typing import Any

from table_cells import verdict

__all__ = ["random_graphs"]


def random_graphs(record: dict[str, Any]) -> str:
    summary, rows = record["summary"], record["rows"]
    seeds = ", ".join(f"{row['first']} to {row['last']}" for row in joined(rows))
    stopped = f" Stopped: {', '.join(summary['stopped'])}." if summary["stopped"] else ""
    lines = [
        f"- seed {seed}: {said.splitlines()[0]}" for row in rows for seed, said in row["failed"].items()
    ]
    return (
        "## Random graphs\n\n"
        "Random whole models, each from its seed, with every pass that keeps results forced to rewrite what "
        "it can: two steps, in training one more under a random budget, against eager and float64; outputs, "
        f"gradients, buffers and inputs. Target: 2,000 graphs and no mismatch: {verdict(summary['met'])}. "
        f"{summary['graphs']} graphs (seeds {seeds}), of which passes rewrote {summary['rewritten']}; "
        f"{len(summary['failed'])} differ or fail. {len(summary['untraced'])} that AOTAutograd itself fails "
        f"on run as they did.{stopped}\n" + "".join(f"\n{x}" for x in lines)
    )


def joined(rows: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Runs of seeds without a gap."""
    found: list[dict[str, int]] = []
    for row in rows:
        if found and found[-1]["last"] + 1 == row["first"]:
            found[-1]["last"] = row["last"]
        else:
            found.append({"first": row["first"], "last": row["last"]})
    return found
