"""Which store each attention gets where the exact ones take too many bytes.

Every site has choices: its exact store, which costs nothing, and lossy ones, whose price is what they do to
predictions when they are the only one: KL(model || model with it), in nats a token, on calibration tokens.
Such prices add up while they are small, so the least sum within a bound of bytes is a multiple-choice
knapsack, the one that packed weights are allocated with (``graphopt.packing.knapsack``). What was chosen is
measured once more as a whole. Where a bound on divergence is what is given, prices are scaled by what was
measured and it is solved again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphopt.budget import format_bytes
from graphopt.decoding.assignment import CacheAssignment
from graphopt.decoding.capture import Uncached
from graphopt.decoding.record import CachePoint
from graphopt.decoding.sites import Site
from graphopt.decoding.stores import CacheStore
from graphopt.decoding.whole import Fitted, single_divergences, with_stores
from graphopt.errors import BudgetError, InputsError
from graphopt.packing.knapsack import hull_walk, least
from graphopt.quality import row_divergences

__all__ = ["CacheAllocation", "StoreChoice", "allocate_stores", "store_choices"]

_ROUNDS = 3
"""How often prices are scaled by what was measured where a divergence is bounded."""

Batches = Sequence[tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class StoreChoice:
    """A store that a site could have: what it takes, and what it does to predictions alone, KL in nats."""

    site: int
    store: str
    bytes: int
    divergence: float


@dataclass(frozen=True)
class CacheAllocation:
    """What was chosen: ``bytes`` of all stores, ``predicted`` the sum of prices, ``measured`` the KL of all
    of them together, both in nats a token over ``tokens`` tokens; ``gap``: share by which the sum may be
    above the least; ``frontier``: the choices that are the least for what they take, the fewest bytes first.
    ``gave_up``: whatever prices promised was measured to change predictions more than allowed, so that exact
    stores were left.
    """

    assignment: CacheAssignment
    bytes: int
    predicted: float
    measured: float
    tokens: int
    gap: float
    frontier: tuple[CachePoint, ...]
    choices: tuple[StoreChoice, ...]
    gave_up: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("bytes", "predicted", "measured", "tokens", "gap")
        body: dict[str, Any] = {name: getattr(self, name) for name in names}
        body["assignment"] = self.assignment.to_json()
        body["frontier"] = [[point.bytes, point.divergence] for point in self.frontier]
        body["choices"] = [[c.site, c.store, c.bytes, c.divergence] for c in self.choices]
        return body


def store_choices(
    uncached: Uncached,
    sites: Sequence[Site],
    candidates: Sequence[CacheStore],
    batches: Batches,
    batch: int,
    capacity: int,
    told: Callable[[int, int], None] | None = None,
    fitted: Fitted | None = None,
) -> tuple[StoreChoice, ...]:
    """What each site with a store of its own could have, the one that it has first, priced on ``batches``.

    A candidate that a site refuses, or that takes no fewer bytes than the exact store that it has, is left
    out. ``fitted``: what candidates that need it were fitted to. Raises ``InputsError`` without batches.
    """
    if not batches:
        raise InputsError("stores are priced on calibration tokens: there are none")
    readers: dict[int, list[int]] = {}
    for index, site in enumerate(sites):
        readers.setdefault(site.source, []).append(index)
    offered: dict[int, list[CacheStore]] = {}
    for source, members in readers.items():
        own = sites[source]
        most = own.store.stored_bytes(own.spec, batch, capacity)
        offered[source] = [
            store
            for store in candidates
            if all(store.refuses(sites[i].spec, capacity) is None for i in members)
            and store.stored_bytes(own.spec, batch, capacity) < most
        ]
    regions, specs = [site.region for site in sites], [site.spec for site in sites]
    prices = single_divergences(
        uncached,
        regions,
        specs,
        {source: stores for source, stores in offered.items() if stores},
        batches,
        {source: members[1:] for source, members in readers.items()},
        told,
        fitted,
    )
    choices = []
    for source, stores in offered.items():
        own = sites[source]
        kept = own.store.stored_bytes(own.spec, batch, capacity)
        choices.append(StoreChoice(source, str(own.store), kept, 0.0))
        for store in stores:
            taken = store.stored_bytes(own.spec, batch, capacity)
            choices.append(StoreChoice(source, str(store), taken, max(0.0, prices[source, store])))
    return tuple(choices)


def allocate_stores(
    uncached: Uncached,
    sites: Sequence[Site],
    choices: Sequence[StoreChoice],
    candidates: Sequence[CacheStore],
    batches: Batches,
    bound: int | None,
    max_kl: float | None = None,
    fitted: Fitted | None = None,
) -> CacheAllocation:
    """The choices of least divergence within ``bound`` bytes, or, without one, those of fewest bytes within
    ``max_kl`` nats.

    Raises ``BudgetError`` where no choices are within ``bound``, and where they are but measure more than
    ``max_kl``.
    """
    if bound is None and max_kl is None:
        raise InputsError("nothing bounds stores: expected a bound of bytes, or max_kl")
    by_site: dict[int, list[StoreChoice]] = {}
    for choice in choices:
        by_site.setdefault(choice.site, []).append(choice)
    known = {str(store): store for store in candidates}
    scale, gave_up = 1.0, False
    for _ in range(_ROUNDS):
        picked, gap = _solved(list(by_site.values()), bound, None if max_kl is None else max_kl / scale)
        lossy = {choice.site: known[choice.store] for choice in picked if choice.store in known}
        predicted = sum(choice.divergence for choice in picked)
        measured, tokens = _measured(uncached, sites, lossy, batches, fitted or {})
        if max_kl is None or measured <= max_kl:
            break
        if bound is not None:
            raise BudgetError(
                f"stores within {format_bytes(bound)} were measured to change predictions by {measured:.3g} "
                f"nats a token, max_kl={max_kl:g} is allowed",
                least_bytes=_frontier(list(by_site.values()))[-1].bytes,
                budget_bytes=bound,
                hint=f"allow max_kl={measured * 1.05:.2g}, or more bytes",
            )
        scale *= measured / max_kl
    else:
        # Prices were not to be trusted: what costs nothing is left.
        picked, gap = [options[0] for options in by_site.values()], 0.0
        predicted = measured = 0.0
        gave_up = True
    assignment = CacheAssignment({choice.site: choice.store for choice in picked})
    return CacheAllocation(
        assignment,
        sum(choice.bytes for choice in picked),
        predicted,
        measured,
        tokens,
        gap,
        _frontier(list(by_site.values())),
        tuple(choices),
        gave_up,
    )


def _solved(
    things: Sequence[Sequence[StoreChoice]], bound: int | None, max_kl: float | None
) -> tuple[list[StoreChoice], float]:
    if bound is not None:
        found = least([[(c.divergence, c.bytes) for c in thing] for thing in things], (bound,))
        if found is None:
            fewest = sum(min(c.bytes for c in thing) for thing in things)
            raise BudgetError(
                f"the stores that were offered take {format_bytes(fewest)} ({fewest} bytes) at least, "
                f"{format_bytes(bound)} are allowed",
                least_bytes=fewest,
                budget_bytes=bound,
                hint="offer stores of fewer bytes, or ask for fewer tokens or sequences",
            )
    else:
        assert max_kl is not None
        found = least([[(c.bytes, c.divergence) for c in thing] for thing in things], (max_kl,))
        assert found is not None, "exact stores have no divergence"
    return [thing[i] for thing, i in zip(things, found.picked, strict=True)], found.gap


def _frontier(things: Sequence[Sequence[StoreChoice]]) -> tuple[CachePoint, ...]:
    walk = hull_walk([[(c.divergence, c.bytes) for c in thing] for thing in things])
    chosen = [[thing[i] for thing, i in zip(things, picks, strict=True)] for picks in walk]
    return tuple(CachePoint(sum(c.bytes for c in p), sum(c.divergence for c in p)) for p in chosen)


def _measured(
    uncached: Uncached,
    sites: Sequence[Site],
    lossy: Mapping[int, CacheStore],
    batches: Batches,
    fitted: Fitted,
) -> tuple[float, int]:
    """KL in nats a token of all ``lossy`` stores together, and over how many tokens."""
    everywhere = {i: lossy[site.source] for i, site in enumerate(sites) if site.source in lossy}
    regions, specs = [site.region for site in sites], [site.spec for site in sites]
    for index, store in everywhere.items():
        own = fitted.get((sites[index].source, str(store)), {})
        specs[index] = replace(specs[index], fitted=own)
    changed = with_stores(uncached, regions, specs, everywhere)
    total, rows = 0.0, 0
    for tokens, mask in batches:
        shown = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        before, after = uncached.run(tokens, mask)[shown], changed.run(tokens, mask)[shown]
        total += float(row_divergences(before, after).double().sum())
        rows += int(shown.sum())
    return total / rows, rows
