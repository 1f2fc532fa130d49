"""What stores are fitted to: queries, keys and values of each attention on calibration tokens.

::

    tokens[B,S] ── program up to attention i ──▶ query, key, value ── store.fit ──▶ tensors of store i
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.part import Part
from graphopt.decoding.regions import Region
from graphopt.decoding.sites import Site, kinds_text
from graphopt.decoding.sources import first_reader
from graphopt.decoding.stores import CacheStore
from graphopt.decoding.whole import heads_apart
from graphopt.errors import InputsError, brief

__all__ = ["check_tokens", "fit_stores", "rows_at"]

Batches = Sequence[tuple[torch.Tensor, torch.Tensor | None]]
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values."""


def fit_stores(
    uncached: Uncached,
    sites: Sequence[Site],
    wanted: Mapping[int, Sequence[CacheStore]],
    batches: Batches,
    joined: Mapping[int, Sequence[int]] | None = None,
) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """Tensors of each of the ``wanted`` stores that needs some (``CacheStore.fit``), by site and spelling.

    ``batches``: tokens int64 [B, S] and their mask or ``None``. ``joined``: sites that are to write into the
    store of a site, by its index, itself included. One site, or the sites of one store, after the other are
    run, so that the rows of these are in memory. Raises ``InputsError`` for tokens that the model does not
    take, for fewer than a store is to be told of, for rows that are not finite, and where a store makes
    others than it says.
    """
    wanted = {i: [store for store in stores if store.needs_fit] for i, stores in wanted.items()}
    wanted = {i: stores for i, stores in wanted.items() if stores}
    if wanted:
        check_tokens(uncached, batches)
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for index, stores in wanted.items():
        members = (joined or {}).get(index, (index,))
        every = rows_at(uncached, sites, members, batches)
        rows, site = every[0], sites[index]
        if joined and index in joined:
            query, key, value = (torch.stack(parts) for parts in zip(*every, strict=True))
            rows = query, key, value
            site = replace(site, spec=replace(site.spec, members=len(members)))
        for store in stores:
            found[index, str(store)] = _fit(site, index, store, rows)
    return found


def _fit(
    site: Site, index: int, store: CacheStore, rows: Rows
) -> dict[str, torch.Tensor]:
    where = f"{site.region.layer or site.region.output.name}: store {store} of attention {index}"
    count, least = rows[1].shape[-2], store.fit_rows(site.spec)
    if count < least:
        raise InputsError(
            f"{where} is fitted to {count} tokens of calibration: expected {least} or more",
            hint="give longer or more sequences of text that the model is used for",
        )
    for name, part in zip(("queries", "keys", "values"), rows, strict=True):
        wrong = int((~part.isfinite().all(-1)).sum())
        if wrong:
            raise InputsError(
                f"{where} cannot be fitted: {wrong} of {part[..., 0].numel()} {name} are not finite "
                "on calibration tokens",
                hint="look for what overflows there, or leave the attention out: layers=",
            )
    made = dict(store.fit(site.spec, *rows))
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
    if kinds != dict(store.fitted(site.spec)):
        raise InputsError(
            f"{where} was fitted with {kinds_text(kinds)}: it says {kinds_text(store.fitted(site.spec))}"
        )
    return made


def check_tokens(uncached: Uncached, batches: Batches) -> None:
    """Raises ``InputsError`` without batches, and for tokens that the model does not have."""
    if not batches:
        raise InputsError("stores are fitted to calibration tokens: there are none")
    for tokens, _ in batches:
        outside = tokens[(tokens < 0) | (tokens >= uncached.vocabulary)]
        if outside.numel():
            raise InputsError(
                f"calibration has token {int(outside[0])}: the model has {uncached.vocabulary} of them"
            )


def rows_at(
    uncached: Uncached, sites: Sequence[Site], indices: Sequence[int], batches: Batches
) -> list[Rows]:
    """Of each of the sites ``indices`` queries [Hkv, Q, D], keys [Hkv, R, D] and values [Hkv, R, Dv] of all
    tokens that are no padding; the queries of all attentions that read these keys. All are run at once."""
    regions = [site.region for site in sites]
    readers: dict[int, list[Region]] = {}
    for index in indices:
        first = first_reader(regions, index)
        readers[index] = [region for i, region in enumerate(regions) if first_reader(regions, i) == first]
    wanted = {node.name for i in indices for node in (regions[i].key, regions[i].value)}
    wanted |= {region.query.name for reading in readers.values() for region in reading}
    part = Part(uncached.gm.graph, wanted)
    asked: dict[int, list[list[torch.Tensor]]] = {i: [[] for _ in readers[i]] for i in indices}
    keys: dict[int, list[torch.Tensor]] = {index: [] for index in indices}
    values: dict[int, list[torch.Tensor]] = {index: [] for index in indices}
    for tokens, mask in batches:
        shown = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        given = {**uncached.weights, **arguments_of(uncached, tokens, mask, None)}
        try:
            with torch.no_grad():
                made = part(given)
        except (RuntimeError, IndexError) as error:
            raise InputsError(
                f"the model does not take calibration of {tokens.shape[1]} tokens a sequence: {brief(error)}"
            ) from error
        for index in indices:
            ends = made[regions[index].key.name], made[regions[index].value.name]
            for held, region in zip(asked[index], readers[index], strict=True):
                query, key, value = heads_apart(region, made[region.query.name], *ends)
                held.append(_shown(query, shown))
            # Readers of one key read it in one layout (`first_reader`).
            keys[index].append(_shown(key, shown))
            values[index].append(_shown(value, shown))
    found: list[Rows] = []
    for index in indices:
        groups = sites[index].spec.kv_heads
        # Heads that read one follow each other.
        queries = [torch.cat(held, 1) for held in asked[index]]
        queries = [rows.reshape(groups, -1, rows.shape[2]) for rows in queries]
        found.append((torch.cat(queries, 1), torch.cat(keys[index], 1), torch.cat(values[index], 1)))
    return found


def _shown(rows: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """[heads, R, width]: those of ``rows`` [B, heads, S, width] that are ``shown`` bool [B, S]."""
    return rows.transpose(1, 2)[shown].transpose(0, 1)
