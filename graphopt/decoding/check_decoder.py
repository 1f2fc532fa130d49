"""Whether a decoder gives what it should: the model's own logits, or those that its stores are to give.

A decoder whose stores are all exact is compared with the model without a cache. Stores that are not say what
they give instead (``CacheStore.whole``), without tensors that are written and without packing, and the
captured graph with that in the place of its attentions is what they are compared with, at the same tolerance.

Rounding is not continuous: where two programs add in another order, a number next to the border of two codes
may get the other one. Where logits are off by more than the tolerance it is measured by how much that moves
them: the graph is run once more with keys and values off by a few units in their last place, and four times
what that does is allowed besides. The report says what was allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.decoding.capture import Uncached
from graphopt.decoding.check import check_captured, check_steps, tolerance
from graphopt.decoding.decoder import Decoder
from graphopt.decoding.stores import CacheStore
from graphopt.decoding.whole import with_stores
from graphopt.errors import CaptureError, VerificationError

__all__ = ["Checked", "check_decoder"]

_PROMPT = 5
"""Tokens of the prompt that is checked; those behind it come one by one."""

_CHECKED = 12
_CHECKED_WINDOW = 64
"""Windows up to this many positions are crossed twice when decoding is checked."""

_SINGLE = 40
"""Tokens that come one by one behind what lossy stores have begun with."""

_UNITS = 4
_MARGIN = 4
"""Units in the last place by which keys and values are moved, and how many times what that does is allowed:
sums over a few thousand numbers are off by about as much."""


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
    prompt = min(length - 1, max(_PROMPT, length - _SINGLE) if lossy else _PROMPT)
    off = allowed = 0.0
    for padded in (0, 2) if uncached.mask is not None and prompt > 2 else (0,):
        mask = None
        if uncached.mask is not None:
            mask = torch.ones_like(tokens)
            mask[-1, :padded] = 0
        try:
            expected = check_captured(uncached, tokens, mask)
        except IndexError as error:
            raise CaptureError(f"the model does not run {length} tokens: {error}") from error
        reference, margin = uncached, tolerance(expected)
        if lossy:
            reference = _rounding(decoder, lossy, 0.0)
            expected = reference.run(tokens, mask)
            margin = tolerance(expected)
        try:
            found = check_steps(expected, decoder, tokens, mask, prompt, reference, margin)
        except VerificationError:
            if not lossy:
                raise
            moved = _rounding(decoder, lossy, _UNITS * torch.finfo(expected.dtype).eps).run(tokens, mask)
            shown = expected.new_ones(()) if mask is None else (mask != 0)[..., None]
            margin += _MARGIN * float(((moved - expected) * shown).abs().max())
            found = check_steps(expected, decoder, tokens, mask, prompt, reference, margin)
        off, allowed = max(off, found), max(allowed, margin)
    decoder.reset(1)
    for tensor in decoder.held.values():
        tensor.zero_()
    return Checked(off, allowed)


def _length(decoder: Decoder, stores: dict[int, CacheStore]) -> int:
    """Positions after which all that stores do has happened."""
    windows = [site.spec.mask.window for site in decoder.sites]
    crossed = max((2 * w + 3 for w in windows if w <= _CHECKED_WINDOW), default=0)
    specs = [site.spec for site in decoder.sites]
    return max(_CHECKED, crossed, *(store.crossed(specs[i]) for i, store in stores.items()))


def _rounding(decoder: Decoder, lossy: dict[int, CacheStore], noise: float) -> Uncached:
    regions = [site.region for site in decoder.sites]
    specs = [site.spec for site in decoder.sites]
    return with_stores(decoder.uncached, regions, specs, lossy, noise)
