"""What keys are kept for: scores of eviction, all of one signature.

``score(before, weights, key, value)``: ``before`` float32 [B, Hkv, L] what each key had so far, 0 where it
is new; ``weights`` float32 [B, Hkv, L] how much the row that comes reads of each, mean over the heads that
share keys; ``key`` [B, Hkv, L, D], ``value`` [B, Hkv, L, Dv]. It gives the new scores; the least goes first.
A score looks at each key by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["SCORES", "Score"]

Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_SEEN = 32
"""Rows whose reading counts for ``snapkv``: older reading counts less and less."""


def _h2o(before: torch.Tensor, weights: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """All that was read of a key (Zhang et al. 2023)."""
    return before + weights


def _snapkv(
    before: torch.Tensor, weights: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """What the last rows read of a key (Li et al. 2024), as a mean that forgets: there is no end of the
    prompt at which to look."""
    return before + (weights - before) / _SEEN


def _knorm(
    before: torch.Tensor, weights: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Keys of small norm are read more (Devoto et al. 2024)."""
    norms: torch.Tensor = torch.linalg.vector_norm(key.float(), dim=-1)
    return -norms


def _value_aware(
    before: torch.Tensor, weights: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """All that was read of a key times what its value adds (Guo et al. 2024)."""
    return before + weights * value.float().abs().sum(-1)


SCORES: dict[str, Score] = {"h2o": _h2o, "snapkv": _snapkv, "knorm": _knorm, "value-aware": _value_aware}
"""Scores by the names that ``evict{policy=..}`` takes."""
