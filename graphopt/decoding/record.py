"""What the report says of a model that decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.decoding.capture import Uncached
from graphopt.decoding.sites import Site
from graphopt.decoding.states import states_of

__all__ = [
    "CachePoint",
    "DecodingRecord",
    "Freed",
    "LossyRecord",
    "SharingRecord",
    "SiteRecord",
    "StateRecord",
    "site_records",
    "state_records",
]


@dataclass(frozen=True)
class SiteRecord:
    """One place where the model attends. ``source``: index of the site whose store it reads, its own or an
    earlier one's; ``bytes``: what its own store takes; ``joins``: it writes into that store as others do."""

    layer: str
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    mask: str
    store: str
    source: int
    bytes: int
    joins: bool = False


@dataclass(frozen=True)
class StateRecord:
    """What a row of a recurrence hands on to the next: ``shape`` of that of one sequence; ``bytes`` for
    all."""

    layer: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Freed:
    """What was to be saved, worked out before anything was rewritten, and what was."""

    promised: int
    realised: int


@dataclass(frozen=True)
class SharingRecord:
    """Attentions that read the keys and values of others because of a pass, as pairs of indices (consumer,
    source), and what that frees: bytes of stores, of parameters and buffers, FLOPs of a token without stores.

    ``off``: by how much logits differed most from those of the program in which consumers are redirected and
    nothing is taken away. ``divergence``: KL in nats to the model before, as measured on ``tokens`` tokens of
    calibration; ``None`` where it was not.

    ``streams``: attentions that make keys and values of what enters an early one, as pairs (attention, early
    one); ``prompt_flops``: what is saved by all of it of a prompt of ``prompt`` tokens, and was to be in
    products with weights.
    """

    sources: tuple[tuple[int, int], ...]
    cache_bytes: Freed
    weight_bytes: Freed
    flops: Freed
    off: float
    divergence: float | None = None
    tokens: int = 0
    streams: tuple[tuple[int, int], ...] = ()
    prompt_flops: Freed = Freed(0, 0)
    prompt: int = 0


@dataclass(frozen=True)
class CachePoint:
    """Bytes of all stores and the sum of their prices, KL in nats."""

    bytes: int
    divergence: float


@dataclass(frozen=True)
class LossyRecord:
    """Attentions whose stores are not exact. ``allowed``: by how much logits might be off those of the
    program in which these attentions give what they gave; ``notes``: what such stores do to other uses of
    what is kept; ``divergence``: KL to the model in nats a token on ``tokens`` tokens of calibration,
    ``predicted`` the sum of single prices, both ``None`` where nothing was measured; ``frontier``: bytes and
    least sum of prices.
    """

    attentions: int
    allowed: float
    notes: tuple[str, ...] = ()
    divergence: float | None = None
    predicted: float | None = None
    tokens: int = 0
    frontier: tuple[CachePoint, ...] = ()


@dataclass(frozen=True)
class DecodingRecord:
    """``max_tokens``, ``max_batch``: what the stores are for; ``chunk``: tokens of a prompt taken in at once;
    ``cache_bytes``: stores and what is kept of padding; ``budget``: the bound on them, if there is one;
    ``off``: by how much logits differed most when it was checked, from those without a cache, what ``lossy``
    attentions gave being given; ``beside``: products whose weights were laid side by side, to be read by one;
    ``sharing``: what passes let attentions share, if they did; ``states``: what recurrences keep."""

    max_tokens: int
    max_batch: int
    chunk: int
    cache_bytes: int
    budget: int | None
    off: float
    sites: tuple[SiteRecord, ...]
    beside: int = 0
    sharing: SharingRecord | None = None
    lossy: LossyRecord | None = None
    states: tuple[StateRecord, ...] = ()


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
            site.store.joins,
        )
        for index, site in enumerate(sites)
    )


def state_records(uncached: Uncached, batch: int) -> tuple[StateRecord, ...]:
    """A record of each state of each recurrence, of ``batch`` sequences."""
    return tuple(
        StateRecord(
            held.layer,
            f"{held.node.name}.{name}",
            state.shape,
            str(state.dtype).removeprefix("torch."),
            batch * state.bytes,
        )
        for held in states_of(uncached)
        for name, state in held.kinds.items()
    )
