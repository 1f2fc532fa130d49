"""Parameters, buffers and other tensors of a module: written once each, and put into place again."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt import _torch
from graphopt.artefact.graphs import is_name
from graphopt.artefact.records import SavedState
from graphopt.errors import ArtefactError
from graphopt.tensors_file import TensorsFile, TensorsFileError, write_tensors

__all__ = ["Shell", "Tensors", "checked", "held_tensors", "read_state", "saved_state"]


class Tensors:
    """Tensors for one file, by name; the same one, or another view of the whole of it, is kept once."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def hold(self, tensor: torch.Tensor, name: str) -> str:
        """Put ``tensor`` in under ``name``; the name that it, tied, has already. Raises ``ArtefactError``."""
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) or _torch.is_fake(tensor):
            raise ArtefactError(f"{name} is a {type(tensor).__name__}, which an artefact cannot hold")
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ArtefactError(f"{name} is of layout {tensor.layout} on {tensor.device}")
        place = (
            _torch.storage_key(tensor),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() and place in self._names:
            return self._names[place]
        if tensor.numel():
            overlapping = [known for key, known in self._names.items() if key[0] == place[0]]
            if overlapping:
                raise ArtefactError(
                    f"{name} shares part of its memory with {overlapping[0]}: loaded, they would be apart",
                    hint="give each a tensor of its own",
                )
        self._names[place] = name
        self.by_name[name] = tensor
        return name

    def write(self, path: Path, texts: Mapping[str, str]) -> None:
        """Write all of them as safetensors. Raises ``ArtefactError`` for a dtype that has no name there."""
        try:
            write_tensors(path, self.by_name, texts)
        except TensorsFileError as error:
            raise ArtefactError(f"the weights cannot be written: {error}") from None


def saved_state(model: nn.Module, tensors: Tensors) -> tuple[SavedState, ...]:
    """Every parameter and buffer of ``model``, put into ``tensors``. Raises ``ArtefactError``."""
    state = model.state_dict(keep_vars=True)
    keys: dict[int, list[str]] = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ArtefactError(f"{key} of the model's state is a {type(value).__name__}, no tensor")
        keys.setdefault(id(value), []).append(key)
    found = []
    everything: list[tuple[str, torch.Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for path, tensor in everything:
        known = keys.get(id(tensor), [])
        key = path if path in known else known[0] if known else ""
        if len(known) > 1:
            known.remove(key)
        found.append(
            SavedState(
                path,
                key,
                tensors.hold(tensor, key or path),
                isinstance(tensor, nn.Parameter),
                tensor.requires_grad,
                tuple(tensor.stride()),
                str(tensor.device),
            )
        )
    missing = sorted(set(state) - {entry.key for entry in found})
    if missing:
        raise ArtefactError(f"{missing[0]} of the model's state is neither a parameter nor a buffer of it")
    return tuple(found)


def checked(state: Sequence[SavedState]) -> None:
    """Raise ``ArtefactError`` where a name cannot be that of a parameter or buffer."""
    for entry in state:
        for name in filter(None, (entry.path, entry.key)):
            if not all(part.isdecimal() or is_name(part) for part in name.split(".")):
                raise ArtefactError(f"{name[:80]!r} is no name of a parameter or buffer")


def read_state(path: Path, state: Sequence[SavedState]) -> dict[str, torch.Tensor]:
    """The tensors of ``state`` by path, each as it was in memory, tied ones the same object.

    Raises ``ArtefactError``.
    """
    made: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    file = _file(path)
    for entry in state:
        if entry.tensor not in made:
            if entry.tensor not in file.entries:
                raise ArtefactError(f"{path.name} has no tensor {entry.tensor[:80]!r}")
            value = file.read(entry.tensor)
            if len(entry.stride) != value.dim():
                raise ArtefactError(f"{entry.path} has the strides {list(entry.stride)}")
            try:
                placed = torch.empty_strided(
                    value.shape, entry.stride, dtype=value.dtype, device=_device(entry)
                ).copy_(value)
                made[entry.tensor] = nn.Parameter(placed, entry.trained) if entry.parameter else placed
            except RuntimeError as error:
                raise ArtefactError(f"{entry.path} cannot be made: {error}") from error
        found[entry.path] = made[entry.tensor]
    return found


def held_tensors(path: Path, names: Iterable[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Other tensors of the file, by name, on ``device``. Raises ``ArtefactError``."""
    file = _file(path)
    found = {}
    for name in names:
        if name not in file.entries:
            raise ArtefactError(f"{path.name} has no tensor {name[:80]!r}")
        found[name] = file.read(name).to(device)
    return found


def _file(path: Path) -> TensorsFile:
    try:
        return TensorsFile(path)
    except TensorsFileError as error:
        raise ArtefactError(f"{path.name} is no safetensors: {error}") from None
    except (RecursionError, OverflowError) as error:
        raise ArtefactError(f"{path.name} is no safetensors: {type(error).__name__}") from None


def _device(entry: SavedState) -> torch.device:
    try:
        return torch.device(entry.device)
    except RuntimeError:
        raise ArtefactError(f"{entry.path} is on {entry.device[:40]!r}, which is no device") from None


class Shell(nn.Module):
    """Stands for a model whose code is not there: its parameters and buffers under their names, and a forward
    with the model's ``signature``. Raises ``ArtefactError`` for names that a module cannot have."""

    def __init__(
        self, state: Sequence[SavedState], tensors: Mapping[str, torch.Tensor], signature: inspect.Signature
    ) -> None:
        super().__init__()
        object.__setattr__(self, "forward", _Forward(signature))
        for entry in state:
            owner: nn.Module = self
            *parents, name = (entry.key or entry.path).split(".")
            tensor = tensors[entry.path]
            try:
                for part in parents:
                    inner = owner._modules.get(part)
                    if inner is None:
                        inner = nn.Module()
                        owner.add_module(part, inner)
                    owner = inner
                # What parametrizations leave of a parameter is in no state_dict.
                if isinstance(tensor, nn.Parameter) and entry.key:
                    owner.register_parameter(name, tensor)
                else:
                    owner.register_buffer(name, tensor, persistent=bool(entry.key))
            except KeyError as error:
                raise ArtefactError(f"{entry.path} cannot be put into a module: {error}") from None


class _Forward:
    """The forward of a model whose code is not there."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.__signature__ = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ArtefactError("the code of the model is not part of the artefact: call what graphopt.load gave")
