"""bitsandbytes checkpoints of four bits: blocks of a weight that is laid out flat.

    x                                 any dtype   bytes of two codes, the first in the upper half
    x.quant_state.bitsandbytes__nf4   uint8       JSON: quant_type, blocksize, dtype, shape, nested_...
    x.quant_map                       float32[16] levels
    x.absmax                          float32[blocks]; uint8 where scales are rounded too:
    x.nested_absmax                   float32, one for each nested_blocksize of them
    x.nested_quant_map                float32[256]; absmax is map[code] * nested + nested_offset
    weight                            level * absmax

``x`` is the name of the parameter. They become ``nf4``, whose blocks are of 64 and lie in rows: blocks must
divide the inputs into whole ones and be multiples of 64. Scales that were rounded are written out in float32,
the very numbers that bitsandbytes computes. Layout: https://github.com/bitsandbytes-foundation/bitsandbytes
(``QuantState.as_dict``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.errors import CheckpointError
from graphopt.packing.checkpoint import Checkpoint
from graphopt.packing.formats import PackedTensors, StoredWeight, WeightFormat
from graphopt_kernels.quantized.group_products import NF4_LEVELS
from graphopt_kernels.quantized.nf4 import Nf4
from graphopt_kernels.quantized.nibbles import pack_nibbles

__all__ = ["BitsAndBytes"]

_MARK = ".quant_state.bitsandbytes__"
_OPTIONAL = ("nested_absmax", "nested_quant_map")
_BLOCK = 64


@dataclass(frozen=True)
class BitsAndBytes(WeightFormat):
    """No options."""

    name: ClassVar[str] = "bitsandbytes"
    summary: ClassVar[str] = "bitsandbytes NF4: weight, absmax, quant_map, quant_state"

    def find(self, checkpoint: Checkpoint) -> Iterable[StoredWeight]:
        for key in checkpoint.names:
            parameter, mark, kind = key.partition(_MARK)
            if not mark:
                continue
            state = _state(checkpoint, key)
            if kind != "nf4" or state["quant_type"] != "nf4":
                raise CheckpointError(
                    f"{parameter} has quant_type {state['quant_type']!r}: no scheme keeps that, nf4 is read"
                )
            parts = {"state": key, "codes": parameter}
            for name in ("absmax", "quant_map", *_OPTIONAL):
                place = f"{parameter}.{name}"
                if name not in _OPTIONAL or place in checkpoint:
                    parts[name] = place
            n, k = state["shape"]
            yield _checked(checkpoint, StoredWeight(parameter, n, k, parts), state["blocksize"])

    def read(self, stored: StoredWeight, checkpoint: Checkpoint) -> PackedTensors:
        name, n, k = stored.parameter, stored.n, stored.k
        state = _state(checkpoint, stored.parts["state"])
        levels = checkpoint.read(stored.parts["quant_map"])
        if not torch.equal(levels.float(), torch.tensor(NF4_LEVELS)):
            raise CheckpointError(f"{stored.parts['quant_map']} holds other levels than those of nf4")
        flat = checkpoint.read(stored.parts["codes"]).reshape(-1).view(torch.uint8)
        codes = torch.stack((flat >> 4, flat & 15), 1).view(n, k)
        scales = self._scales(stored, checkpoint, state).view(n, -1)
        if not bool(scales.isfinite().all()):
            raise CheckpointError(f"{name}: its scales are not finite")
        words = scales.repeat_interleave(state["blocksize"] // _BLOCK, 1).view(torch.int32)
        packed = {"codes": pack_nibbles(codes, _BLOCK // 2), "words": words}
        return PackedTensors(Nf4(), {**packed, "ranges": scales.new_empty((n, 0))})

    def _scales(self, stored: StoredWeight, checkpoint: Checkpoint, state: dict[str, Any]) -> torch.Tensor:
        """float32[blocks]."""
        absmax = checkpoint.read(stored.parts["absmax"])
        if absmax.dtype is not torch.uint8:
            return absmax.float()
        values = checkpoint.read(stored.parts["nested_quant_map"]).float()[absmax.int()]
        ranges = checkpoint.read(stored.parts["nested_absmax"]).float()
        shared = ranges.repeat_interleave(state["nested_blocksize"])[: absmax.shape[0]]
        return values * shared + torch.tensor(float(state["nested_offset"]))


def _state(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    """What the JSON in a tensor says, as far as it is needed."""
    try:
        found: Any = json.loads(bytes(checkpoint.read(key).view(torch.uint8).tolist()).decode())
        state: dict[str, Any] = {
            "quant_type": str(found["quant_type"]),
            "blocksize": int(found["blocksize"]),
            "shape": tuple(map(int, found["shape"])),
            "nested_blocksize": int(found.get("nested_blocksize", 0)),
            "nested_offset": float(found.get("nested_offset", 0.0)),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{key} is no description of a weight: {error!r}") from None
    if len(state["shape"]) != 2:
        raise CheckpointError(f"{key} is of shape {state['shape']}: expected two dimensions")
    return state


def _checked(checkpoint: Checkpoint, stored: StoredWeight, block: int) -> StoredWeight:
    name, n, k, parts = stored.parameter, stored.n, stored.k, stored.parts
    if block < 1 or block % _BLOCK or k % block:
        raise CheckpointError(
            f"{name} {(n, k)} has blocks of {block}: nf4 keeps multiples of {_BLOCK} that divide the inputs"
        )
    entry, blocks = checkpoint.entry(parts["codes"]), n * k // block
    if entry.nbytes * 2 != n * k:
        raise CheckpointError(f"{name} has {entry.nbytes} bytes of codes: expected {n * k // 2} for {(n, k)}")
    absmax = checkpoint.entry(parts["absmax"])
    if absmax.shape != (blocks,):
        raise CheckpointError(f"{parts['absmax']} has shape {absmax.shape}: expected ({blocks},)")
    levels = checkpoint.entry(parts["quant_map"])
    if levels.shape != (16,):
        raise CheckpointError(f"{parts['quant_map']} has shape {levels.shape}: expected (16,)")
    if absmax.dtype is not torch.uint8:
        return stored
    size = _state(checkpoint, parts["state"])["nested_blocksize"]
    for key, count in (("nested_quant_map", 256), ("nested_absmax", math.ceil(blocks / size) if size else 0)):
        shape = checkpoint.entry(parts.get(key, f"{name}.{key}")).shape
        if shape != (count,):
            raise CheckpointError(f"{name}.{key} has shape {shape}: expected ({count},)")
    return stored
