"""Chooses which attentions share: single pairs are scored, added up, and the choice corrected by measuring.

::

    score every pair (consumer, source within reach)          suffixes of the program, nothing else runs again
      | the cheapest that go together
      v
    measure the choice  -- each share left out in turn --> the dearest one is exchanged for what measures less
      | at most three rounds
      v
    shares are taken back while the choice is dearer than ``max_kl``

KL of single pairs add up while they are small; where they do not, shares that make each other worse are what
the exchange finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graphopt.decoding.look import Look
from graphopt.errors import InputsError
from graphopt.plugins import ShareScoreSpec

__all__ = ["Found", "candidate_pairs", "search"]

_ROUNDS = 3
_TRIED = 6
"""Pairs that are tried in the place of a share: those that are cheapest alone."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """``sources``, what they were predicted to cost by single pairs (``None`` for scores that do not add up)
    and what they cost when measured, KL in nats; ``runs``: how often predictions were measured."""

    sources: dict[int, int]
    predicted: float | None
    measured: float
    runs: int


def candidate_pairs(count: int, fits: Callable[[int, int], str], reach: int) -> list[Pair]:
    """Pairs of ``count`` attentions whose consumer can read the source, one of the ``reach`` nearest that it
    can."""
    pairs = []
    for consumer in range(1, count):
        near = [source for source in range(consumer - 1, -1, -1) if not fits(consumer, source)][:reach]
        pairs += [(consumer, source) for source in near]
    return pairs


def search(
    look: Look,
    pairs: Sequence[Pair],
    spec: ShareScoreSpec,
    layers: int | None,
    max_kl: float | None,
    tell: Callable[[str], None],
) -> Found:
    """At most ``layers`` shares of ``pairs`` whose measured KL is at most ``max_kl``.

    Raises ``InputsError`` where there are fewer pairs that go together than ``layers``.
    """
    tell(f"share-kv: {spec.name} of {len(pairs)} pairs on {look.tokens} tokens")
    scores = dict(zip(pairs, spec.score(look, pairs), strict=True))
    if not spec.additive:
        return _in_order(look, scores, spec, layers, max_kl)
    chooser = _Chooser(look, scores, layers, max_kl, tell)
    return chooser.result()


def _together(sources: Mapping[int, int], pair: Pair) -> bool:
    """Whether a share can be added: who reads makes nothing that others read."""
    consumer, source = pair
    return consumer not in sources and consumer not in sources.values() and source not in sources


def _cheapest(
    scores: Mapping[Pair, float], layers: int | None, max_kl: float | None
) -> dict[int, int]:
    chosen: dict[int, int] = {}
    total = 0.0
    for pair in sorted(scores, key=lambda one: (scores[one], one)):
        if layers is not None and len(chosen) >= layers:
            break
        if not _together(chosen, pair):
            continue
        total += scores[pair]
        if max_kl is not None and total > max_kl:
            break
        chosen[pair[0]] = pair[1]
    return chosen


def _too_few(chosen: int, layers: int) -> InputsError:
    return InputsError(
        f"layers={layers}: only {chosen} attentions can read the keys and values of another within reach",
        hint=f"the nearest valid choice is layers={chosen}, or a larger reach",
    )


class _Chooser:
    def __init__(
        self,
        look: Look,
        scores: Mapping[Pair, float],
        layers: int | None,
        max_kl: float | None,
        tell: Callable[[str], None],
    ) -> None:
        self.look, self.scores, self.layers, self.max_kl, self.tell = look, scores, layers, max_kl, tell
        self.known: dict[tuple[Pair, ...], float] = {((c, s),): kl for (c, s), kl in scores.items()}
        self.runs = len(scores)

    def cost(self, sources: Mapping[int, int]) -> float:
        key = tuple(sorted(sources.items()))
        if not key:
            return 0.0
        if key not in self.known:
            self.known[key] = self.look.divergence(sources)
            self.runs += 1
        return self.known[key]

    def result(self) -> Found:
        chosen = _cheapest(self.scores, self.layers, self.max_kl)
        if self.layers is not None and self.max_kl is None and len(chosen) < self.layers:
            raise _too_few(len(chosen), self.layers)
        for number in range(_ROUNDS):
            better = self._exchanged(chosen)
            self.tell(f"share-kv: round {number + 1}: KL {self.cost(chosen):.4g} -> {self.cost(better):.4g}")
            if better == chosen:
                break
            chosen = better
        while self.max_kl is not None and chosen and self.cost(chosen) > self.max_kl:
            chosen = min((_without(chosen, one) for one in chosen), key=self.cost)
        predicted = sum(self.scores[pair] for pair in chosen.items())
        return Found(dict(sorted(chosen.items())), predicted, self.cost(chosen), self.runs)

    def _exchanged(self, chosen: dict[int, int]) -> dict[int, int]:
        """``chosen`` with the share that costs most in it, all others being there, put elsewhere."""
        if len(chosen) < 2:
            return chosen
        rests = [_without(chosen, one) for one in chosen]
        rest = min(rests, key=self.cost)
        others = [
            pair for pair in sorted(self.scores, key=lambda one: (self.scores[one], one))
            if _together(rest, pair) and chosen.get(pair[0]) != pair[1]
        ]  # fmt: skip
        tried = [chosen, *({**rest, consumer: source} for consumer, source in others[:_TRIED])]
        return min(tried, key=self.cost)


def _without(sources: Mapping[int, int], consumer: int) -> dict[int, int]:
    return {one: source for one, source in sources.items() if one != consumer}


def _in_order(
    look: Look, scores: Mapping[Pair, float], spec: ShareScoreSpec, layers: int | None, max_kl: float | None
) -> Found:
    """Pairs one after another, as far as they are accepted."""
    chosen: dict[int, int] = {}
    runs = 0
    for pair in sorted(scores, key=lambda one: (scores[one], one)):
        if layers is not None and len(chosen) >= layers:
            break
        if not _together(chosen, pair):
            continue
        trial = {**chosen, pair[0]: pair[1]}
        if spec.accepts is not None:
            runs += 1
            if not spec.accepts(look, trial):
                continue
        if max_kl is not None:
            runs += 1
            if look.divergence(trial) > max_kl:
                break
        chosen = trial
    if layers is not None and max_kl is None and len(chosen) < layers:
        raise _too_few(len(chosen), layers)
    return Found(dict(sorted(chosen.items())), None, look.divergence(chosen), runs + 1)
