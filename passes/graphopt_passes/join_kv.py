"""join-kv: several attentions keep keys and values in one store that joins them.

Before::

    attention 15: full        attention 16: full        attention 17: full        attention 18: full

After, with ``store="merged"``::

    attention 15 and 16: one store, merged              attention 17 and 18: one store, merged

A store that joins is not exact; the report says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from graphopt.decoding.assignment import CacheAssignment, store_named
from graphopt.decoding.capture import Uncached
from graphopt.decoding.fitting import check_tokens, fit_stores, rows_at
from graphopt.decoding.joining import joined_groups, joining_store, refuse, why_apart
from graphopt.decoding.site_pass import SiteAnswer, SiteQuestion
from graphopt.decoding.sites import Site, sites_of
from graphopt.decoding.sources import Fits
from graphopt.decoding.stores import CacheStore
from graphopt.errors import InputsError
from graphopt.passes import Pass
from graphopt.program import Level
from graphopt_passes.share_kv.calibration import CalibratedPass, rows_of

__all__ = ["JoinKv"]

Batches = Sequence[tuple[torch.Tensor, torch.Tensor | None]]
Rows = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class JoinKv(CalibratedPass):
    """Lets groups of attentions write into one store ``store`` each, one that joins (``graphopt_stores``),
    spelled with its options.

    ``plan``: pairs (later, first) of indices of attentions; in Python also a mapping ``{16: 15}``. Without,
    from attention ``start`` on, by default the one in the middle, every ``size`` attentions that follow each
    other and go together are joined; or, of all such groups, ``groups`` that do not overlap, those first
    whose keys and values have most alike directions on ``calibration`` (as in MiniCache, arXiv 2405.14366).
    ``calibration``: rows of token ids without padding, a safetensors file of ``input_ids`` int64[N, S], or,
    in Python, batches; stores that are fitted are fitted to them.
    """

    name: ClassVar[str] = "join-kv"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "let attentions keep keys and values in one store that joins them"
    exact: ClassVar[bool] = False

    store: str
    plan: tuple[tuple[int, int], ...] = ()
    size: int = 2
    start: int | None = None
    groups: int | None = None
    calibration: str | tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        found = [name for name in ("start", "groups") if getattr(self, name) is not None]
        if self.plan and found:
            raise InputsError(f"join-kv is given plan and {found[0]}: each says what is joined; give one")
        for name, least in (("size", 2), ("start", 0), ("groups", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputsError(f"join-kv: {name}={value}: expected {least} or more")
        if self.groups is not None and not self.calibration:
            raise InputsError(
                "join-kv: which groups are most alike is found on calibration, and there is none",
                hint='use("join-kv", ..., calibration=batches), or leave groups out to join all',
            )

    @classmethod
    def configured(cls, **options: Any) -> Pass:
        if "plan" in options and not isinstance(options["plan"], tuple):
            # The assignment says what is wrong with what is no mapping of indices.
            options["plan"] = tuple(CacheAssignment(joins=options["plan"]).joins.items())
        return super().configured(**options)

    def assign(self, question: SiteQuestion) -> SiteAnswer:
        store, options = store_named(self.store, question.stores), question.options
        program = question.program()
        sites = sites_of(program, question.stores, options.max_batch, options.max_tokens)
        regions, specs = [site.region for site in sites], [site.spec for site in sites]
        batches: Batches = ()
        if self.calibration:
            rows = rows_of(self.calibration).to(program.placeholder(program.tokens).meta["val"].device)
            batches = [(part, None) for part in torch.split(rows, 1)]
            check_tokens(program, batches)
        joins, why = dict(self.plan), "as planned"
        if not joins:
            joins, why = self._found(program, sites, batches)
        firsts = dict.fromkeys(joins.values(), str(store))
        assignment = CacheAssignment(stores=firsts, joins=joins)
        readers: dict[int, list[int]] = {}
        for index, site in enumerate(sites):
            readers.setdefault(site.source, []).append(index)
        groups = joined_groups(program, regions, specs, assignment, readers)
        for members in groups.values():
            joining_store(regions, members, store)
            for place, index in enumerate(members):
                own = replace(specs[index], members=len(members), member=place)
                refuse(store, own, regions[index], index, options.max_tokens)
        reason = f"{store} (lossy) for {len(groups)} groups of attentions, {why}"
        fitted = self._fitted(program, sites, store, groups, batches)
        return SiteAnswer(assignment, reason=reason, fitted=fitted)

    def _found(
        self, program: Uncached, sites: Sequence[Site], batches: Batches
    ) -> tuple[dict[int, int], str]:
        """Later attentions and the first of their group, and how they were found."""
        start = len(sites) // 2 if self.start is None else self.start
        sources = [site.source for site in sites]
        alone = [i for i in range(start, len(sites)) if sources.count(i) == 1 and sources[i] == i]
        specs = [site.spec for site in sites]
        fits = Fits(program, [site.region for site in sites], specs)
        offered: list[list[int]] = []
        for first in alone:
            mates = [i for i in alone if i > first and not why_apart(fits, specs, i, first)]
            if len(mates) >= self.size - 1:
                offered.append([first, *mates[: self.size - 1]])
        if not offered:
            raise InputsError(
                f"join-kv finds no {self.size} attentions that go together from attention {start} on, of "
                f"{len(sites)}",
                hint="give an earlier start, or plan={later: first}",
            )
        why = f"every {self.size} from attention {start} on"
        alike: dict[tuple[int, ...], float] = {}
        if self.groups is not None:
            alike = _alike(program, sites, offered, batches)
            offered.sort(key=lambda group: -alike[tuple(group)])
            why = f"of {len(offered)} those most alike"
        chosen: list[list[int]] = []
        for group in offered:
            if len(chosen) != self.groups and {*group}.isdisjoint(itertools.chain(*chosen)):
                chosen.append(group)
        if self.groups is not None:
            why += f", cosine {min(alike[tuple(group)] for group in chosen):.2f} or more"
        joins = {later: group[0] for group in chosen for later in group[1:]}
        return dict(sorted(joins.items())), why

    def _fitted(
        self,
        program: Uncached,
        sites: Sequence[Site],
        store: CacheStore,
        groups: Mapping[int, Sequence[int]],
        batches: Batches,
    ) -> dict[int, Mapping[str, torch.Tensor]]:
        if not store.needs_fit:
            if self.calibration and self.groups is None:
                raise InputsError(
                    f"store {store} is not fitted to calibration tokens, and groups are not chosen by them",
                    hint="leave calibration out, or say how many groups=",
                )
            return {}
        if not batches:
            raise InputsError(
                f"store {store} is fitted to calibration tokens, and join-kv was given none",
                hint='use("join-kv", store=..., calibration=batches), batches of token ids',
            )
        found = fit_stores(program, sites, {first: [store] for first in groups}, batches, groups)
        return {index: tensors for (index, _), tensors in found.items()}


def _alike(
    program: Uncached, sites: Sequence[Site], groups: Sequence[Sequence[int]], batches: Batches
) -> dict[tuple[int, ...], float]:
    """Mean cosine of the angle between keys, and values, of attentions that follow each other in a group."""
    known: dict[int, Rows] = {}
    pairs: dict[tuple[int, int], float] = {}
    wanted = {pair for group in groups for pair in itertools.pairwise(group)}
    for one, other in sorted(wanted):
        for index in (one, other):
            if index not in known:
                ((_, key, value),) = rows_at(program, sites, [index], batches)
                known[index] = key, value
        both = zip(known[one], known[other], strict=True)
        angles = [torch.cosine_similarity(x.double(), y.double(), -1).mean() for x, y in both]
        pairs[one, other] = float(sum(angles)) / 2
        # No later pair begins before.
        known = {index: rows for index, rows in known.items() if index > one}
    return {
        tuple(group): sum(pairs[pair] for pair in itertools.pairwise(group)) / (len(group) - 1)
        for group in groups
    }
