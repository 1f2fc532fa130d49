"""graphopt's own checkpoints: what the metadata of their files says of packed weights, and back.

A tensor of a packed weight is named after the parameter, as in ``state_dict``: ``layers.0.q.weight.codes``.
The text ``graphopt`` in the metadata of every file is JSON::

    {"schema": "graphopt/weights@1", "graphopt": "0.1.0", "save": "9f0c...",
     "weights": {"layers.0.q.weight": {"scheme": "int4{group=64}", "orientation": "rows",
                 "shape": [4096, 4096], "dtype": "bfloat16", "names": ["layers.0.q.weight"],
                 "tensors": {"codes": "layers.0.q.weight.codes", ...}, "statistics": {}}},
     "aliases": {"head.weight": "embed.weight"}}

``weights`` are those of the file, ``aliases`` names of dense tensors that are other ones. ``save`` is the
same in all files that were written at once, and in their index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import graphopt
from graphopt.errors import CheckpointError, GraphoptError
from graphopt.packing.checkpoint import Checkpoint
from graphopt.packing.convert import matrix_shape
from graphopt.packing.formats import PackedTensors, StoredWeight, WeightFormat
from graphopt.packing.scheme import Scheme
from graphopt.plugins.host import PluginHost

__all__ = ["METADATA", "WEIGHTS_VERSION", "Artefact", "ArtefactWeight", "artefact_text"]

WEIGHTS_VERSION = "graphopt/weights@1"
METADATA = "graphopt"

_AGAIN = "write it again with graphopt.save_weights(...)"
_ORIENTATIONS = ("rows", "columns", "stacked rows", "stacked columns")


@dataclass(frozen=True)
class ArtefactWeight:
    """What is written of a packed weight. ``tensors`` and ``statistics``: names in the file."""

    scheme: str
    orientation: str
    shape: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]
    tensors: Mapping[str, str]
    statistics: Mapping[str, str]


def artefact_text(weights: Mapping[str, ArtefactWeight], aliases: Mapping[str, str], save: str) -> str:
    """The text that goes into the metadata of a file."""
    return json.dumps(
        {
            "schema": WEIGHTS_VERSION,
            "graphopt": graphopt.__version__,
            "save": save,
            "weights": {name: vars(weight) for name, weight in weights.items()},
            "aliases": dict(aliases),
        }
    )


class Artefact(WeightFormat):
    """The format of such checkpoints. ``weights`` by name, ``aliases`` of dense tensors; both are empty for
    checkpoints of others. Raises ``CheckpointError`` for another version, or for files of several saves."""

    name = "graphopt"
    summary = "what graphopt.save_weights wrote"

    def __init__(self, checkpoint: Checkpoint, host: PluginHost) -> None:
        self.host = host
        self.weights: dict[str, ArtefactWeight] = {}
        self.aliases: dict[str, str] = {}
        saves = {}
        if METADATA in self._index(checkpoint):
            saves[checkpoint.path.name] = self._index(checkpoint)[METADATA]
        for name, file in checkpoint.files.items():
            if METADATA in file.texts:
                saves[name] = self._read(name, file.texts[METADATA])
            elif saves:
                raise CheckpointError(f"{name} is of another save than {next(iter(saves))}", hint=_AGAIN)
        other = [name for name, save in saves.items() if save != next(iter(saves.values()))]
        if other:
            raise CheckpointError(f"{other[0]} is of another save than {next(iter(saves))}", hint=_AGAIN)

    def find(self, checkpoint: Checkpoint) -> Iterable[StoredWeight]:
        for name, weight in self.weights.items():
            n, k = matrix_shape(weight.shape, weight.orientation)
            parts = {
                **{f"tensors.{key}": place for key, place in weight.tensors.items()},
                **{f"statistics.{key}": place for key, place in weight.statistics.items()},
            }
            for place in parts.values():
                checkpoint.entry(place)
            self._scheme(name)
            yield StoredWeight(name, n, k, parts)

    def read(self, stored: StoredWeight, checkpoint: Checkpoint) -> PackedTensors:
        weight = self.weights[stored.parameter]
        tensors = {name: checkpoint.read(place) for name, place in weight.tensors.items()}
        return PackedTensors(self._scheme(stored.parameter), tensors)

    def statistics(self, name: str, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """What the weight was packed with, as far as it was kept."""
        return {key: checkpoint.read(place) for key, place in self.weights[name].statistics.items()}

    def _scheme(self, name: str) -> Scheme:
        try:
            return self.host.scheme(self.weights[name].scheme)
        except GraphoptError as error:
            raise CheckpointError(f"{name}: {error.message}", hint=error.hint) from error

    def _index(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        found = checkpoint.index.get("metadata", {})
        return found if isinstance(found, dict) else {}

    def _read(self, file: str, text: str) -> object:
        try:
            found = json.loads(text)
            schema = found["schema"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{file}: its metadata is none of graphopt's", hint=_AGAIN) from None
        if schema != WEIGHTS_VERSION:
            raise CheckpointError(
                f"{file} has schema {schema!r}, this graphopt reads {WEIGHTS_VERSION!r}", hint=_AGAIN
            )
        try:
            for name, given in found["weights"].items():
                self.weights[name] = _weight(given)
            self.aliases.update({str(name): str(other) for name, other in found["aliases"].items()})
            return found["save"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file}: malformed metadata: {error!r}", hint=_AGAIN) from None


def _weight(given: Any) -> ArtefactWeight:
    made = ArtefactWeight(
        str(given["scheme"]),
        str(given["orientation"]),
        tuple(map(int, given["shape"])),
        str(given["dtype"]),
        tuple(map(str, given["names"])),
        {str(name): str(place) for name, place in given["tensors"].items()},
        {str(name): str(place) for name, place in given["statistics"].items()},
    )
    if made.orientation not in _ORIENTATIONS:
        raise ValueError(f"orientation {made.orientation!r}")
    dimensions = {"columns": 2, "rows": len(made.shape)}.get(made.orientation, 3)
    if len(made.shape) != dimensions or len(made.shape) < 2:
        raise ValueError(f"shape {list(made.shape)} of {made.orientation}")
    if not isinstance(getattr(torch, made.dtype, None), torch.dtype):
        raise ValueError(f"dtype {made.dtype!r}")
    return made
