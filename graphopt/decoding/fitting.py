"""What stores are fitted to: queries, keys and values of each attention on calibration tokens.

::

    tokens[B,S] ── program up to attention i ──▶ query, key, value ── store.fit ──▶ tensors of store i
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.part import Part
from graphopt.decoding.sites import Site, kinds_text
from graphopt.decoding.sources import first_reader
from graphopt.decoding.stores import CacheStore
from graphopt.decoding.whole import heads_apart
from graphopt.errors import InputsError, brief

__all__ = ["fit_stores"]

Batches = Sequence[tuple[torch.Tensor, torch.Tensor | None]]


def fit_stores(
    uncached: Uncached, sites: Sequence[Site], wanted: Mapping[int, Sequence[CacheStore]], batches: Batches
) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """Tensors of each of the ``wanted`` stores that needs some (``CacheStore.fit``), by site and spelling.

    ``batches``: tokens int64 [B, S] and their mask or ``None``. One site after the other is run, so that the
    rows of one are in memory. Raises ``InputsError`` for tokens that the model does not take, for fewer than
    a store is to be told of, for rows that are not finite, and where a store makes others than it says.
    """
    wanted = {i: [store for store in stores if store.needs_fit] for i, stores in wanted.items()}
    wanted = {i: stores for i, stores in wanted.items() if stores}
    if wanted:
        _check_tokens(uncached, batches)
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for index, stores in wanted.items():
        rows = _rows(uncached, sites, index, batches)
        for store in stores:
            found[index, str(store)] = _fit(sites[index], index, store, rows)
    return found


def _fit(
    site: Site, index: int, store: CacheStore, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    where = f"{site.region.layer or site.region.output.name}: store {store} of attention {index}"
    count, least = rows[1].shape[1], store.fit_rows(site.spec)
    if count < least:
        raise InputsError(
            f"{where} is fitted to {count} tokens of calibration: expected {least} or more",
            hint="give longer or more sequences of text that the model is used for",
        )
    for name, part in zip(("queries", "keys", "values"), rows, strict=True):
        wrong = int((~part.isfinite().all(-1)).sum())
        if wrong:
            raise InputsError(
                f"{where} cannot be fitted: {wrong} of {part.shape[0] * part.shape[1]} {name} are not finite "
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


def _check_tokens(uncached: Uncached, batches: Batches) -> None:
    if not batches:
        raise InputsError("stores are fitted to calibration tokens: there are none")
    for tokens, _ in batches:
        outside = tokens[(tokens < 0) | (tokens >= uncached.vocabulary)]
        if outside.numel():
            raise InputsError(
                f"calibration has token {int(outside[0])}: the model has {uncached.vocabulary} of them"
            )


def _rows(
    uncached: Uncached, sites: Sequence[Site], index: int, batches: Batches
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [Hkv, Q, D], keys [Hkv, R, D] and values [Hkv, R, Dv] of all tokens that are no padding; the
    queries of all attentions that read these keys."""
    regions = [site.region for site in sites]
    first = first_reader(regions, index)
    readers = [region for i, region in enumerate(regions) if first_reader(regions, i) == first]
    own = regions[index]
    part = Part(uncached.gm.graph, {own.key.name, own.value.name, *(one.query.name for one in readers)})
    asked: list[list[torch.Tensor]] = [[] for _ in readers]
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
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
        ends = made[own.key.name], made[own.value.name]
        for held, region in zip(asked, readers, strict=True):
            query, key, value = heads_apart(region, made[region.query.name], *ends)
            held.append(_shown(query, shown))
        # Readers of one key read it in one layout (`first_reader`).
        keys.append(_shown(key, shown))
        values.append(_shown(value, shown))
    groups = sites[index].spec.kv_heads
    # Heads that read one follow each other.
    queries = [torch.cat(held, 1) for held in asked]
    queries = [rows.reshape(groups, -1, rows.shape[2]) for rows in queries]
    return torch.cat(queries, 1), torch.cat(keys, 1), torch.cat(values, 1)


def _shown(rows: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """[heads, R, width]: those of ``rows`` [B, heads, S, width] that are ``shown`` bool [B, S]."""
    return rows.transpose(1, 2)[shown].transpose(0, 1)
