"""What the inputs of weights look like: running sums over batches, kept in files without code.

::

    calibration = graphopt.calibrate(model, batches)
    calibration.save("model.calibration")
    calibration = graphopt.Calibration.load("model.calibration")
    graphopt.quantize(model, inputs, weights="40%", calibration=calibration)

Batches run through the captured programs operator by operator, so that inputs are seen wherever a weight is
read, whatever module it belongs to. Nothing but sums is kept from one batch to the next.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from graphopt.capture.inputs import bind_inputs
from graphopt.errors import GraphoptError, InputsError, QuantizationError, UnknownNameError, brief
from graphopt.loss import loss_of
from graphopt.packing.curvature import hessian_traces
from graphopt.packing.discover import Read
from graphopt.packing.divergence import swap_divergences
from graphopt.packing.layers import LayerChanges
from graphopt.packing.moments import Sums
from graphopt.packing.trace import Tracer
from graphopt.restored import restored
from graphopt.tensors_file import TensorsFileError, read_tensors, write_tensors

__all__ = ["CALIBRATION_VERSION", "OBSERVERS", "Calibration", "calibrate"]

CALIBRATION_VERSION = "graphopt/calibration@1"

OBSERVERS = MappingProxyType(
    {
        "moments": "largest and mean squared input of each channel, mean squared output",
        "gram": "mean products of pairs of input channels, float32[K,K]",
        "gradients": "mean squared gradient of the loss with respect to each output",
        "relevance": "mean size of each output times the gradient of the loss with respect to it",
        "change": "cosine distance between input and output of the layer that a weight is in",
        "curvature": "trace of the Hessian of the loss with respect to a weight",
        "divergence": "KL of predictions where a weight alone is rounded, on the first batch",
    }
)
"""What ``calibrate`` can observe, by name."""

_SEPARATOR = "::"


@dataclass(frozen=True)
class Calibration:
    """Statistics by weight and name, on the CPU.

    Of every weight [N, K] that was read (G blocks of rows that read inputs of their own, mostly 1):

    - ``tokens`` int64[]: rows of inputs that were seen
    - ``amax`` float32[K]: largest input in size, of each channel
    - ``second-moment`` float32[G, K]: mean square of the inputs of each channel
    - ``energy`` float32[]: mean over rows of the sum of squared results
    - ``reads`` float32[N]: look-ups of each row (tables)
    - ``gram`` float32[K, K]: mean of x x^T
    - ``output-gradient`` float32[N]: mean squared gradient of each output, of losses as they are
    - ``relevance`` float32[N]: mean of |y dL/dy| of each output
    - ``change`` float32[]: mean of 1 - cosine of what enters and what leaves the layer
    - ``trace`` float32[]: mean over batches of the trace of the Hessian, by element of the weight
    - ``divergence`` float32[]: mean KL of predictions, in nats, where this weight alone is rounded by
      ``graphopt.packing.divergence.probe``
    """

    statistics: Mapping[str, Mapping[str, torch.Tensor]]
    batches: int
    observers: tuple[str, ...]

    def of(self, name: str) -> Mapping[str, torch.Tensor]:
        """Statistics of a weight by its name, the first of tied ones; nothing for one that was not read."""
        return self.statistics.get(name, {})

    def for_packing(self, name: str) -> dict[str, torch.Tensor]:
        """The same as schemes get them (``Scheme.pack``): one ``second-moment`` [K] for all rows, ``amax`` as
        ``largest``."""
        found = dict(self.of(name))
        if "amax" in found:
            found["largest"] = found.pop("amax")
        if "second-moment" in found:
            found["second-moment"] = found["second-moment"].mean(0)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with a version, whole or not at all. Raises ``OSError`` as ``open``."""
        tensors = {
            f"{name}{_SEPARATOR}{statistic}": value
            for name, found in self.statistics.items()
            for statistic, value in found.items()
        }
        texts = {
            "format": CALIBRATION_VERSION,
            "batches": str(self.batches),
            "observers": ",".join(self.observers),
        }
        write_tensors(Path(path), tensors, texts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """What ``save`` wrote. Raises ``QuantizationError`` for another file or version."""
        try:
            tensors, texts = read_tensors(Path(path))
        except TensorsFileError as error:
            raise QuantizationError(f"{path} is no calibration: {error}") from None
        if texts.get("format") != CALIBRATION_VERSION:
            raise QuantizationError(
                f"{path} has format {texts.get('format')!r}, this graphopt reads {CALIBRATION_VERSION!r}",
                hint="make it again with graphopt.calibrate(...)",
            )
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            name, _, statistic = key.rpartition(_SEPARATOR)
            found.setdefault(name, {})[statistic] = value
        try:
            batches = int(texts["batches"])
        except (KeyError, ValueError):
            raise QuantizationError(f"{path} does not say of how many batches it is") from None
        observers = tuple(name for name in texts.get("observers", "").split(",") if name)
        return cls(found, batches, observers)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    observers: Sequence[str] = ("moments",),
    gram: Sequence[str] | None = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    samples: int = 1,
    progress: bool | None = None,
) -> Calibration:
    """Run ``batches`` through ``model`` and keep statistics of the inputs of every weight.

    A batch is what ``optimize`` takes as inputs: a tuple of positional or a dict of keyword arguments. The
    model runs in evaluation mode and is put back as it was: mode, buffers, gradients, random state.
    ``observers`` are names of ``OBSERVERS``. ``gram`` names the weights of which ``"gram"`` is kept, all that
    products read by default. ``"gradients"``, ``"relevance"`` and ``"curvature"`` need a loss: the output's
    ``loss`` or ``loss_fn(output)``; they take a backward, the second one two for each of ``samples`` random
    vectors. ``"divergence"`` needs logits, as ``graphopt.quality`` finds them, and takes a forward of the
    first batch for each weight. ``progress`` writes to stderr how far it is, by default where that is a
    terminal.

    Raises ``UnknownNameError`` for an observer or a weight of ``gram``, ``InputsError`` for no batches, one
    without elements or with NaN or infinity in it, and one that the model refuses, and ``QuantizationError``
    where no weight was read, or what one reads is not finite.
    """
    for name in observers:
        if name not in OBSERVERS:
            raise UnknownNameError("observer", name, OBSERVERS)
    known = [name for name, _ in model.named_parameters()]
    for name in gram or ():
        if name not in known:
            raise UnknownNameError("parameter", name, known)
    told = sys.stderr.isatty() if progress is None else progress
    run = _Run(model, observers, None if gram is None else frozenset(gram), loss_fn, samples, told)
    modes = [(module, module.training) for module in model.modules()]
    leaves = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        with restored(model, leaves):
            for index, batch in enumerate(batches):
                run.take(index, batch)
                if told:
                    sys.stderr.write(f"\rgraphopt: calibrating: batch {index + 1}, {run.tokens} rows")
                    sys.stderr.flush()
    finally:
        for module, mode in modes:
            module.training = mode
        if told and run.batches:
            sys.stderr.write("\n")
    return run.result()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        observers: Sequence[str],
        gram: frozenset[str] | None,
        loss_fn: Callable[[Any], torch.Tensor] | None,
        samples: int,
        told: bool,
    ) -> None:
        self.model, self.observers, self.loss_fn, self.samples = model, tuple(observers), loss_fn, samples
        self.gram = gram
        self.sums: dict[str, Sums] = {}
        self.traces: dict[str, float] = {}
        self.orientations: dict[str, str] = {}
        self.divergences: dict[str, float] = {}
        self.told = told
        self.batches = 0
        self.tracer = Tracer(model, self._watch)
        self.changes = LayerChanges(model) if "change" in observers else None

    @property
    def differentiates(self) -> bool:
        return "gradients" in self.observers or "relevance" in self.observers

    @property
    def tokens(self) -> int:
        return max((sums.tokens for sums in self.sums.values()), default=0)

    def take(self, index: int, batch: Any) -> None:
        _check(index, batch)
        try:
            args, kwargs = bind_inputs(self.model, batch)
        except InputsError as error:
            raise InputsError(f"batch {index}: {error.message}", hint=error.hint) from None
        try:
            if self.differentiates:
                self._backward(args, kwargs)
            else:
                with torch.no_grad():
                    self.tracer(*args, **kwargs)
            if self.changes is not None:
                with torch.no_grad(), self.changes.watching():
                    self.model(*args, **kwargs)
            if "curvature" in self.observers:
                names = [name for name, p in self.model.named_parameters() if name in self.sums]
                found = hessian_traces(self.model, names, args, kwargs, self.loss_fn, self.samples)
                for name, trace in found.items():
                    self.traces[name] = self.traces.get(name, 0.0) + trace
            if "divergence" in self.observers and not self.batches:
                tell = _tell_divergence if self.told else None
                self.divergences = swap_divergences(self.model, self.orientations, args, kwargs, tell)
        except GraphoptError:
            raise
        except Exception as error:
            raise InputsError(f"batch {index}: the model does not run with it: {brief(error)}") from error
        self.batches += 1

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward and backward, no gradient of any parameter made."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad():
                output = self.tracer(*args, **kwargs)
                torch.autograd.backward(loss_of(output, self.loss_fn))
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _watch(self, read: Read, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        sums = []
        for name, span in itertools.zip_longest(read.members, read.spans):
            wanted = "gram" in self.observers and (self.gram is None or name in self.gram)
            sums.append((self.sums.setdefault(name, Sums(gram=wanted)), span))
            own = result.detach() if len(read.members) == 1 else result.detach()[..., slice(*span)]
            sums[-1][0].add(read, x.detach(), own)
            self.orientations.setdefault(name, read.orientation)
        if not self.differentiates or not result.is_floating_point():
            return result
        if not result.requires_grad:
            result = result.detach().requires_grad_()
        for one, span in sums:
            hook = one.gradient_hook(read, span, result.detach() if "relevance" in self.observers else None)
            result.register_hook(hook)  # type: ignore[no-untyped-call]
        return result

    def result(self) -> Calibration:
        if not self.batches:
            raise InputsError("there are no batches to calibrate with")
        if not self.sums:
            why = "; ".join(dict.fromkeys(self.tracer.diagnostics))
            raise QuantizationError(
                "no weight was read in any captured program" + (f": {why}" if why else "")
            )
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, sums in self.sums.items():
            found[name] = sums.statistics()
            if self.changes is not None and (change := self.changes.of(name)) is not None:
                found[name]["change"] = torch.tensor(change)
            if name in self.traces:
                found[name]["trace"] = torch.tensor(self.traces[name] / self.batches)
            if name in self.divergences:
                found[name]["divergence"] = torch.tensor(self.divergences[name])
            for statistic, value in found[name].items():
                if not bool(torch.isfinite(value).all()):
                    raise QuantizationError(f"{name}: what it reads is not finite ({statistic})")
        return Calibration(found, self.batches, self.observers)


def _tell_divergence(done: int, count: int) -> None:
    sys.stderr.write(f"\rgraphopt: calibrating: batch 1, weight {done} of {count}")
    sys.stderr.flush()


def _check(index: int, batch: Any) -> None:
    """Raise ``InputsError`` for a batch without elements, or with numbers that are none."""
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if _is_sequence(batch) else ()
    tensors = [
        (f"input {key!r}", leaf)
        for key, value in items
        for leaf in torch.utils._pytree.tree_leaves(value)
        if isinstance(leaf, torch.Tensor)
    ]
    if _is_sequence(batch) and not tensors:
        raise InputsError(f"batch {index} holds no tensor")
    for what, tensor in tensors:
        if not tensor.numel():
            raise InputsError(f"batch {index}: {what} of shape {tuple(tensor.shape)} has no elements")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            raise InputsError(f"batch {index}: {what} holds {kind}")


def _is_sequence(batch: Any) -> bool:
    return isinstance(batch, (Mapping, tuple, list))
