"""Scores of ``evict`` that come with the package. Each is one function of a ``ScoreContext``, and a record.

A plugin adds one in the same way::

    @graphopt.hookimpl
    def graphopt_cache_scores():
        return [CacheScoreSpec("oldest", lambda given: given.places.float(), "the oldest goes")]
"""

from __future__ import annotations

import torch

from graphopt.decoding.cache_scores import ScoreContext
from graphopt.plugins.records import CacheScoreSpec

__all__ = ["SCORES"]

_SEEN = 32
"""Rows whose reading counts for ``snapkv``: older reading counts less and less."""


def _h2o(given: ScoreContext) -> torch.Tensor:
    return given.before + given.weights


def _snapkv(given: ScoreContext) -> torch.Tensor:
    """A mean that forgets: there is no end of the prompt at which to look."""
    return given.before + (given.weights - given.before) / _SEEN


def _tova(given: ScoreContext) -> torch.Tensor:
    return given.weights


def _knorm(given: ScoreContext) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(given.key.float(), dim=-1)
    return -norms


def _value_aware(given: ScoreContext) -> torch.Tensor:
    return given.before + given.weights * given.value.float().abs().sum(-1)


def _keydiff(given: ScoreContext) -> torch.Tensor:
    directions = torch.nn.functional.normalize(given.key.float(), dim=-1)
    mean = (directions * given.held[..., None]).sum(2, keepdim=True)
    return -torch.nn.functional.cosine_similarity(directions, mean, dim=-1)


SCORES = (
    CacheScoreSpec("h2o", _h2o, "all that was read of a key (Zhang et al. 2023)"),
    CacheScoreSpec("snapkv", _snapkv, "what was read of a key of late (Li et al. 2024)"),
    CacheScoreSpec("tova", _tova, "what the newest row reads of a key (Oren et al. 2024)"),
    CacheScoreSpec("knorm", _knorm, "keys of small norm are read more (Devoto et al. 2024)"),
    CacheScoreSpec("value-aware", _value_aware, "what was read times what a value adds (Guo et al. 2024)"),
    CacheScoreSpec("keydiff", _keydiff, "keys unlike the mean of those kept (Park et al. 2025)"),
)
