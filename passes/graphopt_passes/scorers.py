"""How much a packed weight is off: numbers that the allocation of bytes to weights adds up.

Each takes the weight float32[N, K], what its packed form stands for, and what calibration found; each is 0
where the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphopt.packing.divergence import probe
from graphopt.plugins import ScorerSpec

__all__ = [
    "SCORERS",
    "of_change",
    "of_divergence",
    "of_gradients",
    "of_hessian",
    "of_outputs",
    "of_relevance",
    "of_weights",
    "of_z_scores",
]

Statistics = Mapping[str, torch.Tensor]

_FAR = 1.0
"""Standard deviations beyond which a weight counts as far from the mean."""


def of_weights(weight: torch.Tensor, unpacked: torch.Tensor, statistics: Statistics) -> float:
    """||W - W'||^2 / ||W||^2: that of outputs if all channels of the input were alike and independent."""
    size = _norm(weight)
    off = _norm(weight - unpacked)
    return off / size if size else off


def of_outputs(weight: torch.Tensor, unpacked: torch.Tensor, statistics: Statistics) -> float:
    """||(W - W') X||^2 / ||W X||^2 on the calibration data.

    With products of pairs of channels (``gram``) it is exact; with their mean squares alone errors of
    different channels count as independent. Look-ups add the error of the rows that were read. A weight of
    which calibration saw no input is scored by ``of_weights``. Source: the layer-wise error that OBC and GPTQ
    minimise (arXiv:2208.11580, arXiv:2210.17323).
    """
    energy = float(statistics["energy"]) if "energy" in statistics else 0.0
    if not energy:
        return of_weights(weight, unpacked, statistics)
    return _output_error(weight - unpacked, statistics, None) / energy


def of_gradients(weight: torch.Tensor, unpacked: torch.Tensor, statistics: Statistics) -> float:
    """Sum over outputs of g^2 E[(w - w') x]^2: what the loss changes by to second order, its Hessian in
    outputs taken as the mean square of its gradient (Fisher), correlations left out.

    Source: the diagonal Fisher approximation of BRECQ (arXiv:2102.05426).
    """
    gradient = statistics.get("output-gradient")
    if gradient is None:
        return 0.0
    return _output_error(weight - unpacked, statistics, gradient)


def of_relevance(weight: torch.Tensor, unpacked: torch.Tensor, statistics: Statistics) -> float:
    """Relative errors of the rows of the weight, each counted by the share of the relevance that its output
    has.

    Relevance is that of layer-wise relevance propagation with the epsilon rule for small epsilon, which is
    the output times the gradient of the loss, where activations are piecewise linear (arXiv:1711.06104).
    """
    relevance = statistics.get("relevance")
    if relevance is None or not float(relevance.sum()):
        return of_weights(weight, unpacked, statistics)
    sizes = weight.float().square().sum(1)
    off = (weight - unpacked).float().square().sum(1) / torch.where(sizes > 0, sizes, 1.0)
    return float((off * relevance).double().sum() / relevance.double().sum())


def of_z_scores(weight: torch.Tensor, unpacked: torch.Tensor, statistics: Statistics) -> float:
    """The relative error of the weight times the share of its elements that are more than one standard
    deviation above the mean.

    Source: layers ordered by "z-score distribution" (arXiv:2406.17415); that it weighs the error is ours.
    """
    spread = weight.std(correction=0)
    far = ((weight - weight.mean()) > _FAR * spread).float().mean() if float(spread) else spread
    return float(far) * of_weights(weight, unpacked, statistics)


def of_change(weight: torch.Tensor, unpacked: torch.Tensor, statistics: Statistics) -> float:
    """The relative error of the weight times how much its layer turns what goes through it: the mean of
    1 - cosine of input and output. Weights outside of layers count as turning by 1.

    Source: layers ordered by "layer input modification" (arXiv:2406.17415); that it weighs the error is ours.
    """
    change = float(statistics["change"]) if "change" in statistics else 1.0
    return change * of_weights(weight, unpacked, statistics)


