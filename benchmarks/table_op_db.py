"""The section of docs/benchmarks.md on any operator, from ``results/op_db.json``."""

from __future__ import annotations

from typing import Any

from table_cells import verdict

__all__ = ["op_db"]

FINE = ("ok", "untraced ok", "refused")


def op_db(record: dict[str, Any]) -> str:
    summary = record["summary"]
    found = summary["samples"]
    lines = [
        f"- {name}, sample {number}: {said}"
        for name, row in record["rows"].items()
        for number, said in row.get("failed", {}).items()
        if said.partition(": ")[0] not in FINE
    ]
    return (
        "## Any operator\n\n"
        "PyTorch's own samples of its own operators (`op_db`) through `optimize`, forward and backward, op "
        "by op on the CPU, in float32 or the first type that an operator has, the first "
        f"{record['samples_each']} samples of each. Target: all are as in eager: {verdict(summary['met'])}. "
        f"Of {sum(found.values())} samples of {summary['operators']} operators {found.get('ok', 0)} agree, "
        f"{found.get('untraced ok', 0)} that AOTAutograd cannot trace in one graph agree too, and eager "
        f"itself refuses {found.get('refused', 0)}. Rows were made in several starts.\n"
        + "".join(f"\n{x}" for x in lines)
    )
