"""What keys are kept for: scores by which a store of a fixed number of positions drops one.

Operators are found by name from anywhere in a process, and so are scores: a step that is compiled, or loaded
from a file, says ``policy="h2o"`` and no more. A host makes those of its plugins known as it reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graphopt.errors import PluginError, UnknownNameError

if TYPE_CHECKING:
    from graphopt.plugins.records import CacheScoreSpec

__all__ = ["CacheScore", "ScoreContext", "cache_score", "known_cache_scores", "make_known", "scored"]


@dataclass(frozen=True)
class ScoreContext:
    """What a score may look at after a row came and has read: L slots, or positions, of each head of keys.

    ``before`` float32 [B, Hkv, L]: the scores so far, 0 where a key is new; ``weights`` float32 [B, Hkv, L]:
    how much the row reads of each, mean over the heads of queries that share keys; ``query`` [B, Hkv, g, D]
    of the row; ``key`` [B, Hkv, L, D], ``value`` [B, Hkv, L, Dv]; ``places`` int64 [B, Hkv, L]: the position
    that each is of, ``row`` int64 []: that of the row; ``held`` bool [B, Hkv, L]: which hold a key that is no
    padding. What is not held has numbers of no meaning, and a score that mixes keys leaves it out: the same
    keys may lie in any slots.
    """

    before: torch.Tensor
    weights: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    places: torch.Tensor
    row: torch.Tensor
    held: torch.Tensor


CacheScore = Callable[[ScoreContext], torch.Tensor]

_KNOWN: dict[str, CacheScoreSpec] = {}


def make_known(specs: Iterable[CacheScoreSpec]) -> None:
    """Let operators find ``specs``. Raises ``PluginError`` for a name that is another's: steps that were made
    would go by the new one."""
    for spec in specs:
        first = _KNOWN.setdefault(spec.name, spec)
        if _origin(first) != _origin(spec):
            raise PluginError(
                f"cache score {spec.name!r} is {'.'.join(_origin(first))} in this process, and "
                f"{'.'.join(_origin(spec))} was registered too",
                hint="give one of them another name",
            )
        _KNOWN[spec.name] = spec


def _origin(spec: CacheScoreSpec) -> tuple[str, str]:
    """Where a score was written: one that is defined again there replaces what it was."""
    score = spec.score
    return getattr(score, "__module__", ""), getattr(score, "__qualname__", type(score).__qualname__)


def known_cache_scores() -> tuple[str, ...]:
    """Names, in order, of what operators find: what installed plugins and those of sessions so far bring."""
    from graphopt.plugins.host import default_host

    default_host().cache_scores()
    return tuple(sorted(_KNOWN))


def cache_score(name: str) -> CacheScoreSpec:
    """The score of that name; raises ``UnknownNameError``."""
    if name not in _KNOWN and name not in known_cache_scores():
        raise UnknownNameError("cache score", name, _KNOWN)
    return _KNOWN[name]


def scored(name: str, given: ScoreContext) -> torch.Tensor:
    """The new scores float32 [B, Hkv, L]; the least goes first. Raises ``PluginError`` for another shape or
    dtype."""
    made = cache_score(name).score(given)
    if made.shape != given.before.shape or made.dtype is not torch.float32:
        raise PluginError(
            f"cache score {name!r} gave {made.dtype} {list(made.shape)}: expected torch.float32 "
            f"{list(given.before.shape)}"
        )
    return made
