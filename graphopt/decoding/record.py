"""What the report says of a model that decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.decoding.sites import Site

__all__ = ["DecodingRecord", "SiteRecord", "site_records"]


@dataclass(frozen=True)
class SiteRecord:
    """One place where the model attends. ``source``: index of the site whose store it reads, its own or an
    earlier one's; ``bytes``: what its own store takes."""

    layer: str
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    mask: str
    store: str
    source: int
    bytes: int


@dataclass(frozen=True)
class DecodingRecord:
    """``max_tokens``, ``max_batch``: what the stores are for; ``chunk``: tokens of a prompt taken in at once;
    ``cache_bytes``: stores and what is kept of padding; ``budget``: the bound on them, if there is one;
    ``off``: by how much logits differed most from those without a cache when it was checked; ``beside``:
    products whose weights were laid side by side, to be read by one."""

    max_tokens: int
    max_batch: int
    chunk: int
    cache_bytes: int
    budget: int | None
    off: float
    sites: tuple[SiteRecord, ...]
    beside: int = 0


def site_records(sites: Sequence[Site], batch: int, capacity: int) -> tuple[SiteRecord, ...]:
    """A record of each site."""
    return tuple(
        SiteRecord(
            site.region.layer,
            site.spec.heads,
            site.spec.kv_heads,
            site.spec.key_width,
            site.spec.value_width,
            str(site.spec.mask),
            str(site.store),
            site.source,
            site.store.stored_bytes(site.spec, batch, capacity) if site.source == index else 0,
        )
        for index, site in enumerate(sites)
    )
