"""Tensors in files of the safetensors format, read and written without a package for it.

The format: eight bytes with the length of a header, the header in JSON (dtype, shape and offsets of every
tensor, texts under ``__metadata__``), then the bytes of the tensors
(https://huggingface.co/docs/safetensors). Nothing in it is run when it is read.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["TensorsFileError", "read_tensors", "write_tensors"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
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
    """Write ``tensors`` to ``path``, whole or not at all; what is not contiguous becomes so."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
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
                    stream.write(plain.view(-1).view(torch.uint8).numpy().tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file by name, on the CPU, and its texts.

    Raises ``TensorsFileError`` for what is not of the format, and ``OSError`` as ``open`` does.
    """
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
        found = {}
        for name, entry in header.items():
            try:
                dtype, shape = _NAMES[entry["dtype"]], [int(n) for n in entry["shape"]]
                begin, end = map(int, entry["data_offsets"])
            except (KeyError, TypeError, ValueError):
                raise TensorsFileError(f"tensor {name!r}: {entry!r} is no description of one") from None
            count = 1
            for n in shape:
                count *= n
            if not 0 <= begin <= end <= size - 8 - length or end - begin != count * dtype.itemsize:
                raise TensorsFileError(f"tensor {name!r}: its bytes are not in the file")
            stream.seek(8 + length + begin)
            piece = bytearray(stream.read(end - begin))
            flat = torch.frombuffer(piece, dtype=torch.uint8) if piece else torch.empty(0, dtype=torch.uint8)
            found[name] = flat.view(dtype).view(shape)
    return found, dict(texts)
