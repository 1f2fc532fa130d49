"""The warning of everything that is stored and left out."""

from __future__ import annotations

__all__ = ["TuningWarning"]


class TuningWarning(UserWarning):
    """Stored results of tuning that were left out or replaced, and why."""
