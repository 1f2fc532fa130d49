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
    ran, left = sum(found.values()), summary["left"]
    share = f"all {ran} samples" if not left else f"{ran} of {ran + left} samples ({left} not run yet)"
    over = ", ".join(summary["stopped"])
    stopped = f" Not done within their limit of time: {over}." if over else ""
    torchs = found.get("as torch", 0)
    alike = f"{torchs} are as AOTAutograd makes them without graphopt, " if torchs else ""
    return (
        "## Any operator\n\n"
        "PyTorch's own samples of its own operators (`op_db`) through `optimize`, forward and backward, op "
        "by op on the CPU, in float32 or the first type that an operator has. Target: every sample is as in "
        f"eager: {verdict(summary['met'])}. Of {share} of {summary['operators']} operators "
        f"{found.get('ok', 0)} agree, {found.get('untraced ok', 0)} that AOTAutograd cannot trace in one "
        f"graph agree too, {alike}and eager itself refuses {found.get('refused', 0)}.{stopped} Rows were "
        "made in several starts.\n" + "".join(f"\n{x}" for x in lines)
    )
