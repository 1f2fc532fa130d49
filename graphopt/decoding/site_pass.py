"""Passes over what a decoder keeps: they look at its attentions and say whose keys and values each reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from graphopt.decoding.allocate import CacheAllocation
from graphopt.decoding.assignment import CacheAssignment
from graphopt.decoding.capture import Uncached
from graphopt.decoding.options import Generate
from graphopt.decoding.regions import Region
from graphopt.decoding.reroot import as_assigned
from graphopt.decoding.sites import Site
from graphopt.decoding.stores import CacheStore
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins.host import PluginHost
from graphopt.program import Program

__all__ = ["SiteAnswer", "SitePass", "SiteQuestion"]


@dataclass(frozen=True)
class SiteQuestion:
    """What a pass may know of a decoder: the program without a cache, its attentions with the stores that
    they have so far, and what ``assigned`` says of them.

    ``fits(consumer, source)``: ``""``, or why attention ``consumer`` cannot read the keys and values of
    attention ``source``. ``tell`` takes a line about how far a long search is. ``bound``: bytes that stores
    may take, ``None`` without a budget of them. ``weights``: those that earlier passes fitted, by placeholder
    of ``program()``. ``fitted``: what stores were fitted to, by attention.
    """

    uncached: Uncached
    regions: tuple[Region, ...]
    sites: tuple[Site, ...]
    assigned: CacheAssignment
    fits: Callable[[int, int], str]
    options: Generate
    stores: Mapping[str, type[CacheStore]]
    host: PluginHost
    tell: Callable[[str], None]
    bound: int | None = None
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fitted: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def program(self) -> Uncached:
        """The program as it comes to be with what was assigned so far."""
        assigned = self.assigned
        return as_assigned(self.uncached, self.regions, assigned.sources, assigned.streams, self.weights)


@dataclass(frozen=True)
class SiteAnswer:
    """What a pass wants: stores, sources and streams, added to what others assigned; weights that are to take
    the place of those of the program that this makes, by placeholder; and a sentence that says why.

    ``divergence``: by how much predictions are off with it, KL in nats, where that was measured on
    ``tokens`` tokens. ``allocation``: how stores were chosen among several, if they were. ``fitted``: what
    stores were fitted to (``graphopt.decoding.fitting``), by attention.
    """

    assignment: CacheAssignment
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reason: str = ""
    divergence: float | None = None
    tokens: int = 0
    allocation: CacheAllocation | None = None
    fitted: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class SitePass(Pass):
    """Base of passes over what a decoder keeps. It proposes nothing for programs: the stores of
    ``optimize(generate=...)`` are chosen before programs that decode are made. A pipeline that lists it asks
    for it and needs no ``allow``; one that is ``on_demand`` runs where ``allow`` names it alone.
    """

    on_demand: ClassVar[bool] = False

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        return ()

    def assign(self, question: SiteQuestion) -> SiteAnswer:
        """Whose keys and values attentions read, and in which stores. Raises typed errors for options that
        the decoder does not fit."""
        raise NotImplementedError(f"{type(self).__name__} does not define assign()")

    def spelled(self) -> str:
        """The options that it runs with, for the report."""
        from graphopt.passes import pass_text

        return pass_text(self).removeprefix(self.name).strip("{}")


def site_passes(passes: Sequence[Pass], allow: frozenset[str] = frozenset()) -> tuple[SitePass, ...]:
    """Those among ``passes`` that run, in order: not those on demand that ``allow`` does not name."""
    found = (step for step in passes if isinstance(step, SitePass))
    return tuple(step for step in found if not step.on_demand or step.name in allow)
