"""Attentions that write into one store: which may, and that they can.

``joins`` {4: 3} of an assignment::

    attention 3: k3, v3 ──▶ ┐
                            ├ one store, which both read
    attention 4: k4, v4 ──▶ ┘

Rows of one position go together, so attentions agree in heads, widths, masks and in how positions enter keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.candidate import Reason
from graphopt.decoding.assignment import CacheAssignment
from graphopt.decoding.capture import Uncached
from graphopt.decoding.regions import Region
from graphopt.decoding.sources import Fits, check_indices
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt.errors import InputsError

__all__ = ["joined_groups", "joining_store", "refusal", "refuse", "why_apart"]


def joined_groups(
    uncached: Uncached,
    regions: Sequence[Region],
    specs: Sequence[SiteSpec],
    assignment: CacheAssignment,
    readers: Mapping[int, Sequence[int]],
) -> dict[int, list[int]]:
    """Attentions that write into one store, in order, by the first of them. ``readers``: those that read the
    keys and values of one, by its index. Raises ``InputsError`` for those that cannot."""
    if not assignment.joins:
        return {}
    check_indices(regions, [*assignment.joins, *assignment.joins.values()], "a part in a joint store")
    groups: dict[int, list[int]] = {}
    for later, first in assignment.joins.items():
        groups.setdefault(first, [first]).append(later)
    fits = Fits(uncached, regions, specs)
    for first, members in groups.items():
        for index in members:
            where = regions[index].layer or regions[index].output.name
            others = [one for one in readers.get(index, ()) if one != index]
            if others or index not in readers:
                reading = others[0] if others else index
                raise InputsError(
                    f"{where}: attention {index} cannot write into a joint store: attention {reading} "
                    + ("reads its keys and values too" if others else "reads those of another"),
                    hint="join attentions whose keys and values no other one reads",
                )
            if index != first and (why := why_apart(fits, specs, index, first)):
                raise InputsError(
                    f"{where}: attention {index} cannot write into the store of attention {first}: {why}",
                    hint=_nearest(fits, specs, readers, index, first),
                )
    return groups


def why_apart(fits: Fits, specs: Sequence[SiteSpec], later: int, first: int) -> str:
    """``""``, or why rows of attention ``later`` and attention ``first`` cannot be kept together."""
    if specs[later].heads != specs[first].heads:
        return f"it has {specs[later].heads} heads of queries, attention {first} has {specs[first].heads}"
    return fits(later, first)


def _nearest(
    fits: Fits, specs: Sequence[SiteSpec], readers: Mapping[int, Sequence[int]], index: int, first: int
) -> str:
    alone = [i for i in range(index) if list(readers.get(i, ())) == [i]]
    able = [i for i in alone if not why_apart(fits, specs, index, i)]
    close = min(able, key=lambda i: abs(i - first), default=None)
    if close is None:
        return "it goes together with no earlier one: leave it out"
    return f"the nearest with which it goes together: {{{index}: {close}}}"


def joining_store(regions: Sequence[Region], members: Sequence[int], store: CacheStore | None) -> CacheStore:
    """``store``, if several attentions can write into it; else raises ``InputsError``."""
    if store is None or not store.joins:
        where = regions[members[0]].layer or regions[members[0]].output.name
        what = "none is named" if store is None else f"store {store} takes rows of one attention alone"
        raise InputsError(
            f"{where}: attentions {', '.join(map(str, members))} are to write into one store: {what}",
            hint=f"name one such as merged for attention {members[0]}",
        )
    return store


def refusal(store: CacheStore, spec: SiteSpec, capacity: int) -> Reason | None:
    """``None``, or why ``store`` does not serve a site: what stores know of is asked of them alone."""
    if bool(spec.source) is not store.crosses:
        keeps = "rows of a source" if store.crosses else "keys and values of the sequence's own rows"
        return Reason(f"it keeps {keeps}")
    if spec.mask.bias and not store.adds_biases:
        return Reason("it adds no bias of distances to scores")
    return store.refuses(spec, capacity)


def refuse(store: CacheStore, spec: SiteSpec, region: Region, index: int, capacity: int) -> None:
    """Raises ``InputsError`` where ``store`` does not take an attention."""
    if (reason := refusal(store, spec, capacity)) is not None:
        where = region.layer or region.output.name
        raise InputsError(f"{where}: store {store} does not take attention {index}: {reason}")
