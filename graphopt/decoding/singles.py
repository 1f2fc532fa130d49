"""Compiled programs of one token, made when a batch first decodes.

Sizes are fixed, stores are written in place and positions are in a tensor, so a step is the same launches
whatever the position is, with no word from the host, and can be recorded as a CUDA graph
(``graphopt.recording``). Where a store's operator reads the position on the device (``CacheStore.follows``),
one program serves all positions. Else how much of the stores is read is part of a program, and those for 256,
512, .. positions follow one another as the stores fill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.decoding.check import tolerance
from graphopt.decoding.insert import step_graph
from graphopt.decoding.unroll import unrolled
from graphopt.errors import VerificationError, brief

if TYPE_CHECKING:
    from graphopt.decoding.decoder import Decoder
    from graphopt.session import Session

__all__ = ["Singles"]

_LEAST = 256
"""Positions that are always read: fewer make no step faster, and programs take their time to compile."""


@dataclass
class Singles:
    """``singles(decoder, length, arguments)``: what runs one token where no position is at or beyond
    ``length``, or ``None`` where operators are to run one by one."""

    session: Session
    _runs: dict[tuple[int, int], Callable[..., Any] | None] = field(default_factory=dict)

    def __call__(self, decoder: Decoder, length: int, arguments: list[Any]) -> Callable[..., Any] | None:
        if self.session.emitter.name == "eager":
            return None
        key = decoder.batch, self._read(decoder, length)
        if key not in self._runs:
            self._runs[key] = self._compiled(decoder, key[1], arguments)
        return self._runs[key]

    def _read(self, decoder: Decoder, length: int) -> int:
        """How much of the stores a program may read: all, where operators see for themselves what is
        there."""
        capacity = decoder.options.max_tokens
        if all(site.store.follows(site.spec, decoder.device) for site in decoder.sites):
            return capacity
        read = _LEAST
        while read < length:
            read *= 2
        return min(read, capacity)

    def _compiled(self, decoder: Decoder, read: int, arguments: list[Any]) -> Callable[..., Any] | None:
        """The step for this batch, compared once with the operators run one by one on ``arguments``: a step
        may be run twice, it writes the same."""
        options = decoder.options
        step = step_graph(decoder.uncached, decoder.sites, options.max_batch, options.max_tokens, read)
        if decoder.step.rows:
            step = unrolled(step, decoder.uncached, 1)
        if decoder.beside is not None:
            step = decoder.beside(step)
        try:
            with torch.no_grad(), _torch.quiet_capture(), _torch.within(_torch.static_context()):
                run = self.session.backend(step.gm, arguments)
            with torch.no_grad():
                (expected,), (found,) = decoder.general(*arguments), run(*arguments)
            off = float((found - expected).abs().max())
            if not off <= tolerance(expected):
                raise VerificationError(
                    f"the compiled step gives other logits than its operators one by one: off by {off:.3g}, "
                    f"at most {tolerance(expected):.3g} is allowed"
                )
        except Exception as error:
            if self.session.on_error == "raise":
                raise
            self.session.diagnostics.append(f"tokens are decoded operator by operator: {brief(error)}")
            return None
        return run
