"""What a row of ``results/zoo.json`` says of a model, in a word."""

from __future__ import annotations

from typing import Any

__all__ = ["TOLERANCE", "verdict", "wrong"]

TOLERANCE = 1e-4


def wrong(share: float | str) -> bool:
    return isinstance(share, str) or share > TOLERANCE


def verdict(row: dict[str, Any]) -> str:
    """One word for a row: ``ok``, ``as it did`` (not captured), ``wrong``, ``over``, ``failed``, or
    ``stopped`` where time was up."""
    if "error" in row.get("eager", {}):
        return "eager fails"
    parts = [row.get(part) for part in ("inference", "training", "budget")]
    done = [part for part in parts if part is not None]
    if any(wrong(share) for part in done for share in part.get("worst", {}).values()):
        return "wrong"
    if any("touched" in part for part in done):
        return "wrong"
    late = row.get("stopped", "").startswith("after")
    if any("error" in part for part in done) or ("stopped" in row and not late):
        return "failed"
    if late:
        return "stopped"
    if row.get("budget", {}).get("kept") is False:
        return "over"
    return "ok" if row.get("budget") else "as it did"
