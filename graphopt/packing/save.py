"""``save_weights``: a model with packed weights as safetensors.

::

    graphopt.save_weights(model, "model.safetensors")
    model.safetensors                        or, above ``shard`` bytes,
    model-00001-of-00002.safetensors, ..., model.safetensors.index.json
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from graphopt.atomic import write_atomically
from graphopt.budget import parse_bytes
from graphopt.errors import CheckpointError
from graphopt.packing.artefact import METADATA, ArtefactWeight, artefact_text
from graphopt.packing.checkpoint import INDEX_SUFFIX
from graphopt.packing.convert import PackedWeight, converted
from graphopt.packing.scheme import scheme_text
from graphopt.tensors_file import TensorsFileError, write_tensors

__all__ = ["save_weights", "written_weight"]

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Unit:
    """What has to be in one file: a dense tensor, or all tensors of a packed weight."""

    tensors: Mapping[str, torch.Tensor]
    weights: Mapping[str, ArtefactWeight]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def save_weights(model: nn.Module, path: str | os.PathLike[str], *, shard: int | str = "5GiB") -> Path:
    """Write all parameters and buffers of ``model``, packed ones as they are packed, to ``path``, which ends
    in ``.safetensors``; returns what ``load_weights`` takes.

    Where they take more than ``shard`` bytes (an int or ``"5GiB"``) they go into several files beside
    ``path`` and an index, whose path is returned; a packed weight is always in one. Files are put in place
    when all are whole; the index comes last, and files of two saves are told apart when they are read. Tied
    weights are written once. Dense tensors are written as any program reads them.

    Raises ``CheckpointError`` for another suffix, for a model on the meta device and for state that is no
    tensor; ``BudgetSyntaxError`` for ``shard``; ``OSError`` as ``open``.
    """
    target, limit = Path(path), parse_bytes(shard)
    if not target.name.endswith(_SUFFIX):
        raise CheckpointError(f"cannot write {target.name}: expected a name that ends in {_SUFFIX}")
    units, aliases = _units(model)
    files = _files(units, limit)
    save = secrets.token_hex(8)
    stem = target.name.removesuffix(_SUFFIX)
    names = [target.name]
    if len(files) > 1:
        count = len(files)
        names = [f"{stem}-{number:05d}-of-{count:05d}{_SUFFIX}" for number in range(1, count + 1)]
    _write(target.parent, names, files, aliases, save)
    if len(files) == 1:
        return target
    places = {
        key: name for name, file in zip(names, files, strict=True) for unit in file for key in unit.tensors
    }
    size = sum(unit.nbytes for unit in units)
    index = target.with_name(f"{stem}{INDEX_SUFFIX}")
    content = {"metadata": {"total_size": size, METADATA: save}, "weight_map": places}
    write_atomically(index, json.dumps(content, indent=1) + "\n")
    return index


def _units(model: nn.Module) -> tuple[list[_Unit], dict[str, str]]:
    """What there is to write, and names of dense tensors that are others."""
    state = model.state_dict(keep_vars=True)
    packed: dict[int, tuple[PackedWeight, list[str]]] = {}
    for name, _, _, weight in converted(model):
        packed.setdefault(id(weight), (weight, []))[1].append(name)
    inner = {f"{name}.{key}" for weight, names in packed.values() for name in names for key in weight.names}
    dense: dict[int, str] = {}
    aliases: dict[str, str] = {}
    units = []
    for name, tensor in state.items():
        if name in inner:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"cannot write {name}: it is {type(tensor).__name__}, no tensor")
        first = dense.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
        else:
            units.append(_Unit({name: tensor.detach()}, {}))
    units += [_packed_unit(weight, names) for weight, names in packed.values()]
    for unit in units:
        for name, tensor in unit.tensors.items():
            if tensor.is_meta:
                raise CheckpointError(f"cannot write {name}: it is on the device meta and holds no numbers")
            if tensor.layout is not torch.strided:
                raise CheckpointError(f"cannot write {name}: its layout is {tensor.layout}")
    return units, aliases


def _packed_unit(weight: PackedWeight, names: Sequence[str]) -> _Unit:
    written, held = written_weight(weight, names), weight.packed()
    found = {place: held[key] for key, place in written.tensors.items()}
    found |= {place: weight.statistics[key] for key, place in written.statistics.items()}
    return _Unit(found, {names[0]: written})


def written_weight(weight: PackedWeight, names: Sequence[str]) -> ArtefactWeight:
    """What is written of a packed weight that the model has under ``names``."""
    first = names[0]
    return ArtefactWeight(
        scheme_text(weight.scheme),
        weight.orientation,
        weight.shape,
        str(weight.dtype).removeprefix("torch."),
        tuple(names),
        {key: f"{first}.{key}" for key in weight.names},
        {key: f"{first}.statistics.{key}" for key in weight.statistics},
    )


def _files(units: Sequence[_Unit], limit: int) -> list[list[_Unit]]:
    """Units in order, as many in a file as are within ``limit``, one at least."""
    files: list[list[_Unit]] = [[]]
    size = 0
    for unit in units:
        if files[-1] and size + unit.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(unit)
        size += unit.nbytes
    return files


def _write(
    folder: Path,
    names: Sequence[str],
    files: Sequence[Sequence[_Unit]],
    aliases: Mapping[str, str],
    save: str,
) -> None:
    """All files beside where they belong, then into place."""
    written: list[tuple[Path, Path]] = []
    try:
        for number, (name, file) in enumerate(zip(names, files, strict=True)):
            tensors = {key: tensor for unit in file for key, tensor in unit.tensors.items()}
            weights = {key: weight for unit in file for key, weight in unit.weights.items()}
            text = artefact_text(weights, {} if number else aliases, save)
            beside = folder / f".{name}.{save}.tmp"
            written.append((beside, folder / name))
            try:
                write_tensors(beside, tensors, {"format": "pt", METADATA: text})
            except TensorsFileError as error:
                raise CheckpointError(f"cannot write {name}: {error}") from None
        for beside, place in written:
            os.replace(beside, place)
    finally:
        for beside, _ in written:
            beside.unlink(missing_ok=True)
