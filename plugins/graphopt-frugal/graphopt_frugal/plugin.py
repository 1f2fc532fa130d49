"""What this plugin registers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from graphopt.plugins import PolicySpec, hookimpl

__all__ = ["graphopt_api", "graphopt_policies"]

graphopt_api = 1


@hookimpl
def graphopt_policies() -> Iterable[PolicySpec]:
    # Imported when asked: it needs torch, and `graphopt --help` loads this module.
    from graphopt_frugal.policy import frugal

    return [
        PolicySpec("frugal", partial(frugal, share=0.02), "the least memory for at most 2 % more time"),
        PolicySpec("frugal-10", partial(frugal, share=0.10), "the least memory for at most 10 % more time"),
    ]
