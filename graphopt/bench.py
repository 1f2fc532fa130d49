"""Versions of one model side by side: what a step takes of each, measured in turn on models of their own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt import _torch
from graphopt.capture.inputs import bind_inputs
from graphopt.errors import InputsError, UnknownNameError, brief
from graphopt.loss import is_differentiable, loss_of
from graphopt.measure import allocator_peak, synchronize
from graphopt.restored import restored

__all__ = ["PEERS", "BenchRow", "Contender", "bench", "peer"]

PEERS = (
    "torch.compile",
    "torch.compile:reduce-overhead",
    "torch.compile:max-autotune",
    "torch.compile:max-autotune-no-cudagraphs",
)
"""What other versions are known by name; any other is a function of the model."""

Make = Callable[[torch.nn.Module, Any], Callable[..., Any]]


@dataclass(frozen=True)
class Contender:
    """``make(model, inputs)`` gives what is called in the model's place. ``launching(made)``: around the step
    whose memory is watched, for what would else run where no allocator sees it."""

    name: str
    make: Make
    launching: Callable[[Any], AbstractContextManager[None]] = lambda made: nullcontext()


@dataclass(frozen=True)
class BenchRow:
    """What a step took: ``seconds`` is the median of ``samples``, ``first_seconds`` the making and the first
    step, ``peak_bytes`` parameters, buffers and inputs included. ``difference``: the largest one to the first
    contender's outputs, as a share of the largest element; ``None`` if they cannot be compared. ``failed``:
    why there are no figures."""

    name: str
    seconds: float | None = None
    samples: tuple[float, ...] = ()
    first_seconds: float | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    failed: str = ""

    @property
    def spread(self) -> float | None:
        """Distance of the quartiles of the samples, as a share of the median; ``None`` for fewer than two."""
        if len(self.samples) < 2 or not self.seconds:
            return None
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.seconds


def peer(name: str) -> Contender:
    """One of ``PEERS``; raises ``UnknownNameError``."""
    if name not in PEERS:
        raise UnknownNameError("peer", name, PEERS)
    mode = name.partition(":")[2] or None
    return Contender(name, lambda model, inputs: torch.compile(model, mode=mode))


def bench(
    contenders: Sequence[Contender],
    load: Callable[[], tuple[torch.nn.Module, Any]],
    *,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    warmup: int = 3,
    repeats: int = 10,
) -> Iterator[BenchRow]:
    """Measure one contender after the other, each with a model of its own from ``load``.

    Compiled code of the process is forgotten before each, so that none profits by what another compiled. A
    step is a forward, and a backward where the model trains and gradients are on. ``warmup`` steps come first
    and are not timed. One that raises gives a row that says why; that the first, the model as it is, raises
    is the caller's error: ``InputsError``.
    """
    reference: list[torch.Tensor] | None = None
    for contender in contenders:
        torch.compiler.reset()
        try:
            row, outputs = _measured(contender, load, loss_fn, warmup, repeats)
        except Exception as error:
            if reference is None:
                raise InputsError(f"{contender.name} does not run: {brief(error)}") from error
            yield BenchRow(contender.name, failed=brief(error))
            continue
        if reference is None:
            reference = outputs
        yield BenchRow(**{**row, "difference": _difference(outputs, reference)})


def _measured(
    contender: Contender,
    load: Callable[[], tuple[torch.nn.Module, Any]],
    loss_fn: Callable[[Any], torch.Tensor] | None,
    warmup: int,
    repeats: int,
) -> tuple[Mapping[str, Any], list[torch.Tensor]]:
    model, inputs = load()
    args, kwargs = bind_inputs(model, inputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    tensors = [*model.parameters(), *(t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor))]
    device = next((t.device for t in tensors), torch.device("cpu"))
    state = torch.get_rng_state()

    def reset() -> None:
        torch.set_rng_state(state)
        for parameter in parameters:
            parameter.grad = None
        synchronize(device)

    with restored(model, parameters):
        reset()
        start = time.perf_counter()
        made = contender.make(model, inputs)

        def step() -> Any:
            output = made(*args, **kwargs)
            if torch.is_grad_enabled() and model.training and is_differentiable(output):
                torch.autograd.backward(loss_of(output, loss_fn))
            return output

        outputs = [t.detach().clone() for t in pytree.tree_leaves(step()) if isinstance(t, torch.Tensor)]
        synchronize(device)
        first = time.perf_counter() - start
        for _ in range(warmup - 1):
            reset()
            step()
        reset()
        # What was packed or replaced on the way is counted as it is now.
        static = _torch.storage_bytes([*model.parameters(), *model.buffers(), args, kwargs])
        with contender.launching(made):
            peak = static + allocator_peak(step, device)
        samples = []
        for _ in range(repeats):
            reset()
            start = time.perf_counter()
            step()
            synchronize(device)
            samples.append(time.perf_counter() - start)
        reset()
    found = {
        "name": contender.name,
        "seconds": statistics.median(samples),
        "samples": tuple(samples),
        "first_seconds": first,
        "peak_bytes": peak,
    }
    return found, outputs


def _difference(outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float | None:
    if [t.shape for t in outputs] != [t.shape for t in reference]:
        return None
    worst = 0.0
    for ours, theirs in zip(outputs, reference, strict=True):
        if theirs.is_floating_point() and theirs.numel():
            x, y = ours.double(), theirs.double().to(ours.device)
            scale = float(y.abs().max())
            worst = max(worst, float((x - y).abs().max()) / scale if scale else float((x - y).abs().max()))
    return worst
