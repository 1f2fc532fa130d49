"""Whether attentions over stores give what their stores say, of the very values that they were given.

Beside the decoder::

    attend_op(query[n], key[n], value[n], stores.., positions)     rows of a prompt, then row after row
    store.whole(queries, keys, values)                             all rows at once, nothing kept

A store that loses a position, reads a scale of another block or drops the wrong key is off by a share of the
values themselves; sums of another order by a few units in their last place. In float16 and bfloat16 the two
come near each other: there the operator is run once more with the same numbers in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
import torch.fx as fx

from graphopt.decoding.check import SHARE, padding_text
from graphopt.decoding.decoder import Decoder
from graphopt.decoding.insert import turn_of
from graphopt.decoding.sites import Site
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt.decoding.whole import Given
from graphopt.errors import VerificationError
from graphopt.packing.scheme import operator_named

__all__ = ["Seen", "Watched", "check_ends", "check_sites"]

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Seen:
    """What an attention was given, rows of all steps: ``query`` [B, H, R, D], ``key`` [B, Hkv, S, D] and
    ``value`` [B, Hkv, S, Dv] or ``None`` where it reads another's, ``sinks`` [H] or ``None``; and what it
    ``made`` [B, H, R, Dv]. ``counts``: new rows of each step, S in all; ``asked``: how many of these, the
    last ones, the queries of each step are of; ``places`` int64 [R]: their positions."""

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    sinks: torch.Tensor | None
    made: torch.Tensor
    counts: tuple[int, ...]
    asked: tuple[int, ...]
    places: torch.Tensor

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` [B, H, R, D] at their places among all, [B, H, S, D], zeros where nothing was asked."""
        every = rows.new_zeros((*rows.shape[:2], sum(self.counts), rows.shape[3]))
        return every.index_copy_(2, self.places, rows)

    def within(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of ``rows`` [B, H, S, D] that were asked for, [B, H, R, D]."""
        return rows.index_select(2, self.places)

    def shown(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Those of ``mask`` [B, S] that were asked for."""
        return None if mask is None else mask.index_select(1, self.places)


class Watched:
    """While entered, what goes through the attentions of ``decoder`` is written down; ``seen`` has it by site
    afterwards. Raises ``VerificationError`` where a step does not attend once for each site."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.general = decoder, decoder.general
        self.steps: list[list[_Call]] = []
        self.seen: dict[int, Seen] = {}

    def __enter__(self) -> Watched:
        assert isinstance(self.general, fx.GraphModule)
        ops = {operator_named(site.store.attend_op) for site in self.decoder.sites}

        def watching(*arguments: Any) -> Any:
            run = _Watching(self.general, ops)  # type: ignore[arg-type]
            made = run.run(*arguments)
            self.steps.append(run.calls)
            return made

        self.decoder.general = watching
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.decoder.general = self.general
        if kind is None:
            self.seen = {i: self._seen(i, site) for i, site in enumerate(self.decoder.sites)}

    def _seen(self, index: int, site: Site) -> Seen:
        sites = len(self.decoder.sites)
        for calls in self.steps:
            if len(calls) != sites:
                raise VerificationError(f"a step attends {len(calls)} times: the model does {sites} times")
        calls = [step[index] for step in self.steps]
        held = len(site.store.tensors(site.spec, 1, self.decoder.options.max_tokens))
        query, key, value = (
            None if calls[0].given[i] is None else torch.cat([call.given[i] for call in calls], 2)
            for i in range(3)
        )
        assert query is not None
        made = torch.cat([call.made for call in calls], 2)
        counts = tuple(call.given[3 + held].shape[0] for call in calls)
        asked = tuple(call.made.shape[2] for call in calls)
        places = torch.cat([call.given[3 + held][-count:] for call, count in zip(calls, asked, strict=True)])
        return Seen(query, key, value, calls[0].given[3 + held + 3], made, counts, asked, places)


@dataclass(frozen=True)
class _Call:
    """Arguments of an operator in the order of its schema, and what it made."""

    given: tuple[Any, ...]
    made: torch.Tensor


class _Watching(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, ops: set[Any]) -> None:
        super().__init__(gm)
        self.ops = ops
        self.calls: list[_Call] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = super().call_function(target, args, kwargs)
        if target in self.ops:
            names = [argument.name for argument in target._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self.calls.append(_Call(tuple(given.get(name) for name in names), made))
        return made


def check_sites(
    decoder: Decoder, watched: Watched, lossy: Mapping[int, CacheStore], mask: torch.Tensor | None
) -> None:
    """Compare what each attention of ``lossy`` made with what its store says that it gives, row by row that
    is no padding. Raises ``VerificationError`` for the first that differs."""
    replayed: dict[int, torch.Tensor] = {}
    for index in lossy:
        source = decoder.sites[index].source
        if index == source and decoder.sites[index].spec.dtype in _HALVES:
            replayed |= _replayed(decoder, watched, source, mask)
    for index, store in lossy.items():
        site, seen = decoder.sites[index], watched.seen[index]
        numbers = seen.spread(seen.query), *_kept(decoder, watched, site)
        if index in replayed:
            wide = replace(site.spec, dtype=torch.float32)
            expected = _whole(store, wide, [_wide(x) for x in numbers], _wide(seen.sinks), mask)
            _compare(index, site, store, seen, replayed[index], expected, mask, " in float32")
        expected = _whole(store, site.spec, numbers, seen.sinks, mask)
        _compare(index, site, store, seen, seen.made, expected, mask, "")


def _kept(decoder: Decoder, watched: Watched, site: Site) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Keys and values that the store of a site was given, those of all that write into it."""
    if not site.store.joins:
        first = watched.seen[site.source]
        return first.key, first.value
    every = [watched.seen[i] for i, one in enumerate(decoder.sites) if one.source == site.source]
    keys, values = zip(*((seen.key, seen.value) for seen in every), strict=True)
    return torch.stack(keys), torch.stack(values)


def _whole(
    store: CacheStore,
    spec: SiteSpec,
    numbers: Sequence[torch.Tensor | None],
    sinks: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    store, spec = store.inside(spec)
    query, key, value = numbers
    assert query is not None and key is not None and value is not None
    slopes = torch.tensor(spec.mask.slopes, device=query.device) if spec.mask.slopes else None
    with torch.no_grad():
        return store.whole(spec, query, key, value, _valid(spec, mask), slopes, sinks)


def _valid(spec: SiteSpec, mask: torch.Tensor | None) -> torch.Tensor | None:
    return mask != 0 if mask is not None and (spec.mask.padding or spec.mask.slopes) else None


def _wide(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float()


def _replayed(
    decoder: Decoder, watched: Watched, source: int, mask: torch.Tensor | None
) -> dict[int, torch.Tensor]:
    """What the readers of the store of ``source`` make of the same rows in the same steps in float32, by
    index."""
    store, spec = decoder.sites[source].store, replace(decoder.sites[source].spec, dtype=torch.float32)
    first = watched.seen[source]
    batch, length = first.query.shape[0], sum(first.counts)
    held = [
        torch.zeros(shape, dtype=dtype, device=decoder.device)
        for shape, dtype in store.tensors(spec, batch, decoder.options.max_tokens).values()
    ]
    attend = operator_named(store.attend_op)
    readers = [i for i, site in enumerate(decoder.sites) if site.source == source]
    made: dict[int, list[torch.Tensor]] = {index: [] for index in readers}
    start = 0
    asked = dict.fromkeys(readers, 0)
    for step, count in enumerate(first.counts):
        stop = start + count
        for index in readers:
            seen, own = watched.seen[index], replace(decoder.sites[index].spec, dtype=torch.float32)
            rows = [None if x is None else x[:, :, start:stop].float() for x in (seen.key, seen.value)]
            query = seen.query[:, :, asked[index] : asked[index] + seen.asked[step]].float()
            asked[index] += seen.asked[step]
            slopes = torch.tensor(own.mask.slopes, device=decoder.device) if own.mask.slopes else None
            valid = _valid(own, mask)
            if valid is not None:
                valid = torch.nn.functional.pad(valid, (0, decoder.options.max_tokens - length))
            positions = torch.arange(start, stop, device=decoder.device)
            constants = store.constants(replace(own, turn=turn_of(decoder.sites, index)))
            with torch.no_grad():
                made[index].append(
                    attend(
                        query, *rows, *held, positions, valid, slopes, _wide(seen.sinks), own.scale,
                        own.softcap, own.mask.window, decoder.options.max_tokens, *constants,
                    )
                )  # fmt: skip
        start = stop
    return {index: torch.cat(parts, 2) for index, parts in made.items()}


def _compare(
    index: int,
    site: Site,
    store: CacheStore,
    seen: Seen,
    found: torch.Tensor,
    expected: torch.Tensor,
    mask: torch.Tensor | None,
    how: str,
) -> None:
    position, off, allowed = _first_off(found, expected, mask, seen)
    if position is not None:
        where = site.region.layer or site.region.output.name
        raise VerificationError(
            f"{where}: store {store} of attention {index} does not give what it says{how}, at position "
            f"{position}{padding_text(mask)}: off by {off:.3g}, at most {allowed:.3g} is allowed"
        )


def check_ends(
    decoder: Decoder, watched: Watched, ends: Mapping[int, Given], mask: torch.Tensor | None
) -> None:
    """Compare the queries, keys and values that attentions were given with those of the captured graph.
    Raises ``VerificationError`` for the first that differ."""
    for index, given in ends.items():
        assert given.ends is not None
        seen = watched.seen[index]
        for name, found, expected in zip(
            ("queries", "keys", "values"), (seen.query, seen.key, seen.value), given.ends, strict=True
        ):
            if found is None:
                continue
            position, off, allowed = _first_off(found, expected, mask, seen if name == "queries" else None)
            if position is not None:
                region = decoder.sites[index].region
                raise VerificationError(
                    f"{region.layer or region.output.name}: {name} of attention {index} are not those of the "
                    f"model without a cache at position {position}{padding_text(mask)}: off by {off:.3g}, at "
                    f"most {allowed:.3g} is allowed"
                )


def _first_off(
    found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None, seen: Seen | None
) -> tuple[int | None, float, float]:
    """The position of the first row of ``expected`` [B, H, S, D] that ``found`` is off by more than a share
    of the largest number, by how much, and how much was allowed; rows of padding are left out, and those that
    nothing was asked for where ``found`` are the rows of ``seen``."""
    if seen is not None:
        expected, mask = seen.within(expected), seen.shown(mask)
    shown = torch.ones_like(found[:, 0, :, 0], dtype=torch.bool) if mask is None else mask != 0
    shown = shown[:, None, :, None]
    allowed = SHARE.get(expected.dtype, 1e-4) * float(expected.masked_fill(~shown, 0.0).abs().max())
    rows = (found - expected).masked_fill(~shown, 0.0).abs().amax((0, 1, 3)).float()
    wrong = (~(rows <= allowed)).nonzero()
    if not len(wrong):
        return None, float(rows.max()), allowed
    row = int(wrong[0])
    return row if seen is None else int(seen.places[row]), float(rows[row]), allowed