def of_hessian(weight: torch.Tensor, unpacked: torch.Tensor, statistics: Statistics) -> float:
    """Mean trace of the Hessian of the loss times ||W - W'||^2; 0 where the trace is estimated below 0.

    Source: HAWQ-V2 (arXiv:1911.03852).
    """
    trace = float(statistics["trace"]) if "trace" in statistics else 0.0
    return max(0.0, trace) * _norm(weight - unpacked)


def of_divergence(weight: torch.Tensor, unpacked: torch.Tensor, statistics: Statistics) -> float:
    """What this weight alone does to predictions: the KL that was measured where it was rounded by a probe,
    times the squared error of outputs over that of the probe.

    KL is quadratic in small changes, and those of different weights add up where they are independent. What
    is measured holds what later layers make of an error, over all tokens; the errors of outputs (``gram`` or
    mean squares) tell schemes of one weight apart. 0 for a weight that is of no consequence.
    """
    divergence = float(statistics["divergence"]) if "divergence" in statistics else 0.0
    off = _norm(probe(weight) - weight)
    if not divergence or not off:
        return 0.0
    of_probe = _output_error(probe(weight) - weight, statistics, None)
    if not of_probe:
        return divergence * _norm(unpacked - weight) / off
    return divergence * _output_error(unpacked - weight, statistics, None) / of_probe


def _norm(values: torch.Tensor) -> float:
    """Sum of squares."""
    return float(torch.linalg.vector_norm(values.float(), dtype=torch.float64) ** 2)


def _output_error(delta: torch.Tensor, statistics: Statistics, weights: torch.Tensor | None) -> float:
    """Mean over rows of the squared error of outputs, each counted ``weights`` times, summed."""
    delta = delta.float()
    by_row = torch.zeros(delta.shape[0], dtype=torch.float32, device=delta.device)
    gram, squares = statistics.get("gram"), statistics.get("second-moment")
    if gram is not None and (squares is None or squares.shape[0] == 1):
        by_row += ((delta @ gram) * delta).sum(1)
    elif squares is not None:
        blocks = delta.view(squares.shape[0], -1, delta.shape[1])
        by_row += torch.einsum("gnk,gk->gn", blocks.square(), squares).reshape(-1)
    if "reads" in statistics and weights is None:
        by_row += statistics["reads"] / statistics["tokens"] * delta.square().sum(1)
    return float((by_row if weights is None else by_row * weights).double().sum())


SCORERS = (
    ScorerSpec("weights", of_weights, "relative squared error of weights", (), "weights alone, no data"),
    ScorerSpec(
        "outputs",
        of_outputs,
        "relative squared error of outputs",
        ("moments",),
        "outputs on calibration data",
    ),
    ScorerSpec(
        "fisher",
        of_gradients,
        "squared error of outputs times squared gradient",
        ("moments", "gradients"),
        "outputs, by what the loss makes of them",
    ),
    ScorerSpec(
        "relevance",
        of_relevance,
        "relative squared error of rows of weights by relevance of outputs",
        ("relevance",),
        "weights, rows by the relevance of their outputs",
    ),
    ScorerSpec(
        "z-score",
        of_z_scores,
        "relative squared error of weights times share of large ones",
        (),
        "weights, those with long tails first",
    ),
    ScorerSpec(
        "embedding-change",
        of_change,
        "relative squared error of weights times change of the layer",
        ("change",),
        "weights, those of layers that change most first",
    ),
    ScorerSpec(
        "hessian",
        of_hessian,
        "squared error of weights times trace of the Hessian",
        ("curvature",),
        "second order in weights",
    ),
    ScorerSpec(
        "kl",
        of_divergence,
        "KL of predictions in nats, weights one by one",
        ("moments", "divergence"),
        "predictions, by what rounding each weight alone does to them",
    ),
)
