"""What the tables of docs/benchmarks.md are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def verdict(met: bool) -> str:
    return "**met**" if met else "**not met**"


def good(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if "error" not in row]


def mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.2f} %" if math.isfinite(part) else "no bound"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
