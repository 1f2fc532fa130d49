"""From what was captured to what is kept: every attention with its mask understood, and a store for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.capture.aliasing import alias_map
from graphopt.decoding.assignment import NOTHING, CacheAssignment, store_named
from graphopt.decoding.capture import Uncached
from graphopt.decoding.evaluate import added_by
from graphopt.decoding.joining import joined_groups, joining_store, refusal, refuse
from graphopt.decoding.masks import MaskSpec, meaning
from graphopt.decoding.recurrence import recurrences_in
from graphopt.decoding.regions import Region, attention_regions
from graphopt.decoding.source_masks import source_mask
from graphopt.decoding.sources import check_indices, check_sources, first_reader
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt.errors import CaptureError, InputsError

__all__ = ["Site", "kinds_text", "sites_of", "specs_of", "stored_bytes", "tensors_of"]


@dataclass(frozen=True)
class Site:
    """A region, what a store needs to know of it, and the store. ``source``: index of the site whose store it
    reads, its own or an earlier one's."""

    region: Region
    spec: SiteSpec
    store: CacheStore
    source: int


def sites_of(
    uncached: Uncached,
    stores: Mapping[str, type[CacheStore]],
    batch: int,
    capacity: int,
    assignment: CacheAssignment = NOTHING,
    fitted: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
) -> tuple[Site, ...]:
    """Every place where the program attends, each with the store that ``assignment`` names, or else the exact
    store of least bytes that takes it.

    Sites that read the same keys and values share one store, and so do those that ``assignment`` lets read
    another's; those that it lets write into another's do so. ``fitted``: what stores were fitted to, by site
    (``graphopt.decoding.fitting``). Raises ``CaptureError`` for a program that keeps nothing, a mask that is
    not understood, and a site that no store takes; ``InputsError`` and ``UnknownNameError`` for an assignment
    that does not fit, and for a store that needs to be fitted and was not.
    """
    regions = attention_regions(uncached)
    if not regions and not recurrences_in(uncached.gm.graph):
        raise CaptureError(
            "no attention was found in the model, and no recurrence: there is nothing to keep "
            "between tokens, or "
            "it is a state of another kind, which is not kept yet"
        )
    specs = specs_of(uncached, regions, capacity)
    check_sources(uncached, regions, specs, assignment.sources)
    named = {index: store_named(text, stores) for index, text in assignment.stores.items()}
    check_indices(regions, named, "a store")
    groups: dict[int, list[int]] = {}
    for index in range(len(regions)):
        source = assignment.sources.get(index, index)
        groups.setdefault(first_reader(regions, source), []).append(index)
    sites: dict[int, Site] = {}
    joined = joined_groups(uncached, regions, specs, assignment, groups)
    for first, members in joined.items():
        store = joining_store(regions, members, named.get(first))
        for place, index in enumerate(members):
            spec = replace(specs[index], members=len(members), member=place)
            refuse(store, spec, regions[index], index, capacity)
            if store.needs_fit:
                tensors = (fitted or {}).get(first, {})
                spec = replace(spec, fitted=_fitting(regions[index], index, spec, store, tensors))
            sites[index] = Site(regions[index], spec, store, first)
    for members in groups.values():
        if members[0] in sites:
            continue
        # What has a store of its own does not wait for what others would share.
        alone = [index for index in members[1:] if index in named]
        parts = [[index] for index in alone] + [[index for index in members if index not in alone]]
        for part in parts:
            given = named.get(part[0])
            split = all(index not in assignment.sources for index in part)
            for index, source, store in _chosen(regions, specs, part, stores, batch, capacity, given, split):
                spec = replace(specs[index], shares=source != index)
                if store.needs_fit:
                    tensors = (fitted or {}).get(source, {})
                    spec = replace(spec, fitted=_fitting(regions[index], index, spec, store, tensors))
                sites[index] = Site(regions[index], spec, store, source)
    return tuple(sites[index] for index in range(len(regions)))


