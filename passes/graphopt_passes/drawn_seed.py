"""Seeds of operators that compute random numbers of their own, drawn where the generator is, without waiting.

A program that holds a seed as a value may run what reads it again, in a backward or a recomputed forward, and
get the same numbers; drawing the seed is the one random call.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, Reason
from graphopt.edit import Edit

__all__ = ["ALLOWED_BY", "METRIC", "no_known_rate", "other_numbers", "seed_before", "seed_beside"]

_DRAW = torch.ops.aten.randint.low
_SEEDS = 2**63 - 1

ALLOWED_BY = "fuse-dropout"
"""The pass that ``allow`` names where dropout may draw other numbers."""

METRIC = "random numbers: draws others than eager mode, of the same distribution"


def seed_before(edit: Edit, place: fx.Node, replaces: tuple[fx.Node, ...]) -> fx.Node:
    """A seed for the device of ``place``, drawn before it."""
    device = place.meta["val"].device
    return edit.call_before(
        place, _DRAW, [0, _SEEDS, [1]], {"dtype": torch.int64, "device": device}, replaces=replaces
    )


def seed_beside(value: fx.Proxy) -> fx.Proxy:
    """A seed for the device of ``value``, in the replacement of a rule."""
    device = value.node.meta["val"].device
    given = {"dtype": torch.int64, "device": device}
    return value.tracer.create_proxy("call_function", _DRAW, (0, _SEEDS, [1]), given)


def other_numbers(candidate: Candidate) -> Candidate:
    """``candidate`` with dropout in it, of a pass that is exact otherwise."""
    return replace(candidate, exactness="lossy", metric=METRIC, allowed_by=ALLOWED_BY)


def no_known_rate(p: object, name: str) -> Reason | None:
    """Why the operators do not take this probability of a call named ``name``."""
    if not isinstance(p, (int, float)):
        return Reason("the probability of dropout is not a known number", (name,))
    if p == 0:
        return Reason("nothing is dropped", (name,))
    return None if p < 1 else Reason("everything is dropped", (name,))
