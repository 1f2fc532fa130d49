"""What letting attentions share does to predictions, measured without running what stays as it is.

A program is run once over calibration tokens. What it computes before the first attention that changes stays
the same, so for a plan only what follows is run again, from values that were kept::

    x0 .. x11 | attention 12 reads keys of 10 | x12 .. x29, logits       kept | run again

Kept are what the rest of each attention reads: queries, the stream beside it, masks, and keys and values of
all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.columns import PRODUCTS
from graphopt.decoding.layouts import name_of
from graphopt.decoding.part import Part, following
from graphopt.decoding.regions import Region
from graphopt.decoding.reroot import as_assigned
from graphopt.decoding.share import between, redirected, without_dead
from graphopt.errors import InputsError
from graphopt.quality import row_divergences

__all__ = ["LEAST_TOKENS", "Look"]

LEAST_TOKENS = 128
"""Fewer tokens say too little of predictions."""

_AT_ONCE = 512
"""Tokens that are run at once: what is kept grows with all of them, what is computed with these."""


class Look:
    """A program over ``rows`` int64[N, S] of calibration tokens.

    Raises ``InputsError`` for fewer than ``LEAST_TOKENS`` tokens in all.
    """

    def __init__(self, uncached: Uncached, regions: Sequence[Region], rows: torch.Tensor) -> None:
        if rows.dim() != 2 or rows.is_floating_point():
            raise InputsError(
                f"calibration of {list(rows.shape)} {rows.dtype}: expected token ids [sequences, length]"
            )
        if rows.numel() < LEAST_TOKENS:
            raise InputsError(
                f"calibration has {rows.numel()} tokens ({rows.shape[0]} sequences of {rows.shape[1]}): at "
                f"least {LEAST_TOKENS} are needed to compare predictions",
                hint="give longer or more sequences of text that the model is used for",
            )
        if int(rows.max()) >= uncached.vocabulary or int(rows.min()) < 0:
            raise InputsError(
                f"calibration has token {int(rows.max())}: the model has {uncached.vocabulary} of them"
            )
        self.uncached, self.regions = uncached, tuple(regions)
        device = uncached.placeholder(uncached.tokens).meta["val"].device
        self.rows = rows.to(device)
        self.parts = torch.split(self.rows, max(1, _AT_ONCE // rows.shape[1]))
        output = next(node for node in uncached.gm.graph.nodes if node.op == "output")
        self._logits: str = output.args[0][0].name
        self._states = _states_before(output.args[0][0])
        wanted = self._needed()
        whole = Part(uncached.gm.graph, wanted)
        self._kept: list[dict[str, Any]] = []
        with torch.no_grad():
            for part in self.parts:
                self._kept.append(whole(self._given(uncached, part)))

    @property
    def tokens(self) -> int:
        return self.rows.numel()

    def _given(self, uncached: Uncached, part: torch.Tensor) -> dict[str, Any]:
        return {**uncached.weights, **arguments_of(uncached, part, None, None)}

    def _needed(self) -> set[str]:
        """Names of values that are read behind some attention and made before it."""
        found = {self._logits, self._states}
        for region in self.regions:
            found |= {region.key.name, region.value.name}
            changed = following(self.uncached.gm.graph, between(region))
            found |= {
                source.name for node in changed for source in node.all_input_nodes if source not in changed
            }
        return found

    def keys(self, index: int) -> torch.Tensor:
        """What attention ``index`` reads for keys, for all rows, as the program lays it out."""
        return torch.cat([kept[self.regions[index].key.name] for kept in self._kept])

    def values(self, index: int) -> torch.Tensor:
        """The same of its values."""
        return torch.cat([kept[self.regions[index].value.name] for kept in self._kept])

    def logits(
        self, sources: Mapping[int, int], weights: Mapping[str, torch.Tensor] | None = None
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Logits [B, S, V] of parts of the rows, before and with ``sources``; ``weights`` take the place of
        those of the program, by placeholder."""
        for kept, found in zip(self._kept, self._again(sources, {self._logits}, weights), strict=True):
            yield kept[self._logits], found[self._logits]

    def states(self, sources: Mapping[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What logits are made of, [N, S, D], before and with ``sources``."""
        found = [part[self._states] for part in self._again(sources, {self._states}, None)]
        return torch.cat([kept[self._states] for kept in self._kept]), torch.cat(found)

    def divergence(
        self,
        sources: Mapping[int, int],
        weights: Mapping[str, torch.Tensor] | None = None,
        streams: Mapping[int, int] | None = None,
    ) -> float:
        """KL of predictions with ``sources`` from those without, in nats: the mean over tokens. With
        ``streams`` (``graphopt.decoding.reroot``) the whole program is run again."""
        total = 0.0
        if streams:
            changed = as_assigned(self.uncached, self.regions, sources, streams, weights)
            for kept, part in zip(self._kept, self.parts, strict=True):
                total += float(row_divergences(kept[self._logits], changed.run(part)).double().sum())
            return total / self.tokens
        for before, after in self.logits(sources, weights):
            total += float(row_divergences(before, after).double().sum())
        return total / self.tokens

    def _again(
        self,
        sources: Mapping[int, int],
        wanted: set[str],
        weights: Mapping[str, torch.Tensor] | None,
    ) -> Iterable[dict[str, Any]]:
        uncached = without_dead(redirected(self.uncached, self.regions, sources))
        graph = uncached.gm.graph
        named = {node.name: node for node in graph.nodes}
        starts = {named[node.name] for index in sources for node in between(self.regions[index])}
        for name in weights or {}:
            starts |= set(named[name].users)
        changed = following(graph, starts)
        known = {name for name in self._kept[0] if named.get(name) not in changed}
        again = Part(graph, wanted, known)
        for part, kept in zip(self.parts, self._kept, strict=True):
            given = self._given(uncached, part) | dict(weights or {})
            with torch.no_grad():
                found = again({**kept, **given})
            yield found


def _states_before(logits: fx.Node) -> str:
    """The value that the last product multiplies."""
    node = logits
    while name_of(node) not in PRODUCTS:
        node = node.all_input_nodes[0]
    given = node.args[1 if name_of(node) == "addmm" else 0]
    assert isinstance(given, fx.Node)
    return given.name
