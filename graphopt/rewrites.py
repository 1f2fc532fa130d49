"""Single rewrites by name: which were applied, and which alone may be.

A rewrite is ``g0/fuse-norm/rms-norm@mul_3``: program, pass and candidate. What the planner decides together
is one rewrite over all programs: ``insert-checkpoints/schedules``, ``chunk/alternatives``; so are the kernels
for groups of operators of one provider, ``emit/kernels``. Names are the same for the same model, inputs and
options.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from graphopt.candidate import Candidate, CostDelta, Frontier
from graphopt.errors import InputsError, UnknownNameError

__all__ = [
    "ALTERNATIVES",
    "KERNELS",
    "SCHEDULES",
    "Rewrite",
    "again_id",
    "checked_rewrites",
    "kernels_id",
    "rewrite_id",
]

ALTERNATIVES, KERNELS, SCHEDULES = "alternatives", "kernels", "schedules"
_TOGETHER = (ALTERNATIVES, KERNELS, SCHEDULES)


@dataclass(frozen=True)
class Rewrite:
    """One rewrite that was chosen. ``delta`` is what it was predicted to change, ``layer`` the module that
    its first node came from. ``applied`` is false where its pass was rolled back."""

    id: str
    layer: str = ""
    delta: CostDelta = field(default_factory=CostDelta)
    applied: bool = True


def rewrite_id(program: str, pass_id: str, proposal: Candidate | Frontier) -> str:
    """The name of what a pass proposed for a program."""
    if isinstance(proposal, Frontier):
        return f"{pass_id}/{SCHEDULES}"
    if proposal.alternative:
        return f"{pass_id}/{ALTERNATIVES}"
    # Lists of names are separated by commas.
    return f"{program}/{pass_id}/{proposal.id.replace(',', '+')}"


def again_id(name: str, number: int) -> str:
    """The name of a rewrite of the first program (``g0``) in the program that was captured as ``number``."""
    return f"g{number}{name[2:]}" if name.startswith(("g0/", "g0.")) else name


def kernels_id(provider: str) -> str:
    """The name of all kernels that one provider offers for groups of operators."""
    return f"{provider}/{KERNELS}"


def checked_rewrites(
    names: Sequence[str] | None, passes: Collection[str], kernels: Iterable[str]
) -> frozenset[str] | None:
    """``names`` as a set, each of a pass (or a provider of kernels) that is there.

    Raises ``InputsError`` for what is no name of a rewrite and ``UnknownNameError`` for another pass.
    """
    if names is None:
        return None
    if isinstance(names, str):
        raise InputsError(f"rewrites is the text {names!r}: expected names", hint=f"write ({names!r},)")
    providers = set(kernels)
    for name in names:
        parts = name.split("/", 2) if isinstance(name, str) else []
        if len(parts) == 2 and parts[1] in _TOGETHER:
            known = providers if parts[1] == KERNELS else passes
            if parts[0] not in known:
                raise UnknownNameError(f"source of rewrite {name!r}:", parts[0], known)
        elif len(parts) == 3:
            if parts[1] not in passes:
                raise UnknownNameError(f"pass of rewrite {name!r}:", parts[1], passes)
        else:
            raise InputsError(
                f"{name!r} names no rewrite",
                hint="they are in report.rewrites: program/pass/candidate, pass/schedules, "
                "pass/alternatives or provider/kernels",
            )
    return frozenset(names)
