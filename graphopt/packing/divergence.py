"""What rounding one weight alone does to the predictions of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from graphopt.packing.convert import matrix_of, tensor_of
from graphopt.quality import logits_of, row_divergences

__all__ = ["probe", "swap_divergences"]

_GROUP = 64
_STEPS = 15


def probe(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [N, K] rounded to 16 levels between the least and the largest of 64 neighbours of a row,
    float32: an error as schemes of four bits make it, whatever they are."""
    exact = weight.float()
    rows, inner = exact.shape
    whole = inner - inner % _GROUP
    parts = [_rounded(exact[:, :whole].reshape(rows, -1, _GROUP)).view(rows, whole)] if whole else []
    if whole < inner:
        parts.append(_rounded(exact[:, whole:]))
    return torch.cat(parts, 1)


def _rounded(wide: torch.Tensor) -> torch.Tensor:
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    step = (high - low) / _STEPS
    step = torch.where(step > 0, step, 1.0)
    return ((wide - low) / step).round() * step + low


def swap_divergences(
    model: nn.Module,
    orientations: Mapping[str, str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    told: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Mean over rows of logits of KL(model || model with one weight rounded by ``probe``), in nats, for each
    of the parameters named; ``told(done, of)`` is called after each.

    One forward for each weight, and one more; beside the model there are one weight and the logits twice.
    Parameters are as they were afterwards. Raises ``InputsError`` where there are no logits.
    """
    parameters = dict(model.named_parameters())
    found = {}
    with torch.no_grad():
        reference = logits_of(model(*args, **kwargs))
        for done, (name, orientation) in enumerate(orientations.items()):
            parameter = parameters[name]
            kept = parameter.detach().clone()
            try:
                changed = probe(matrix_of(parameter, orientation))
                parameter.copy_(tensor_of(changed, parameter.shape, orientation))
                after = logits_of(model(*args, **kwargs))
                found[name] = float(row_divergences(reference, after).double().mean())
            finally:
                parameter.copy_(kept)
            if told is not None:
                told(done + 1, len(orientations))
    return found
