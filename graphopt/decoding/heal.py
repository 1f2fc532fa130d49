"""Trains a model that shares keys and values to predict what the original predicts.

The attention's own weights alone are trained, by the KL of predictions from those of the original
(distillation, arXiv 1503.02531), a batch at a time, so that memory is that of one batch and of Adam's moments
for what is trained. State can be written as it goes, whole or not at all, and training goes on from it.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.capture.inputs import bind_inputs
from graphopt.decoding.shared_model import program_of
from graphopt.errors import InputsError
from graphopt.optimized import Optimized
from graphopt.quality import logits_of
from graphopt.tensors_file import TensorsFileError, read_tensors, write_tensors

__all__ = ["HEAL_VERSION", "Healed", "heal"]

HEAL_VERSION = "graphopt/heal@1"

_WARM_UP = 10
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Healed:
    """``steps`` that were taken in all; KL in nats of the first batch and of the last, before their steps."""

    steps: int
    first: float
    last: float
    trained: tuple[str, ...]


def heal(
    optimized: nn.Module,
    batches: Iterable[Any],
    *,
    reference: nn.Module,
    steps: int,
    rate: float = 3e-4,
    state: str | os.PathLike[str] | None = None,
    every: int = 50,
    progress: Callable[[int, float], None] | None = None,
) -> Healed:
    """Train ``optimized``, which shares keys and values, in place for ``steps`` steps on ``batches``.

    A batch is what ``optimize`` takes as inputs; where there are fewer than steps they are gone through
    again. ``reference`` is the model before. ``rate`` is Adam's, warmed up and brought to 0 along a cosine.
    ``state``: a safetensors file that weights, moments and the step are written to every so many steps, and
    that training goes on from where it exists. ``progress(step, divergence)`` is called after each step.

    Raises ``InputsError`` for a model that does not share, no batches, and a state of another model or run.
    """
    model = optimized._model if isinstance(optimized, Optimized) else optimized
    program = program_of(model)
    if steps < 1 or every < 1:
        raise InputsError(f"heal(steps={steps}, every={every}): expected 1 or more")
    known = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    trained = tuple(name for name in program.attention if name in known)
    held = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in trained:
            # The original's memory stays the original's.
            own[name].data = own[name].detach().clone()
    for name, parameter in own.items():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.Adam([own[name] for name in trained], lr=rate, betas=(0.9, 0.95))
    path = None if state is None else Path(state)
    done = _resume(path, trained, own, optimizer, steps) if path is not None and path.exists() else 0
    rows = list(batches) if not isinstance(batches, (list, tuple)) else batches
    if not rows:
        raise InputsError("heal() is given no batches")
    modes = [(module, module.training) for one in (model, reference) for module in one.modules()]
    model.eval()
    reference.eval()
    first = last = math.nan
    try:
        for step, batch in enumerate(itertools.islice(itertools.cycle(rows), done, steps), done):
            warm = min(1.0, (step + 1) / _WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
            last = _step(model, reference, batch, optimizer, [own[name] for name in trained])
            first = last if math.isnan(first) else first
            if progress is not None:
                progress(step + 1, last)
            elif sys.stderr.isatty():
                sys.stderr.write(f"\rgraphopt: healing: step {step + 1} of {steps}, KL {last:.4g}")
            if path is not None and ((step + 1) % every == 0 or step + 1 == steps):
                _write(path, trained, own, optimizer, step + 1, steps)
    finally:
        for module, mode in modes:
            module.training = mode
        for name, parameter in own.items():
            parameter.requires_grad_(held[name])
            parameter.grad = None
    return Healed(steps, first, last, trained)


def _step(
    model: nn.Module,
    reference: nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
) -> float:
    args, kwargs = bind_inputs(reference, batch)
    kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
    with torch.no_grad():
        wanted = logits_of(reference(*args, **kwargs)).float().log_softmax(-1)
    with torch.enable_grad():
        found = logits_of(model(*args, **kwargs)).float().log_softmax(-1)
        loss = nn.functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return float(loss.detach())


def _write(
    path: Path,
    trained: Sequence[str],
    own: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    steps: int,
) -> None:
    tensors = {}
    for name in trained:
        tensors[f"{name}::weight"] = own[name].detach()
        moments = optimizer.state[own[name]]
        tensors |= {f"{name}::{key}": moments[key] for key in _MOMENTS}
    write_tensors(path, tensors, {"format": HEAL_VERSION, "step": str(step), "steps": str(steps)})


def _resume(
    path: Path,
    trained: Sequence[str],
    own: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> int:
    """Take over what was written; the step to go on from. Raises ``InputsError`` for another model's."""
    try:
        tensors, texts = read_tensors(path)
    except TensorsFileError as error:
        raise InputsError(f"{path} is no state of healing: {error}") from None
    if texts.get("format") != HEAL_VERSION or texts.get("steps") != str(steps):
        raise InputsError(
            f"{path} has format {texts.get('format')!r} and is of a run of {texts.get('steps')} steps: "
            f"expected {HEAL_VERSION!r} and {steps}"
        )
    wanted = {f"{name}::{key}": own[name].shape for name in trained for key in ("weight", *_MOMENTS)}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        other = next(iter(sorted(set(tensors) ^ set(wanted))), next(iter(wanted)))
        raise InputsError(f"{path} is of another model: they differ in {other.partition('::')[0]!r}")
    step = int(texts["step"])
    with torch.no_grad():
        for name in trained:
            own[name].copy_(tensors[f"{name}::weight"])
            moments = {key: tensors[f"{name}::{key}"].to(own[name].device) for key in _MOMENTS}
            optimizer.state[own[name]] = {"step": torch.tensor(float(step)), **moments}
    return step
