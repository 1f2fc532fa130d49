"""What a change does to the predictions of a model over classes: tokens of a language model, mostly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.errors import InputsError, brief

__all__ = ["Quality", "measure_quality"]

_PIECE = 1 << 24
"""Logits that are compared at once."""


@dataclass(frozen=True)
class Quality:
    """Predictions of a model against those of a reference, over ``tokens`` rows of logits.

    ``divergence``: mean over rows of KL(reference || model) in nats, ``divergence_p99`` its 99th percentile;
    ``agreement``: share of rows whose likeliest class is the same; perplexities are exp of the mean negative
    log-likelihood of the classes that came, ``None`` where no labels are known.
    """

    tokens: int
    divergence: float
    divergence_p99: float
    agreement: float
    perplexity_before: float | None = None
    perplexity_after: float | None = None

    def __str__(self) -> str:
        lines = [
            f"rows of logits       {self.tokens:,}",
            f"KL, mean             {self.divergence:.3g} nats",
            f"KL, 99th percentile  {self.divergence_p99:.3g} nats",
            f"same top class       {100 * self.agreement:.2f} %",
        ]
        if self.perplexity_before is not None and self.perplexity_after is not None:
            change = 100 * (self.perplexity_after / self.perplexity_before - 1)
            both = f"{self.perplexity_before:.4g} -> {self.perplexity_after:.4g}"
            lines.append(f"perplexity           {both} ({change:+.2f} %)")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite is ``None``."""
        body = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in body.items()
        }


def measure_quality(
    reference: Callable[..., Any], changed: Callable[..., Any], batches: Iterable[Any]
) -> Quality:
    """Run both on every batch, without gradients, and compare the logits [..., classes] that they give.

    A batch is a tuple of positional or a dict of keyword arguments. Logits are the output's ``logits``, or
    the first floating-point tensor in it of two dimensions or more. Labels are the batch's ``labels``, as
    causal language models read them (-100: none), else its ``input_ids``: the class of a row is the next
    row's label. A single tensor of integers among positional arguments counts as ids.

    Raises ``InputsError`` for no batches, outputs without logits, and logits of different shapes.
    """
    divergences: list[torch.Tensor] = []
    same = 0
    likelihoods = [0.0, 0.0]
    labelled = 0
    for index, batch in enumerate(batches):
        with torch.no_grad():
            pair = [_logits(index, _called(index, model, batch)) for model in (reference, changed)]
        before, after = pair
        if before.shape != after.shape:
            raise InputsError(
                f"batch {index}: logits have shape {tuple(after.shape)}, "
                f"the reference's {tuple(before.shape)}"
            )
        labels = _labels(batch, before.shape[:-1])
        targets = None if labels is None else labels.reshape(-1).to(before.device)
        rows, classes = before.reshape(-1, before.shape[-1]), before.shape[-1]
        others = after.reshape(-1, classes)
        step = max(1, _PIECE // classes)
        for start in range(0, rows.shape[0], step):
            piece = slice(start, start + step)
            p, q = (torch.log_softmax(x[piece].float(), -1) for x in (rows, others))
            divergences.append(
                torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).cpu()
            )
            same += int((rows[piece].argmax(-1) == others[piece].argmax(-1)).sum())
            if targets is None:
                continue
            known = targets[piece] >= 0
            labelled += int(known.sum())
            for place, log in enumerate((p, q)):
                chosen = log.gather(-1, targets[piece].clamp(min=0)[:, None])[:, 0]
                likelihoods[place] += float(chosen[known].double().sum())
    if not divergences:
        raise InputsError("there are no batches to compare on")
    every = torch.cat(divergences).double()
    perplexity = [math.exp(-total / labelled) if labelled else None for total in likelihoods]
    # Of more rows than torch.quantile takes as well.
    place = max(0, math.ceil(0.99 * len(every)) - 1)
    return Quality(
        len(every),
        float(every.mean()),
        float(every.sort().values[place]),
        same / len(every),
        perplexity[0],
        perplexity[1],
    )


def _called(index: int, model: Callable[..., Any], batch: Any) -> Any:
    if not isinstance(batch, (Mapping, tuple, list)):
        raise InputsError(
            f"batch {index} is a {type(batch).__name__}: expected a tuple of positional or a dict of keyword "
            "arguments"
        )
    try:
        return model(**batch) if isinstance(batch, Mapping) else model(*batch)
    except Exception as error:
        raise InputsError(f"batch {index}: the model does not run with it: {brief(error)}") from error


def _logits(index: int, output: Any) -> torch.Tensor:
    found = getattr(output, "logits", None)
    leaves = [found] if isinstance(found, torch.Tensor) else torch.utils._pytree.tree_leaves(output)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() >= 2 and leaf.numel():
            return leaf
    raise InputsError(f"batch {index}: the output holds no logits, a tensor [..., classes]")


def _labels(batch: Any, shape: torch.Size) -> torch.Tensor | None:
    """The class that each row of logits of ``shape`` should have predicted, -1 for none."""
    if isinstance(batch, Mapping):
        found = batch.get("labels", batch.get("input_ids"))
    else:
        ids = [x for x in batch if isinstance(x, torch.Tensor) and x.dtype is torch.int64]
        found = ids[0] if len(ids) == 1 else None
    if not isinstance(found, torch.Tensor) or found.shape != shape or found.dim() < 2:
        return None
    labels = torch.full_like(found, -1)
    labels[..., :-1] = found[..., 1:]
    return labels
