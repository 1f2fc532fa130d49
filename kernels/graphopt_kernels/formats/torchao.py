"""torchao checkpoints: tensor subclasses taken apart, and put in words in the metadata.

    0._weight_qdata, 0._weight_scale, ...     tensors of the parameter 0.weight
    metadata["0.weight"]                      {"_type": "Int8Tensor", "_data": {"block_size": [1, 64], ...},
                                               "_tensor_data_names": ["qdata", "scale"]}

What is read of ``torchao.prototype.safetensors`` (0.18, https://github.com/pytorch/ao):

    Int8Tensor                 int8[N, K], a scale a row or one for all, zeros 0    int8, int8-dynamic
    Float8Tensor               float8_e4m3fn[N, K], the same                        fp8, fp8-dynamic
    IntxUnpackedToInt8Tensor   int8[N, K] of 1 to 8 bits; groups of up to 4 bits    int4, int8
    Int4Tensor                 two in a byte, the first in the lower half, signed;
                               code * scale + zero_point [K / group, N]             int4-offset, int4
    Int4TilePackedTo4dTensor   int32[N / 8, K / 16 / I, 32, I / 2], in the order of tensor cores;
                               (code - 8) * scale + zero [K / group, N, 2]; N and K filled up      the same

Inputs that torchao rounds by row are rounded by the dynamic schemes, which divide by 127, torchao by
127.5. The order of tiles is that of ``_convert_weight_to_int4pack`` of torch (``int4mm.cu``). The tensors of
``Int4PlainInt32Tensor``, ``MXTensor`` and ``NVFP4Tensor`` are laid out for one kind of device, or hold what
no scheme keeps: they are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.errors import CheckpointError
from graphopt.packing.checkpoint import Checkpoint
from graphopt.packing.formats import PackedTensors, StoredWeight, WeightFormat
from graphopt_kernels.formats.int32_codes import group_tensors, kept_group
from graphopt_kernels.quantized.dynamic import Fp8Dynamic, Int8Dynamic
from graphopt_kernels.quantized.fp8 import Fp8
from graphopt_kernels.quantized.int4_offset import Int4Offset
from graphopt_kernels.quantized.int8 import Int8

__all__ = ["TorchAo"]

_MIDDLE = 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_TILES = "Int4TilePackedTo4dTensor"
_Data = Mapping[str, Any]
_Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TorchAo(WeightFormat):
    """No options."""

    name: ClassVar[str] = "torchao"
    summary: ClassVar[str] = "torchao: tensor subclasses, taken apart"

    def find(self, checkpoint: Checkpoint) -> Iterable[StoredWeight]:
        for name in checkpoint.texts:
            described = _described(checkpoint, name)
            if described is None:
                continue
            kind, data, parts = described
            if kind not in _READERS:
                raise CheckpointError(
                    f"{name} is a {kind} of torchao: no scheme keeps that, {', '.join(_READERS)} are read"
                )
            shape = checkpoint.entry(parts["qdata"]).shape
            if kind == "Int4Tensor" and len(shape) == 2:
                shape = (shape[0], 2 * shape[1])
            if kind == _TILES:
                shape = _filled(shape, data.get("shape"))
            if len(shape) != 2 or list(data.get("shape", shape)) != list(shape):
                raise CheckpointError(
                    f"{parts['qdata']} is of a weight {tuple(shape)}: expected two dimensions, as of {name}"
                )
            yield StoredWeight(name, *shape, parts)

    def read(self, stored: StoredWeight, checkpoint: Checkpoint) -> PackedTensors:
        described = _described(checkpoint, stored.parameter)
        assert described is not None
        kind, data, _ = described
        tensors = {name: checkpoint.read(key) for name, key in stored.parts.items()}
        for name, tensor in tensors.items():
            wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            if not bool(wide.isfinite().all()):
                raise CheckpointError(f"{stored.parameter}: its {name} is not finite")
        for name in ("act_pre_scale", "act_quant_scale", "act_quant_zero_point"):
            if name in tensors:
                raise CheckpointError(f"{stored.parameter} has {name}: no scheme scales inputs so")
        return _READERS[kind](stored, data, tensors)


def _filled(shape: tuple[int, ...], real: Any) -> tuple[int, ...]:
    """The shape that a weight has without what tiles are filled up with; ``shape`` where it cannot be."""
    if len(shape) != 4 or shape[2] != 32 or not isinstance(real, list) or len(real) != 2:
        return shape
    n, k = map(int, real)
    return (n, k) if 0 < n <= 8 * shape[0] < n + 8 and 0 < k <= 32 * shape[1] * shape[3] else shape


def _described(checkpoint: Checkpoint, name: str) -> tuple[str, _Data, dict[str, str]] | None:
    """Class, attributes and names of tensors of a parameter; ``None`` for other texts and dense tensors."""
    try:
        found = json.loads(checkpoint.texts[name])
    except ValueError:
        return None
    if not isinstance(found, dict) or found.get("_type") in (None, "Tensor"):
        return None
    data, names = found.get("_data"), found.get("_tensor_data_names")
    if not isinstance(data, dict) or not isinstance(names, list) or "qdata" not in names:
        raise CheckpointError(f"the metadata of {name} is no description of a tensor of torchao")
    module, _, attribute = name.rpartition(".")
    parts = {part: f"{module}._{attribute}_{part}" for part in names}
    for key in parts.values():
        checkpoint.entry(key)
    return str(found["_type"]), data, parts


def _int8(stored: StoredWeight, data: _Data, tensors: _Tensors) -> PackedTensors:
    _expect_zeros(stored, tensors)
    packed = {"codes": _codes(stored, tensors, torch.int8), "scales": _by_row(stored, tensors["scale"])}
    if not _rounds_inputs(stored, data):
        return PackedTensors(Int8(), packed)
    return PackedTensors(Int8Dynamic(), {**packed, "factors": torch.empty(0)})


def _float8(stored: StoredWeight, data: _Data, tensors: _Tensors) -> PackedTensors:
    packed = {
        "codes": _codes(stored, tensors, torch.float8_e4m3fn),
        "scales": _by_row(stored, tensors["scale"]),
    }
    if not _rounds_inputs(stored, data):
        return PackedTensors(Fp8(), packed)
    return PackedTensors(Fp8Dynamic(), {**packed, "factors": torch.empty(0)})


def _intx(stored: StoredWeight, data: _Data, tensors: _Tensors) -> PackedTensors:
    if data.get("activation_quantization") is not None:
        raise CheckpointError(f"{stored.parameter} rounds its inputs to int8 with zeros: no scheme does")
    codes, scale = _codes(stored, tensors, torch.int8), tensors["scale"]
    wanted = stored.n, scale.shape[-1] if scale.dim() else 0
    if scale.shape != wanted or not scale.shape[1] or stored.k % scale.shape[1]:
        raise CheckpointError(
            f"{stored.parameter}: its scale has shape {tuple(scale.shape)}: expected ({stored.n}, groups)"
        )
    zeros = tensors["zero_point"]
    if zeros.shape != scale.shape:
        raise CheckpointError(
            f"{stored.parameter}: its zero_point has shape {tuple(zeros.shape)}, scale {tuple(scale.shape)}"
        )
    if codes.numel() == 0 or (int(codes.min()) >= -_MIDDLE and int(codes.max()) < _MIDDLE):
        unsigned = (codes + _MIDDLE).to(torch.uint8)
        if kept_group(stored.k // scale.shape[1]) is not None:
            return group_tensors(stored.parameter, unsigned, scale, zeros.float() + _MIDDLE)
    if scale.shape[1] > 1:
        raise CheckpointError(
            f"{stored.parameter} is of {data.get('target_dtype', {}).get('_data')} in groups of "
            f"{stored.k // scale.shape[1]}: no scheme keeps those, int4 has groups of 32, 64 and 128 and "
            "int8 a scale an output"
        )
    _expect_zeros(stored, tensors)
    return PackedTensors(Int8(), {"codes": codes, "scales": _by_row(stored, scale)})


def _int4(stored: StoredWeight, data: _Data, tensors: _Tensors) -> PackedTensors:
    rounded = data.get("activation_dtype")
    if rounded is not None and rounded.get("_data") != "bfloat16":
        raise CheckpointError(
            f"{stored.parameter} rounds its inputs to {rounded.get('_data')}: no scheme of four bits does"
        )
    packed, scale, offset = tensors["qdata"], tensors["scale"], tensors["zero_point"]
    if packed.dtype not in (torch.int8, torch.uint8):
        raise CheckpointError(f"{stored.parameter}: its qdata is {packed.dtype}: expected int8")
    groups = scale.shape[0] if scale.dim() == 2 else 0
    if scale.shape != (groups, stored.n) or offset.shape != scale.shape or not groups or stored.k % groups:
        raise CheckpointError(
            f"{stored.parameter}: its scale has shape {tuple(scale.shape)}, its zero_point "
            f"{tuple(offset.shape)}: expected (groups, {stored.n})"
        )
    flat = packed.view(torch.uint8)
    # Signed: flipping the upper bit adds 8.
    codes = torch.stack((flat & 15, flat >> 4), -1).view(stored.n, stored.k) ^ _MIDDLE
    return _with_offsets(stored, codes, scale.t(), offset.t())


def _tiles(stored: StoredWeight, data: _Data, tensors: _Tensors) -> PackedTensors:
    """Lane 4 r + l of a tile holds row r; word c of it the codes of the 32 inputs from 32 c on that are
    2 l + d + 8 b + 16 a, as 4 a + 2 b + d in ``_ORDER``."""
    packed, both = tensors["qdata"], tensors.get("scale_and_zero")
    group = int(data["block_size"][-1]) if data.get("block_size") else 0
    tiles, outer, _, words = packed.shape
    rows, inputs = 8 * tiles, 32 * outer * words
    if packed.dtype is not torch.int32 or both is None or group < 1 or stored.k % group or inputs % group:
        raise CheckpointError(
            f"{stored.parameter}: its qdata is {packed.dtype}, groups are of {group}: expected int32, and "
            f"groups that divide {stored.k} inputs"
        )
    if both.shape != (inputs // group, rows, 2):
        raise CheckpointError(
            f"{stored.parameter}: its scale_and_zero has shape {tuple(both.shape)}: expected "
            f"{(inputs // group, rows, 2)}"
        )
    lanes = packed.view(tiles, outer, 8, 4, words)
    codes = torch.empty((*lanes.shape, 8), dtype=torch.uint8)
    for place, code in enumerate(_ORDER):
        codes[..., code] = ((lanes >> (4 * place)) & 15).to(torch.uint8)
    # tile, outer, row, l, word, a, b, d
    ordered = codes.view(*lanes.shape, 2, 2, 2).permute(0, 2, 1, 4, 5, 6, 3, 7).reshape(rows, inputs)
    scales, offsets = (both[: stored.k // group, : stored.n, place].t() for place in (0, 1))
    return _with_offsets(stored, ordered[: stored.n, : stored.k].contiguous(), scales, offsets)


def _with_offsets(
    stored: StoredWeight, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor
) -> PackedTensors:
    """(code - 8) * scale + offset."""
    offsets, group = offsets.float(), stored.k // scales.shape[1]
    own = kept_group(group)
    if own is None or not bool(offsets.any()):
        return group_tensors(stored.parameter, codes, scales, torch.full_like(offsets, _MIDDLE))
    scheme = Int4Offset(own)  # type: ignore[arg-type]
    scales, offsets = (tensor.repeat_interleave(group // own, 1) for tensor in (scales, offsets))
    found = scheme.exact(codes, scales, torch.full_like(offsets, _MIDDLE))
    if not isinstance(found, dict):
        raise CheckpointError(f"{stored.parameter}: {found}")
    return PackedTensors(scheme, {**found, "offsets": offsets.contiguous()})


_READERS: Mapping[str, Callable[[StoredWeight, _Data, _Tensors], PackedTensors]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    _TILES: _tiles,
}


def _codes(stored: StoredWeight, tensors: _Tensors, dtype: torch.dtype) -> torch.Tensor:
    codes = tensors["qdata"]
    if codes.dtype is not dtype:
        raise CheckpointError(f"{stored.parameter}: its qdata is {codes.dtype}: expected {dtype}")
    return codes


def _by_row(stored: StoredWeight, scale: torch.Tensor) -> torch.Tensor:
    """float32[N] of a scale for each row, or of one for all."""
    if scale.numel() == 1 or (scale.shape[0] == stored.n and math.prod(scale.shape) == stored.n):
        return scale.float().reshape(-1).expand(stored.n).contiguous()
    raise CheckpointError(
        f"{stored.parameter}: its scale has shape {tuple(scale.shape)}: eight bits have one an output"
    )


def _expect_zeros(stored: StoredWeight, tensors: _Tensors) -> None:
    zeros = tensors.get("zero_point")
    if zeros is not None and bool(zeros.any()):
        raise CheckpointError(f"{stored.parameter} has zeros that are not 0: int8 is symmetric")


def _rounds_inputs(stored: StoredWeight, data: _Data) -> bool:
    """Whether rows of inputs are rounded as they come, which must be by row and without zeros."""
    given = data.get("act_quant_kwargs")
    if given is None:
        return False
    described = given.get("_data", {})
    granularity = described.get("granularity", {}).get("_type")
    mapping = described.get("mapping_type", {}).get("_data", "SYMMETRIC")
    if granularity != "PerRow" or mapping != "SYMMETRIC":
        raise CheckpointError(
            f"{stored.parameter} rounds its inputs {granularity}, {mapping}: schemes do so PerRow, SYMMETRIC"
        )
    return True
