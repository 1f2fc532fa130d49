"""``load_weights``: a model from a checkpoint whose weights are packed, by graphopt or by others.

::

    model = build()                                     on the meta device, or with any numbers
    graphopt.load_weights(model, "model.safetensors")   packed weights stay packed, dense ones are copied
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.budget import format_bytes
from graphopt.errors import CheckpointError, QuantizationError, nearest
from graphopt.optimized import Optimized
from graphopt.packing.api import discovered
from graphopt.packing.artefact import Artefact
from graphopt.packing.checkpoint import Checkpoint
from graphopt.packing.convert import PackedWeight, install_packed, matrix_shape
from graphopt.packing.discover import Discovery
from graphopt.packing.formats import StoredWeight, WeightFormat, format_text
from graphopt.packing.places import Place, places_of, replace_tensor
from graphopt.packing.scheme import scheme_text
from graphopt.plugins.host import PluginHost, default_host

__all__ = ["FoundWeight", "LoadedWeight", "LoadedWeights", "load_weights", "stored_weights"]

_SHOWN = 5
_BY_ROWS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules of torch whose weight has an output in each row."""


@dataclass(frozen=True)
class LoadedWeight:
    """A packed weight of a checkpoint: ``names`` that the model has it by, the ``format`` that it was found
    in, the ``scheme`` that keeps it, the bytes of its tensors."""

    names: tuple[str, ...]
    format: str
    scheme: str
    bytes: int


@dataclass(frozen=True)
class LoadedWeights:
    """What came of a checkpoint. ``dense``: tensors that were copied, by the model's names; ``missing``:
    those of the model that the checkpoint does not hold; ``unexpected``: the other way round."""

    packed: tuple[LoadedWeight, ...]
    dense: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        kinds: dict[tuple[str, str], list[int]] = {}
        for weight in self.packed:
            kinds.setdefault((weight.format, weight.scheme), []).append(weight.bytes)
        lines = [
            f"{len(sizes)} x {scheme} ({kind}): {format_bytes(sum(sizes))}"
            for (kind, scheme), sizes in kinds.items()
        ]
        lines.append(f"{len(self.dense)} dense")
        lines += [f"missing: {name}" for name in self.missing]
        lines += [f"unexpected: {name}" for name in self.unexpected]
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    inputs: Any = None,
    formats: Sequence[str | WeightFormat] | None = None,
    device: str | torch.device | None = None,
    strict: bool = True,
    plugins: Sequence[object] = (),
) -> LoadedWeights:
    """Load the checkpoint at ``path`` into ``model``, in place: packed weights become packed weights of the
    model, dense tensors are copied and take the dtype of the model's.

    ``path``: a safetensors file, an index (``model.safetensors.index.json``) or a folder with one of them;
    what ``save_weights`` wrote, or a checkpoint in a format that a plugin reads (GPTQ, AutoAWQ, bitsandbytes
    NF4, torchao: docs/quantization.md). Codes, scales and zeros are kept as they are, in the order of
    graphopt's schemes; nothing is rounded again. ``formats`` are those to look for, as they are spelled
    (``"gptq{zeros=v2}"``), by default all.

    Which dimension of a square parameter are its outputs is known of torch's own layers; for others give
    ``inputs``, example inputs as for ``quantize``: what the model does with the parameter tells.
    ``device`` is where tensors of a model on the meta device go, the CPU by default. With ``strict=False``
    missing and unexpected tensors are listed in the result and no error.

    Names, shapes, dtypes and the numbers of packed weights are checked before anything changes: packed
    weights are read twice for it, one at a time.

    Raises ``CheckpointError`` for a file that cannot be read, does not fit the model or holds what no scheme
    does; ``UnknownNameError`` for a format; ``OSError`` as ``open``; with ``inputs``, as ``quantize`` does.
    """
    if isinstance(model, Optimized):
        raise CheckpointError(
            "cannot load packed weights into an optimized model: its programs were made for others",
            hint="load them into the model, and optimize that; load_state_dict takes dense ones",
        )
    host = PluginHost(tuple(plugins)) if plugins else default_host()
    checkpoint = Checkpoint(path)
    own = Artefact(checkpoint, host)
    found = _found(checkpoint, own, _formats(formats, host))
    taken = {key for _, stored in found.values() for key in stored.parts.values()}
    places = places_of(model)
    discovery = None if inputs is None else discovered(model, inputs)
    packed = {name: _target(name, found[name], own, places, discovery) for name in found}
    dense = {key: places[key] for key in checkpoint.names if key not in taken and key in places}
    unexpected = tuple(key for key in checkpoint.names if key not in taken and key not in places)
    given = {*dense, *(name for target in packed.values() for name in target.names)}
    copies = {name: other for name, other in own.aliases.items() if name in places and other in dense}
    have = {places[name].same for name in given | {*copies}}
    missing = tuple(name for name, place in places.items() if place.same not in have)
    if strict and (missing or unexpected):
        raise CheckpointError(_difference(path, missing, unexpected, checkpoint, places))
    for key, place in dense.items():
        _check_dense(checkpoint, key, place)
    for name in copies:
        _check_dense(checkpoint, own.aliases[name], places[name])
    if strict:
        _check_meta(model, places)
    where = torch.device("cpu" if device is None else device)
    for target in packed.values():
        _packed(target, checkpoint, own, torch.device("meta"))
    loaded = []
    for target in packed.values():
        weight = _packed(target, checkpoint, own, where)
        install_packed(model, dict.fromkeys(target.distinct(places), weight))
        size = sum(tensor.nbytes for tensor in weight.packed().values())
        kind = _spelled(target.format)
        loaded.append(LoadedWeight(target.names, kind, scheme_text(weight.scheme), size))
    for key in dense:
        replace_tensor(places, key, checkpoint.read(key), where)
    for name, other in copies.items():
        if places[name].same != places[other].same:
            replace_tensor(places, name, checkpoint.read(other), where)
    return LoadedWeights(tuple(loaded), (*dense, *copies), missing, unexpected)


