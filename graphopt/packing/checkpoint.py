"""Weights on disk: one safetensors file, or several under an index, read tensor by tensor.

An index is JSON as transformers writes it: ``{"weight_map": {"layers.0.q.weight": "model-00001-of-00002.
safetensors", ...}}``, file names beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import CheckpointError, nearest
from graphopt.tensors_file import TensorEntry, TensorsFile, TensorsFileError

__all__ = ["INDEX_SUFFIX", "Checkpoint"]

INDEX_SUFFIX = ".safetensors.index.json"
_CONFIGS = ("quantize_config.json", "quant_config.json", "config.json")


class Checkpoint:
    """Tensors by name, none of them in memory until it is asked for. Files are opened for each, and not held.

    ``path``: a ``.safetensors`` file, an index, or a folder with one of either. ``texts`` are the metadata of
    all files put together, those of earlier files first where they differ; ``files`` by path, as named in
    the index. Raises ``CheckpointError`` for what cannot be read as such, ``OSError`` as ``open`` does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _found(Path(path))
        self.files: dict[str, TensorsFile] = {}
        self._home: dict[str, TensorsFile] = {}
        if self.path.name.endswith(".json"):
            self.index: Mapping[str, Any] = _json(self.path)
            self._read_index()
        else:
            self.index = {}
            file = self._open(self.path)
            self._home = dict.fromkeys(file.entries, file)
        self.texts: dict[str, str] = {}
        for file in self.files.values():
            self.texts = {**file.texts, **self.texts}

    def __contains__(self, name: str) -> bool:
        return name in self._home

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, in the order of the files."""
        return tuple(self._home)

    def entry(self, name: str) -> TensorEntry:
        """dtype and shape of a tensor. Raises ``CheckpointError`` where there is none of that name."""
        return self._file(name).entries[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU. Raises ``CheckpointError`` where it is not there, whole."""
        try:
            return self._file(name).read(name)
        except TensorsFileError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def configuration(self) -> Mapping[str, Any]:
        """What a file beside this one says about how weights were packed: ``quantize_config.json``,
        ``quant_config.json``, or ``quantization_config`` in ``config.json``; empty where there is none."""
        for name in _CONFIGS:
            path = self.path.parent / name
            if not path.is_file():
                continue
            found = _json(path)
            if name == "config.json":
                found = found.get("quantization_config", {})
            if isinstance(found, dict) and found:
                return found
        return {}

    def _file(self, name: str) -> TensorsFile:
        if name not in self._home:
            close = nearest(name, self._home)
            what = f"{self.path} holds no tensor {name!r}"
            raise CheckpointError(what + (f"; the nearest is {close!r}" if close else ""))
        return self._home[name]

    def _open(self, path: Path) -> TensorsFile:
        try:
            file = TensorsFile(path)
        except TensorsFileError as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}") from None
        self.files[path.name] = file
        return file

    def _read_index(self) -> None:
        places = self.index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError(f"{self.path} is no index: expected 'weight_map', names of files by tensor")
        for name in dict.fromkeys(places.values()):
            if Path(name).name != name:
                raise CheckpointError(f"{self.path} names {name!r}: expected a file beside it")
            if not (self.path.parent / name).is_file():
                raise CheckpointError(f"{self.path} names {name!r}, which is not there")
            self._open(self.path.parent / name)
        for tensor, name in places.items():
            file = self.files[name]
            if tensor not in file.entries:
                raise CheckpointError(f"{self.path} puts {tensor!r} into {name}, which does not hold it")
            self._home[tensor] = file


def _found(path: Path) -> Path:
    if not path.is_dir():
        return path
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return indices[0]
    if not indices and len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in indices or files) or "none"
    raise CheckpointError(f"{path} is a folder of several checkpoints, or of none: {found}", hint="name one")


def _json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return found
