"""Whether a decoder gives what it should: the model's own logits, or those that its stores are to give.

A decoder whose stores are all exact is compared with the model without a cache. Stores that are not say what
they give instead (``CacheStore.whole``), without tensors that are written and without packing. Two programs
add in another order, so a number next to the border of two codes may get the other one, and logits would be
off by all that this code does. So no program is compared whole: it is cut where rounding happens. The decoder
runs, and what goes into each of those attentions and what comes out is written down. Then

- each attention is compared with ``whole`` of the very queries, keys and values that its store was given:
  codes are the same, what differs is the order of sums (``check_sites``);
- the captured graph, with what came out of those attentions in their place, gives the logits, and the
  queries, keys and values of each attention. Nothing between is rounded to codes.

Both hold to the tolerance of exact stores, whatever codes do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from graphopt.decoding.capture import Uncached
from graphopt.decoding.check import check_captured, check_rows, steps_of, tolerance
from graphopt.decoding.check_sites import Watched, check_ends, check_sites
from graphopt.decoding.convolutions import causal_convolutions
from graphopt.decoding.decoder import Decoder
from graphopt.decoding.stores import CacheStore
from graphopt.decoding.whole import with_outputs
from graphopt.errors import CaptureError, brief

__all__ = ["Checked", "check_decoder"]

_PROMPT = 5
"""Tokens of the prompt that is checked; those behind it come one by one."""

_CHECKED = 12
_LONGER = 300
"""Tokens of which a graph that was captured for a few lengths is compared with the model."""

_CHECKED_WINDOW = 64
"""Windows up to this many positions are crossed twice when decoding is checked."""

_SINGLE = 40
"""Tokens that come one by one behind what lossy stores have begun with."""


@dataclass(frozen=True)
class Checked:
    """The largest difference of logits, and what was allowed."""

    off: float
    allowed: float


def check_decoder(decoder: Decoder) -> Checked:
    """Compare what ``decoder`` gives, a prompt and then token by token, with the whole sequence at once, with
    padding and without.

    Raises ``VerificationError`` where it differs, and ``CaptureError`` where the model does not run.
    """
    uncached, options = decoder.uncached, decoder.options
    stores = {i: decoder.sites[site.source].store for i, site in enumerate(decoder.sites)}
    lossy = {i: store for i, store in stores.items() if not store.exact}
    length = min(options.max_tokens, _length(decoder, stores))
    batch = min(2, options.max_batch)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(uncached.vocabulary, (batch, length), generator=generator).to(decoder.device)
    # Of a model with recurrences prompts go in by programs for several rows, and what is left row by row.
    least = max(_PROMPT, decoder.chunk + 1 if decoder.stretch is not None else 0)
    prompt = min(length - 1, max(least, length - _SINGLE) if lossy else least)
    off = allowed = 0.0
    paddings = (0, 2) if uncached.mask is not None and prompt > 2 else (0,)
    for padded, uncached in _with_sources(decoder, paddings, batch):
        mask = None
        if uncached.mask is not None:
            mask = torch.ones_like(tokens)
            mask[-1, :padded] = 0
        try:
            expected = check_captured(uncached, tokens, mask)
        except IndexError as error:
            raise CaptureError(f"the model does not run {length} tokens: {error}") from error
        reference = uncached
        if lossy:
            rows, reference = _cut(decoder, lossy, tokens, mask, prompt)
            expected = reference.run(tokens, mask)
        else:
            rows = steps_of(decoder, tokens, mask, prompt)
        off = max(off, check_rows(rows, expected, decoder, tokens, mask, reference))
        allowed = max(allowed, tolerance(expected))
    if decoder.stretch is not None or decoder.step.rows:
        _check_longer(uncached, min(options.max_tokens, _LONGER), generator, decoder.device)
    decoder.reset(1)
    decoder.alike = None
    for tensor in decoder.held.values():
        tensor.zero_()
    return Checked(off, allowed)


_SOURCE_ROWS = 7
"""Rows of a source that is read behind a longer one."""


def _with_sources(
    decoder: Decoder, paddings: tuple[int, ...], batch: int
) -> Iterator[tuple[int, Uncached]]:
    """What is padded of the tokens, and the captured graph over a source that ``decoder`` has read: a whole
    one, and, where its mask is taken, a padded one, which is shorter where it is text."""
    uncached = decoder.uncached
    source = uncached.source
    if source is None:
        yield from ((padded, uncached) for padded in paddings)
        return
    encoder = source.encoder
    most = min(source.most, 2 * _SOURCE_ROWS) if encoder.is_text else None
    less = min(source.most, _SOURCE_ROWS) if encoder.is_text else None
    for padded, shown, rows in ((0, False, most), (paddings[-1], True, less)):
        given = source.given(encoder.sample(batch, shown, rows))
        decoder.read(given)
        yield padded, uncached.reading(given)


def _check_longer(
    uncached: Uncached, length: int, generator: torch.Generator, device: torch.device
) -> None:
    """Loops were rolled up on sequences of a few tokens: that they are the same on longer ones is looked at.
    Raises ``VerificationError`` where they are not, ``CaptureError`` where the model does not run."""
    tokens = torch.randint(uncached.vocabulary, (1, length), generator=generator).to(device)
    try:
        check_captured(uncached, tokens, None)
    except (IndexError, RuntimeError) as error:
        raise CaptureError(f"the model does not run {length} tokens: {brief(error)}") from error


def _length(decoder: Decoder, stores: dict[int, CacheStore]) -> int:
    """Positions after which all that stores do has happened."""
    windows = [site.spec.mask.window for site in decoder.sites]
    windows += [one.reach for one in causal_convolutions(decoder.uncached)]
    crossed = max((2 * w + 3 for w in windows if w <= _CHECKED_WINDOW), default=0)
    specs = [site.spec for site in decoder.sites]
    least = _CHECKED if decoder.stretch is None else max(_CHECKED, 2 * decoder.chunk)
    return max(least, crossed, *(store.crossed(specs[i]) for i, store in stores.items()))


def _cut(
    decoder: Decoder,
    lossy: Mapping[int, CacheStore],
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    prompt: int,
) -> tuple[dict[int, torch.Tensor], Uncached]:
    """Logits by position, and the captured graph with what the decoder's lossy attentions gave in the place
    of its own, both of which were compared. Raises ``VerificationError``."""
    with Watched(decoder) as watched:
        rows = steps_of(decoder, tokens, mask, prompt)
    check_sites(decoder, watched, lossy, mask)
    regions = [site.region for site in decoder.sites]
    reference, ends = with_outputs(
        decoder.uncached,
        regions,
        [site.spec for site in decoder.sites],
        lossy,
        {index: watched.seen[index].spread(watched.seen[index].made) for index in lossy},
    )
    reference.run(tokens, mask)
    check_ends(decoder, watched, ends, mask)
    return rows, reference