@dataclass(frozen=True)
class FoundWeight:
    """A packed weight that a checkpoint holds, its ``format`` and the bytes of its tensors there."""

    stored: StoredWeight
    format: str
    bytes: int


def stored_weights(
    path: str | os.PathLike[str], formats: Sequence[str | WeightFormat] | None = None
) -> tuple[list[FoundWeight], int, int]:
    """What the checkpoint at ``path`` holds: packed weights, the number of other tensors, and their bytes. No
    tensor is read. Arguments and errors as for ``load_weights``."""
    host, checkpoint = default_host(), Checkpoint(path)
    own = Artefact(checkpoint, host)
    found = [
        FoundWeight(stored, _spelled(kind), _size(checkpoint, stored.parts.values()))
        for kind, stored in _found(checkpoint, own, _formats(formats, host)).values()
    ]
    taken = {key for weight in found for key in weight.stored.parts.values()}
    dense = [checkpoint.entry(key).nbytes for key in checkpoint.names if key not in taken]
    return found, len(dense), sum(dense)


def _size(checkpoint: Checkpoint, keys: Iterable[str]) -> int:
    return sum(checkpoint.entry(key).nbytes for key in keys)


# --- what is there ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where a packed weight goes: the format that it is of, all names of the model, the parameter that it
    stands for and how that holds it."""

    format: WeightFormat
    stored: StoredWeight
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    orientation: str
    device: torch.device

    def distinct(self, places: Mapping[str, Place]) -> list[str]:
        """One name of each parameter."""
        return list({places[name].same: name for name in reversed(self.names)}.values())


def _spelled(kind: WeightFormat) -> str:
    return kind.name if isinstance(kind, Artefact) else format_text(kind)


def _formats(formats: Sequence[str | WeightFormat] | None, host: PluginHost) -> list[WeightFormat]:
    if formats is None:
        return [cls.configured() for cls in host.weight_formats().values()]
    return [host.weight_format(given) if isinstance(given, str) else given for given in formats]


def _found(
    checkpoint: Checkpoint, own: Artefact, formats: Iterable[WeightFormat]
) -> dict[str, tuple[WeightFormat, StoredWeight]]:
    """Packed weights by the parameter that they stand for."""
    found: dict[str, tuple[WeightFormat, StoredWeight]] = {}
    takers: dict[str, WeightFormat] = {}
    for kind in (own, *formats):
        for stored in kind.find(checkpoint):
            for key in stored.parts.values():
                if takers.setdefault(key, kind) is not kind:
                    raise CheckpointError(
                        f"{key} is of the formats {takers[key].name} and {kind.name}",
                        hint="say which with formats=",
                    )
            found[stored.parameter] = kind, stored
    return found


def _target(
    name: str,
    given: tuple[WeightFormat, StoredWeight],
    own: Artefact,
    places: Mapping[str, Place],
    discovery: Discovery | None,
) -> _Target:
    kind, stored = given
    written = own.weights[name] if kind is own else None
    wanted = (name,) if written is None else written.names
    names = [wanted_name for wanted_name in wanted if wanted_name in places]
    if not names:
        close = nearest(name, places)
        raise CheckpointError(
            f"the checkpoint holds {name} ({kind.name}), the model has no parameter of that name"
            + (f"; the nearest is {close!r}" if close else "")
        )
    first = places[names[0]]
    # All that the model ties to them.
    same = {places[other].same for other in names}
    names += [other for other, place in places.items() if place.same in same and other not in names]
    if not isinstance(first.tensor, nn.Parameter) or not first.tensor.is_floating_point():
        raise CheckpointError(f"{name} is packed, and in the model no parameter of floating point")
    if first.packed is not None:
        raise CheckpointError(
            f"{name} is packed already, as {scheme_text(first.packed.scheme)}",
            hint="load packed weights into the model as it was built",
        )
    shape, dtype = tuple(first.tensor.shape), first.tensor.dtype
    if written is not None:
        orientation = written.orientation
        saved = getattr(torch, written.dtype)
        if (shape, dtype) != (written.shape, saved):
            raise CheckpointError(
                f"{name} was saved as {saved} {written.shape}, the model has {dtype} {shape}"
            )
    else:
        orientation = _orientation(name, stored, first, discovery)
    for other in names:
        if tuple(places[other].tensor.shape) != shape or places[other].tensor.dtype is not dtype:
            raise CheckpointError(f"{other} was tied to {name}, and has another shape or dtype in the model")
    return _Target(kind, stored, tuple(names), shape, dtype, orientation, first.tensor.device)


def _orientation(name: str, stored: StoredWeight, place: Place, discovery: Discovery | None) -> str:
    shape, size = tuple(place.tensor.shape), (stored.n, stored.k)
    found = [
        kind
        for kind in ("rows", "columns")
        if (kind == "rows" or len(shape) == 2) and len(shape) >= 2 and matrix_shape(shape, kind) == size
    ]
    if not found:
        raise CheckpointError(
            f"{name} has {stored.n} outputs of {stored.k} inputs in the checkpoint, {shape} in the model"
        )
    if discovery is not None:
        weight = discovery.weight(name)
        if weight is None:
            why = {item.name: item.reason for item in discovery.refused}.get(name)
            raise CheckpointError(f"{name} cannot be packed: {why or 'the model does not read it'}")
        if weight.orientation not in found:
            read = weight.orientation
            raise CheckpointError(
                f"{name} is held by {found[0]} in the checkpoint, the model reads it by {read}"
            )
        return weight.orientation
    if len(found) == 1 or isinstance(place.owner, _BY_ROWS):
        return found[0]
    raise CheckpointError(
        f"{name} is square, and {type(place.owner).__name__} does not say which side its outputs are",
        hint="give example inputs: load_weights(model, path, inputs=...)",
    )


def _check_dense(checkpoint: Checkpoint, key: str, place: Place) -> None:
    entry, tensor = checkpoint.entry(key), place.tensor
    shape = tuple(tensor.shape) if place.packed is None else place.packed.shape
    if entry.shape != shape:
        raise CheckpointError(f"{key} has shape {entry.shape} in the checkpoint and {shape} in the model")
    if entry.dtype.is_floating_point != tensor.is_floating_point():
        raise CheckpointError(
            f"{key} is {entry.dtype} in the checkpoint and {tensor.dtype} in the model",
            hint="packed weights in a format that no plugin reads look so"
            if tensor.is_floating_point()
            else "",
        )


def _difference(
    path: object,
    missing: Sequence[str],
    unexpected: Sequence[str],
    checkpoint: Checkpoint,
    places: Mapping[str, Place],
) -> str:
    lines = [f"{path} does not fit the model"]
    for what, names, others in (
        ("not in the checkpoint", missing, unexpected or checkpoint.names),
        ("not in the model", unexpected, missing or tuple(places)),
    ):
        for name in names[:_SHOWN]:
            close = nearest(name, others)
            lines.append(f"{what}: {name}" + (f"; the nearest is {close!r}" if close else ""))
        if len(names) > _SHOWN:
            lines.append(f"{what}: {len(names) - _SHOWN} more")
    return "\n".join(lines)


# --- into the model ---------------------------------------------------------------------------------


def _packed(target: _Target, checkpoint: Checkpoint, own: Artefact, where: torch.device) -> PackedWeight:
    device = where if "meta" in (target.device.type, where.type) else target.device
    name = target.stored.parameter
    read = target.format.read(target.stored, checkpoint)
    statistics = own.statistics(name, checkpoint) if target.format is own else {}
    try:
        made = PackedWeight.holding(
            read.scheme,
            read.tensors,
            target.shape,
            target.dtype,
            target.orientation,
            {key: value.to(device) for key, value in statistics.items()},
        )
    except QuantizationError as error:
        raise CheckpointError(f"{name}: {error.message}", hint=error.hint) from error
    return made.to(device)


def _check_meta(model: nn.Module, places: Mapping[str, Place]) -> None:
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in places]
    if left:
        raise CheckpointError(
            f"{left[0]} is on the device meta, and no checkpoint holds it: it is a buffer that is not saved",
            hint="build the model with its buffers on a device: only parameters need to be on meta",
        )
