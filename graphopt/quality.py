"""What a change does to the predictions of a model over classes: tokens of a language model, mostly."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.errors import InputsError, brief

__all__ = ["Quality", "logits_of", "measure_quality", "row_divergences"]

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
    reference: Callable[..., Any],
    changed: Callable[..., Any],
    batches: Iterable[Any],
    *,
    progress: bool | None = None,
) -> Quality:
    """Run both on every batch, without gradients, and compare the logits [..., classes] that they give.

    A batch is a tuple of positional or a dict of keyword arguments. Logits are the output's ``logits``, or
    the first floating-point tensor in it of two dimensions or more. Labels are the batch's ``labels``, as
    causal language models read them (-100: none), else its ``input_ids``: the class of a row is the next
    row's label. A single tensor of integers among positional arguments counts as ids. ``progress`` writes to
    stderr how far it is and the mean so far, by default where that is a terminal.

    Raises ``InputsError`` for no batches, outputs without logits, and logits of different shapes.
    """
    divergences: list[torch.Tensor] = []
    same = 0
    likelihoods = [0.0, 0.0]
    labelled = 0
    told = sys.stderr.isatty() if progress is None else progress
    total = len(batches) if isinstance(batches, Sized) else None
    for index, batch in enumerate(batches):
        with torch.no_grad():
            pair = [_called(index, model, batch) for model in (reference, changed)]
        try:
            before, after = map(logits_of, pair)
        except InputsError as error:
            raise InputsError(f"batch {index}: {error.message}") from None
        if before.shape != after.shape:
            raise InputsError(
                f"batch {index}: logits have shape {tuple(after.shape)}, "
                f"the reference's {tuple(before.shape)}"
            )
        labels = _labels(batch, before.shape[:-1])
        targets = None if labels is None else labels.reshape(-1).to(before.device)
        divergences.append(row_divergences(before, after).cpu())
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        if targets is not None:
            known = targets >= 0
            labelled += int(known.sum())
            for place, logits in enumerate((before, after)):
                likelihoods[place] += _likelihood(logits, targets, known)
        if told:
            _tell(index + 1, total, divergences)
    if told and divergences:
        sys.stderr.write("\n")
    if not divergences:
        raise InputsError("there are no batches to compare on")
    every = torch.cat(divergences).double()
    perplexity = [math.exp(-sum_ / labelled) if labelled else None for sum_ in likelihoods]
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


def logits_of(output: Any) -> torch.Tensor:
    """The output's ``logits``, or the first floating-point tensor in it of two dimensions or more; raises
    ``InputsError`` where there is none."""
    found = getattr(output, "logits", None)
    leaves = [found] if isinstance(found, torch.Tensor) else torch.utils._pytree.tree_leaves(output)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() >= 2 and leaf.numel():
            return leaf
    raise InputsError("the output holds no logits, a tensor [..., classes]")


def row_divergences(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """KL(before || after) of each row of logits [..., classes], float32[rows], in nats."""
    rows, others = _flat(before), _flat(after)
    found = [
        # None is below zero but by rounding.
        torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).clamp(min=0.0)
        for p, q in zip(_log_shares(rows), _log_shares(others), strict=True)
    ]
    return torch.cat(found)


def _likelihood(logits: torch.Tensor, targets: torch.Tensor, known: torch.Tensor) -> float:
    """Sum of the logarithms of the shares of ``targets`` [rows], where they are ``known``."""
    total, start = 0.0, 0
    for logs in _log_shares(_flat(logits)):
        piece = slice(start, start + len(logs))
        chosen = logs.gather(-1, targets[piece].clamp(min=0)[:, None])[:, 0]
        total += float(chosen[known[piece]].double().sum())
        start += len(logs)
    return total


def _flat(logits: torch.Tensor) -> torch.Tensor:
    return logits.reshape(-1, logits.shape[-1])


def _log_shares(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logarithms of softmax in float32, some rows at a time."""
    for piece in torch.split(rows, max(1, _PIECE // rows.shape[1])):
        yield torch.log_softmax(piece.float(), -1)


def _tell(done: int, total: int | None, divergences: Sequence[torch.Tensor]) -> None:
    rows = sum(map(len, divergences))
    mean = math.fsum(float(piece.double().sum()) for piece in divergences) / rows
    of = "" if total is None else f" of {total}"
    sys.stderr.write(f"\rgraphopt: comparing: batch {done}{of}, {rows:,} rows, KL {mean:.3g} nats so far")
    sys.stderr.flush()


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
