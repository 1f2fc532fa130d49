"""Tensors in files of the safetensors format, read and written without a package for it.

The format: eight bytes with the length of a header, the header in JSON (dtype, shape and offsets of every
tensor, texts under ``__metadata__``), then the bytes of the tensors
(https://huggingface.co/docs/safetensors). Nothing in it is run when it is read.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["TensorEntry", "TensorsFile", "TensorsFileError", "read_tensors", "write_tensors"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000


class TensorsFileError(ValueError):
    """A file that is not of the format; the message says where."""


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to ``path``, whole or not at all, one after the other; what is not contiguous becomes
    so. Raises ``TensorsFileError`` for a dtype that the format has no name for, and ``OSError``."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TensorsFileError(f"tensor {name!r}: the format has no {tensor.dtype}")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                plain = tensor.detach().cpu().contiguous()
                if plain.numel():
                    stream.write(plain.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is in a file: ``begin`` and ``end`` in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class TensorsFile:
    """A file of the format whose header has been read, and whose tensors are read one by one.

    ``entries`` by name in the order of the file; ``texts`` are those of ``__metadata__``. Raises
    ``TensorsFileError`` for what is not of the format, and ``OSError`` as ``open`` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise TensorsFileError("the header is longer than the file")
            try:
                header: Any = json.loads(stream.read(length))
            except ValueError as error:
                raise TensorsFileError(f"the header is no JSON: {error}") from None
        if not isinstance(header, dict):
            raise TensorsFileError("the header is no object")
        texts = header.pop("__metadata__", {})
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise TensorsFileError("__metadata__ is no object of texts")
        self.texts: dict[str, str] = texts
        self.entries = {name: _entry(name, given, 8 + length, size) for name, given in header.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, on the CPU, of memory of its own."""
        entry = self.entries[name]
        piece = bytearray(entry.nbytes)
        with self.path.open("rb") as stream:
            stream.seek(entry.begin)
            if stream.readinto(piece) != entry.nbytes:
                raise TensorsFileError(f"tensor {name!r}: its bytes are not in the file")
        flat = torch.frombuffer(piece, dtype=torch.uint8) if piece else torch.empty(0, dtype=torch.uint8)
        return flat.view(entry.dtype).view(entry.shape)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file by name, on the CPU, and its texts. Raises as ``TensorsFile`` does."""
    file = TensorsFile(path)
    return {name: file.read(name) for name in file.entries}, file.texts


def _entry(name: str, given: Any, start: int, size: int) -> TensorEntry:
    try:
        dtype, shape = _NAMES[given["dtype"]], tuple(int(n) for n in given["shape"])
        begin, end = map(int, given["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise TensorsFileError(f"tensor {name!r}: {given!r} is no description of one") from None
    least = min(shape, default=0)
    if least < 0 or not 0 <= begin <= end <= size - start or end - begin != math.prod(shape) * dtype.itemsize:
        raise TensorsFileError(f"tensor {name!r}: its bytes are not in the file")
    return TensorEntry(dtype, shape, start + begin, start + end)
