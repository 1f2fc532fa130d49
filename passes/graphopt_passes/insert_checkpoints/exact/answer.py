"""What a solver says of ``Stages``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Answer"]


@dataclass(frozen=True)
class Answer:
    """``values``: one for each variable, ``None`` where none was found in time. ``bound``: seconds
    below which no assignment is, infinite where there is none at all. ``best``: whether ``values`` is proven
    to be the best, up to the solver's resolution."""

    values: list[bool] | None
    bound: float
    best: bool