def _fitting(
    region: Region, index: int, spec: SiteSpec, store: CacheStore, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """``tensors``, if they are those that ``store`` makes of calibration tokens."""
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != dict(store.fitted(spec)):
        where = region.layer or region.output.name
        state = "it was not" if not found else f"it was fitted as another, with {kinds_text(found)}"
        raise InputsError(
            f"{where}: store {store} of attention {index} is to be fitted to calibration tokens: {state}",
            hint=f'name it with graphopt.use("{"join-kv" if store.joins else "keep-kv"}", store=..., '
            "calibration=batches)",
        )
    return tensors


def kinds_text(kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    """``keys torch.float32 [2, 16, 8]``, and so on."""
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (shape, dtype) in kinds.items()) or "nothing"


def specs_of(uncached: Uncached, regions: Sequence[Region], capacity: int) -> list[SiteSpec]:
    """What a store needs to know of each region, for sequences of up to ``capacity`` positions. Raises
    ``CaptureError`` for a mask that is not understood."""
    aliases = alias_map(uncached.gm.graph)
    source = uncached.source
    if source is not None:
        # Sizes of a source may be read where masks of the tokens are made.
        uncached = uncached.reading(source.given(source.encoder.sample(2, False)))
    device = uncached.placeholder(uncached.tokens).meta["val"].device
    known: dict[object, MaskSpec] = {}
    specs = []
    for region in regions:
        # Layers of one kind read one mask.
        key = (region.added, region.heads, region.crosses)
        if key not in known:
            evaluate, numbers = added_by(uncached, region, aliases)
            try:
                known[key] = source_mask(uncached, region, aliases) if region.crosses else meaning(
                    evaluate, sorted(numbers), capacity, device, takes_mask=uncached.mask is not None,
                    bias=next((entry.node.name for entry in region.added if entry.node is not None), ""),
                )
            except CaptureError as error:
                where = region.layer or region.output.name
                raise CaptureError(f"{where}: {error.message}", hint=error.hint) from None
        key_value = region.key.meta["val"]
        specs.append(
            SiteSpec(
                heads=region.heads,
                kv_heads=region.kv_heads,
                key_width=int(key_value.shape[-2 if region.key_transposed else -1]),
                value_width=int(region.value.meta["val"].shape[-1]),
                dtype=key_value.dtype,
                mask=known[key],
                scale=region.scale,
                softcap=region.softcap,
                sinks=region.sinks is not None,
                within=region.is_within,
                source=source.most if region.crosses and source is not None else 0,
            )
        )
    return specs


def _chosen(
    regions: Sequence[Region],
    specs: Sequence[SiteSpec],
    members: Sequence[int],
    stores: Mapping[str, type[CacheStore]],
    batch: int,
    capacity: int,
    given: CacheStore | None,
    split: bool,
) -> list[tuple[int, int, CacheStore]]:
    """Index, source and store of regions that read the same keys and values: ``given``, or one exact store
    for all of them, or, where they may ``split``, one for each where that takes fewer bytes, as rings of
    short windows do."""
    first = members[0]
    readers = [specs[first], *(replace(specs[i], shares=True) for i in members[1:])]
    if given is not None:
        for index, spec in zip(members, readers, strict=True):
            refuse(given, spec, regions[index], index, capacity)
        windows = {specs[i].mask.window for i in members}
        if not given.exact and len(windows) > 1:
            raise InputsError(
                f"attentions {', '.join(map(str, members))} read one store {given} with windows "
                f"{sorted(windows)}: what is kept for one is not what another reads",
                hint=f"name stores for {', '.join(map(str, members[1:]))} apart",
            )
        return [(i, first, given) for i in members]
    apart = [(i, i, _taking(regions[i], [specs[i]], stores, batch, capacity)) for i in members]
    if len(members) == 1:
        return apart
    shared = _taking(regions[first], readers, stores, batch, capacity)
    separately = sum(store.stored_bytes(specs[i], batch, capacity) for i, _, store in apart)
    if split and separately < shared.stored_bytes(specs[first], batch, capacity):
        return apart
    return [(i, first, shared) for i in members]


def _taking(
    region: Region,
    readers: Sequence[SiteSpec],
    stores: Mapping[str, type[CacheStore]],
    batch: int,
    capacity: int,
) -> CacheStore:
    """The exact store of least bytes that serves all ``readers``."""
    reasons: list[str] = []
    taken: list[tuple[int, str, CacheStore]] = []
    for name, kind in stores.items():
        if not kind.exact:
            continue
        store = kind()
        reason = next(filter(None, (refusal(store, spec, capacity) for spec in readers)), None)
        if reason is not None:
            reasons.append(f"{name}: {reason}")
        else:
            taken.append((store.stored_bytes(readers[0], batch, capacity), name, store))
    if not taken:
        where = region.layer or region.output.name
        why = "; ".join(reasons) or "none is known"
        raise CaptureError(f"{where}: no store takes its keys and values ({why})")
    return min(taken, key=lambda entry: entry[:2])[2]


def stored_bytes(sites: Sequence[Site], batch: int, capacity: int) -> int:
    """Bytes of the stores of all sites."""
    return sum(
        site.store.stored_bytes(site.spec, batch, capacity)
        for index, site in enumerate(sites)
        if site.source == index
    )


def tensors_of(
    sites: Sequence[Site], batch: int, capacity: int
) -> Mapping[tuple[int, str], tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of all stores' tensors, by site and name."""
    return {
        (index, name): kind
        for index, site in enumerate(sites)
        if site.source == index
        for name, kind in site.store.tensors(site.spec, batch, capacity).items()
    }
