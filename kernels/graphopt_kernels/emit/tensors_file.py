"""How emitted programs read their tensors: a few lines that they carry with them (graphopt.tensors_file)."""

from __future__ import annotations

__all__ = ["READER"]

READER = '''\
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _tensors(path):
    """The tensors of a safetensors file, by name."""
    found = {}
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            stream.seek(8 + length + begin)
            piece = bytearray(stream.read(end - begin))
            flat = torch.frombuffer(piece, dtype=torch.uint8) if piece else torch.empty(0, dtype=torch.uint8)
            found[name] = flat.view(dtype).view(shape)
    return found
'''
