"""What packing takes off a weight, given back by two thin matrices beside it.

    weight [N, K]  ~  unpacked base [N, K]  +  up [N, rank] @ down [rank, K]

The start of adapters that are trained beside a frozen base, so that fine-tuning begins at the model as it was
rather than at the packed one; without training, a correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graphopt.errors import QuantizationError
from graphopt.packing.scheme import Scheme, reason_of_weight, scheme_text

__all__ = ["LowRank", "low_rank_correction"]

_SQUARES = "second-moment"


@dataclass(frozen=True)
class LowRank:
    """``base`` [N, K] is what to pack, of the dtype of the weight; ``up`` float32[N, rank] and ``down``
    float32[rank, K] are added to what it is unpacked to. ``error`` and ``error_before``: squared errors of
    the weight, over its square, with and without the two."""

    base: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    error: float
    error_before: float


def low_rank_correction(
    weight: torch.Tensor,
    scheme: Scheme,
    rank: int,
    *,
    statistics: Mapping[str, torch.Tensor] | None = None,
    turns: int = 1,
) -> LowRank:
    """The two matrices of ``rank`` that are nearest to what ``scheme`` takes off ``weight`` [N, K].

    One turn: the weight is packed as it is, and the singular vectors of its error are taken (LoRC in
    ZeroQuant-V2, https://arxiv.org/abs/2303.08302; INT2.1, https://arxiv.org/abs/2306.08162, trains such
    matrices to the same end). More ``turns``: what the matrices stand for is taken off before the weight is
    packed again, and so on (LoftQ, https://arxiv.org/abs/2310.08659); of all turns the best is returned.
    ``statistics`` are what calibration found of the inputs, as ``Scheme.pack`` takes them: with
    ``second-moment`` [K] errors of columns count by the size of their inputs, so that those of results are
    made small.

    Both matrices have the same share of the singular values. Raises ``QuantizationError`` where the scheme
    refuses the weight or lacks statistics, and for a rank or a number of turns that cannot be.
    """
    known = dict(statistics or {})
    if weight.dim() != 2:
        raise QuantizationError(f"a weight of shape {tuple(weight.shape)} is no matrix: expected [N, K]")
    n, k = weight.shape
    if not 1 <= rank <= min(n, k):
        raise QuantizationError(f"rank is {rank}: expected 1 to {min(n, k)} for a weight [{n}, {k}]")
    if turns < 1:
        raise QuantizationError(f"turns is {turns}: expected 1 or more")
    weight = weight.detach()
    reason = (
        reason_of_weight(weight)
        or scheme.refuses(n, k, weight.dtype, weight.device)
        or scheme.lacks(k, known)
        or scheme.refuses_numbers(weight, known)
    )
    if reason is not None:
        raise QuantizationError(f"cannot pack a weight as {scheme_text(scheme)}: {reason}")
    exact, sizes = weight.float(), _sizes(k, known, weight.device)
    total = float((exact * sizes).square().sum()) or 1.0
    best, before, base = None, 0.0, weight
    for turn in range(turns):
        off = exact - scheme.unpack(scheme.pack(base, known), n, k, torch.float32)
        if turn == 0:
            before = float((off * sizes).square().sum()) / total
        left, values, right = torch.linalg.svd(off * sizes, full_matrices=False)
        roots = values[:rank].sqrt()
        up, down = left[:, :rank] * roots, roots[:, None] * right[:rank] / sizes
        error = float(((off - up @ down) * sizes).square().sum()) / total
        if best is None or error < best.error:
            best = LowRank(base, up.contiguous(), down.contiguous(), error, before)
        base = (exact - up @ down).to(weight.dtype)
    assert best is not None
    return best


def _sizes(k: int, statistics: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Of inputs, float32[K]: 1 where nothing is known; none is 0, since they are divided by."""
    squares = statistics.get(_SQUARES)
    if squares is None:
        return torch.ones(k, device=device)
    if tuple(squares.shape) != (k,) or not bool(torch.isfinite(squares).all()):
        raise QuantizationError(f"{_SQUARES} has shape {tuple(squares.shape)}: expected ({k},), finite")
    sizes = squares.to(device, torch.float32).clamp(min=0).sqrt()
    largest = sizes.amax() if k else sizes.new_ones(())
    return sizes.clamp(min=1e-4 * float(largest) or 1.0)
