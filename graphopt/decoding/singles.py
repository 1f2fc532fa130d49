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
        """The step for this batch, compared once with the operators run one by one on ``arguments``: logits
        and the states that are left."""
        options = decoder.options
        step = step_graph(decoder.uncached, decoder.sites, options.max_batch, options.max_tokens, read)
        if decoder.step.rows:
            step = unrolled(step, decoder.uncached, 1)
        if decoder.beside is not None:
            step = decoder.beside(step)
        try:
            with torch.no_grad(), _torch.quiet_capture(), _torch.within(_torch.static_context()):
                run = self.session.backend(step.gm, arguments)
            expected, found = _once(decoder.general, decoder, arguments), _once(run, decoder, arguments)
            for place, (one, other) in enumerate(zip(expected, found, strict=True)):
                # Infinities, which largest values begin with, would allow anything.
                off, allowed = _off(one, other), tolerance(one.masked_fill(~one.isfinite(), 0.0))
                if not off <= allowed:
                    raise VerificationError(
                        f"the compiled step {'leaves other states' if place else 'gives other logits'} than "
                        f"its operators one by one: off by {off:.3g}, at most {allowed:.3g} is allowed"
                    )
        except Exception as error:
            if self.session.on_error == "raise":
                raise
            self.session.diagnostics.append(f"tokens are decoded operator by operator: {brief(error)}")
            return None
        return run


def _once(run: Callable[..., Any], decoder: Decoder, arguments: list[Any]) -> list[torch.Tensor]:
    """The logits of a step and the states that it leaves; what it moved is put back."""
    # Copies on the host: caches may leave no room for a second one.
    before = [(tensor, tensor.to("cpu", copy=True)) for tensor in decoder.moving]
    try:
        with torch.no_grad():
            (logits,) = run(*arguments)
        return [logits, *(state.to("cpu", copy=True) for state in decoder.states)]
    finally:
        for tensor, value in before:
            tensor.copy_(value)


def _off(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; infinities, which largest values begin with, may be the same."""
    differ = one != other
    return float((other - one)[differ].abs().max()) if bool(differ.any()) else 0.0
