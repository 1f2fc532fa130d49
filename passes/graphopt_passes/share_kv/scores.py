"""What it costs to let one attention read the keys and values of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphopt.decoding.look import Look
from graphopt.plugins import ShareScoreSpec

__all__ = ["SCORES"]

_LEAST_COSINE = 0.5
"""What KVSharer takes for states that still say the same (arXiv 2410.18517, section 3.2)."""

Pairs = Sequence[tuple[int, int]]


def single_kl(look: Look, pairs: Pairs) -> list[float]:
    """KL of predictions where this pair alone shares."""
    return [look.divergence({consumer: source}) for consumer, source in pairs]


def dissimilarity(look: Look, pairs: Pairs) -> list[float]:
    """How alike keys and values are, those that are least so first: minus the mean distance of their means
    over sequences (KVSharer, arXiv 2410.18517)."""
    indices = sorted({index for pair in pairs for index in pair})
    means = {index: (look.keys(index).mean(0), look.values(index).mean(0)) for index in indices}
    found = []
    for consumer, source in pairs:
        off = [(a - b).norm(dim=-1).mean() for a, b in zip(means[consumer], means[source], strict=True)]
        found.append(-float(sum(off)) / 2)
    return found


def same_direction(look: Look, sources: Mapping[int, int]) -> bool:
    """Whether what logits are made of points the same way still."""
    before, after = look.states(sources)
    cosine = torch.nn.functional.cosine_similarity(before.flatten(1).double(), after.flatten(1).double())
    return float(cosine.mean()) > _LEAST_COSINE


def cka(look: Look, pairs: Pairs) -> list[float]:
    """One less the linear centred kernel alignment of keys and of values (arXiv 1905.00414): those that are
    most alike up to a rotation first."""
    indices = sorted({index for pair in pairs for index in pair})
    rows = {index: (_rows(look.keys(index)), _rows(look.values(index))) for index in indices}
    found = []
    for consumer, source in pairs:
        alike = [_alignment(a, b) for a, b in zip(rows[consumer], rows[source], strict=True)]
        found.append(1 - sum(alike) / 2)
    return found


def _rows(values: torch.Tensor) -> torch.Tensor:
    """[N, H, S, D] as centred [N * S, H * D]."""
    rows = values.double().transpose(1, -2).flatten(0, 1).flatten(1) if values.dim() == 4 else values.double()
    rows = rows.reshape(-1, rows.shape[-1])
    return rows - rows.mean(0)


def _alignment(one: torch.Tensor, other: torch.Tensor) -> float:
    across = (one.T @ other).norm() ** 2
    return float(across / ((one.T @ one).norm() * (other.T @ other).norm()).clamp(min=1e-30))


SCORES = (
    ShareScoreSpec(
        "single-kl",
        single_kl,
        "KL of predictions in nats, pairs one by one",
        additive=True,
        summary="predictions, by what each pair alone does to them",
    ),
    ShareScoreSpec(
        "dissimilarity",
        dissimilarity,
        "minus the mean distance of keys and values",
        accepts=same_direction,
        summary="keys and values, those least alike first",
    ),
    ShareScoreSpec(
        "cka",
        cka,
        "1 - CKA of keys and values",
        summary="keys and values, those most alike up to a rotation first",
    ),
)
