"""Sections of docs/benchmarks.md about graphopt itself: how long it takes to match, to rewrite, to start."""

from __future__ import annotations

from typing import Any

from table_cells import good, number, table, verdict


def matcher(record: dict[str, Any]) -> str:
    summary, rows = record["summary"], good(record)
    targets = summary["targets"]
    cells = [
        (
            row["model"], row["nodes"], row["graphopt_matches"], row["near_misses"],
            f"{row['graphopt_seconds']:.2f}", f"{row['us_per_node']:.1f}", f"{row['inductor_seconds']:.2f}",
            f"{row['fx_seconds']:.1f}", number(row["times_inductor"]), number(row["times_fx"]),
            number(row.get("times_fx_rewriter")),
        )
        for row in rows
    ]  # fmt: skip
    return (
        "## Matching 200 rules\n\n"
        "Targets on the largest graph: Inductor's pattern matcher takes "
        f"{targets['times_inductor']:.0f} times as long or more, fx's replace_pattern "
        f"{targets['times_fx']:.0f} times (on the largest graph that it was run on), for the same patterns "
        "and as many matches; a node of it takes at most "
        f"{targets['growth']} times what one of the smallest does: {verdict(summary['met'])}. "
        "Processor time of one look at the whole graph, on one thread; graphopt's includes what is "
        "read in between, writes, gains and near misses.\n\n"
        + table(
            ("Llama, joint graph", "nodes", "matches", "near misses", "graphopt, s", "µs a node",
             "Inductor, s", "fx's matcher, s", "Inductor / graphopt", "fx's matcher / graphopt",
             "fx's replace_pattern / graphopt"),
            cells,
        )
    )  # fmt: skip


def overhead(record: dict[str, Any]) -> str:
    summary = record["summary"]
    cells = [
        (
            row["model"], "step" if row["trained"] else "forward", row["programs"], row["nodes"],
            f"{row['compile_seconds']:.1f}", f"{row['transactions_seconds']:.2f}",
            f"{row['report_seconds']:.2f}", f"{row['percent']:.1f} %",
        )
        for row in good(record)
    ]  # fmt: skip
    return (
        "## What the machinery of passes takes\n\n"
        "Target: transactions, checks of structure, observers and the report take at most "
        f"{summary['target_percent']:.0f} % of what `torch.compile` takes to compile the same model: "
        f"{verdict(summary['met'])}, at worst {summary['worst_percent']} %. Processor time; what passes and "
        "the planner work out is not part of it.\n\n"
        + table(
            ("model", "what", "programs", "nodes", "torch.compile, s", "transactions and checks, s",
             "report, s", "share"),
            cells,
        )
    )  # fmt: skip


def optimize_time(record: dict[str, Any]) -> str:
    found = record["summary"]
    ways = ("compile", "none", "roomy", "tight")
    cells = [(row["model"], *(f"{row[way]:.1f}" for way in ways)) for row in good(record)]
    return (
        "## Processor seconds to the end of the first training step, op by op\n\n"
        "`optimize` without a budget, within 150 % of the step's peak and within 60 % of it, beside "
        "`torch.compile` with empty caches. Over torch.compile's, geometric means: "
        f"{found['none']:.2f} without a budget, {found['roomy']:.2f} within a wide one, {found['tight']:.2f} "
        "within 60 %.\n\n"
        + table(("model", "torch.compile, s", "no budget, s", "150 %, s", "60 %, s"), cells)
    )


def start_up(record: dict[str, Any]) -> str:
    summary = record["summary"]
    targets = summary["targets"]
    cells = [
        (f"`{row['model']}`", f"{row['seconds']:.2f}", row["modules"], "yes" if row["torch"] else "no")
        for row in good(record)
    ]
    return (
        "## Starting\n\n"
        f"Targets: `import graphopt` at most {targets['import_beyond_torch']} s beyond `import torch`, "
        f"`graphopt --help` at most {targets['help_seconds']} s and without torch: "
        f"{verdict(summary['met'])} ({summary['import_beyond_torch']:.2f} s and "
        f"{summary['help_seconds']:.2f} s of processor time).\n\n"
        + table(("a new interpreter", "processor time, s", "modules", "torch loaded"), cells)
    )
