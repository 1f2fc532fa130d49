"""What stores are fitted to: queries, keys and values of each attention on calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.part import Part
from graphopt.decoding.sites import Site
from graphopt.decoding.stores import CacheStore
from graphopt.decoding.whole import heads_apart
from graphopt.errors import InputsError

__all__ = ["fit_stores"]


def fit_stores(
    uncached: Uncached,
    sites: Sequence[Site],
    wanted: Mapping[int, Sequence[CacheStore]],
    batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """Tensors of each of the ``wanted`` stores that needs some (``CacheStore.fit``), by site and spelling.

    ``batches``: tokens int64 [B, S] and their mask or ``None``. One site after the other is run, so that the
    rows of one are in memory. Raises ``InputsError`` where a store makes others than it says.
    """
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for index, stores in wanted.items():
        stores = [store for store in stores if store.needs_fit]
        if not stores:
            continue
        rows = _rows(uncached, sites[index], batches)
        for store in stores:
            spec = sites[index].spec
            made = dict(store.fit(spec, *rows))
            kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
            if kinds != dict(store.fitted(spec)):
                raise InputsError(
                    f"store {store} of attention {index} was fitted to {kinds}: it says "
                    f"{dict(store.fitted(spec))}"
                )
            found[index, str(store)] = made
    return found


def _rows(
    uncached: Uncached, site: Site, batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [1, H, R, D], keys [1, Hkv, R, D] and values [1, Hkv, R, Dv] of all tokens that are no
    padding."""
    region = site.region
    ends = [region.query, region.key, region.value]
    part = Part(uncached.gm.graph, {end.name for end in ends})
    parts: list[list[torch.Tensor]] = [[], [], []]
    for tokens, mask in batches:
        given = {**uncached.weights, **arguments_of(uncached, tokens, mask, None)}
        with torch.no_grad():
            values = part(given)
        shown = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        apart = heads_apart(region, *(values[end.name] for end in ends))
        for held, rows in zip(parts, apart, strict=True):
            held.append(rows.transpose(1, 2)[shown])
    query, key, value = (torch.cat(held).transpose(0, 1)[None] for held in parts)
    return query, key, value
