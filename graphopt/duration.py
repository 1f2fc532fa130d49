"""Durations for people."""

from __future__ import annotations

__all__ = ["format_seconds"]


def format_seconds(seconds: float | None) -> str:
    """``0.0123`` -> ``"12.3 ms"``; ``None`` (not known) -> ``"-"``. Three figures, s, ms, us or ns."""
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        # 0.9995 rounds up to the 1.00 of the larger unit.
        if abs(seconds) * factor >= 0.9995:
            return f"{_three_figures(seconds * factor)} {unit}"
    return f"{_three_figures(seconds * 1e9)} ns"


def _three_figures(value: float) -> str:
    for digits, limit in ((2, 9.995), (1, 99.95)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"
