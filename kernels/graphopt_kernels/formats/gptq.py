"""GPTQ checkpoints: codes of 2, 3, 4 or 8 bits, groups along the inputs.

    x.qweight int32[K * bits / 32, N]   codes of a column one after the other, the first in the last bits
    x.qzeros  int32[G, N * bits / 32]   zeros along the outputs in the same way
    x.scales  float[G, N]
    x.g_idx   int32[K]                  the group of each input; neighbours where it is not there
    weight    (code - zero) * scale

Two conventions for zeros: ``v1`` writes zero - 1, as AutoGPTQ does, words as a whole in GPTQModel; ``v2``
(``gptq_v2`` of GPTQModel) writes the zero. The files do not say; ``checkpoint_format`` of the configuration
beside them does, else it is v1.

Four bits become ``int4``, two and three ``int2`` and ``int3`` without outliers. Where ``g_idx`` is not in
order (act-order) columns are sorted by group and the scheme is ``int4-ordered``, of two and three bits too,
which take the bytes of four then. Eight bits become ``int8`` where all inputs are one group and zeros are
128. Layout: https://github.com/AutoGPTQ/AutoGPTQ
(``QuantLinear.pack``) and https://github.com/ModelCloud/GPTQModel (``convert_gptq_v1_to_v2_format``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from graphopt.errors import CheckpointError
from graphopt.packing.checkpoint import Checkpoint
from graphopt.packing.formats import PackedTensors, StoredWeight, WeightFormat
from graphopt_kernels.formats.awq import is_awq
from graphopt_kernels.formats.int32_codes import codes_of, group_tensors
from graphopt_kernels.quantized.int8 import Int8

__all__ = ["Gptq"]

_SUFFIX = ".qweight"
_BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in each code. Added to words as they are: one that was taken off a zero of 0 was borrowed from the
next code, and goes back to it. Codes of three bits are written one by one."""

_CONVENTIONS = {"gptq": "v1", "gptq_v2": "v2"}


@dataclass(frozen=True)
class Gptq(WeightFormat):
    """``zeros``: how they are written; ``auto`` asks the configuration beside the checkpoint."""

    zeros: Literal["auto", "v1", "v2"] = "auto"

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "GPTQ: qweight, qzeros, scales, g_idx"

    def find(self, checkpoint: Checkpoint) -> Iterable[StoredWeight]:
        for key in checkpoint.names:
            prefix = key.removesuffix(_SUFFIX)
            if prefix != key and not is_awq(checkpoint, prefix):
                yield _stored(checkpoint, prefix)

    def read(self, stored: StoredWeight, checkpoint: Checkpoint) -> PackedTensors:
        name, n, k = stored.parameter, stored.n, stored.k
        convention = self._convention(checkpoint)
        scales = checkpoint.read(stored.parts["scales"]).t()
        groups = scales.shape[1]
        qzeros = checkpoint.read(stored.parts["qzeros"])
        bits = 32 * qzeros.shape[1] // n
        if convention == "v1" and bits != 3:
            qzeros = qzeros + _ONES[bits]
        zeros = codes_of(qzeros.t().contiguous(), bits, n)
        if convention == "v1" and bits == 3:
            zeros = (zeros + 1) & 7
        codes = codes_of(checkpoint.read(stored.parts["qweight"]), bits, k).t()
        order = None
        if "g_idx" in stored.parts:
            order = _order(stored.parts["g_idx"], checkpoint, k, groups)
        if bits == 8:
            return _int8(name, codes, scales, zeros)
        if order is not None:
            codes = codes[:, order]
        return group_tensors(name, codes.contiguous(), scales, zeros, bits, order)

    def _convention(self, checkpoint: Checkpoint) -> str:
        if self.zeros != "auto":
            return self.zeros
        given = checkpoint.configuration()
        stated = given.get("checkpoint_format") or given.get("format") or "gptq"
        if stated not in _CONVENTIONS:
            raise CheckpointError(
                f"the configuration of the checkpoint says {stated!r}: gptq reads {', '.join(_CONVENTIONS)}",
                hint='formats=("gptq{zeros=v1}",) reads it all the same',
            )
        return _CONVENTIONS[stated]


def _stored(checkpoint: Checkpoint, prefix: str) -> StoredWeight:
    parts = {name: f"{prefix}.{name}" for name in ("qweight", "qzeros", "scales")}
    qweight, qzeros, scales = (checkpoint.entry(part) for part in parts.values())
    for key, entry in zip(parts.values(), (qweight, qzeros, scales), strict=True):
        fits = entry.dtype.is_floating_point if entry is scales else entry.dtype is torch.int32
        if len(entry.shape) != 2 or not fits:
            kind = "floating point" if entry is scales else "int32"
            raise CheckpointError(f"{key} is {entry.dtype} {entry.shape}: expected {kind}, two dimensions")
    groups, n = scales.shape
    bits = 32 * qzeros.shape[1] // n if n else 0
    if bits not in _BITS or qzeros.shape != (groups, n * bits // 32) or n * bits % 32:
        raise CheckpointError(
            f"{parts['qzeros']} has shape {qzeros.shape}: expected ({groups}, {n} * bits / 32) with bits of "
            f"{', '.join(map(str, _BITS))}, as {parts['scales']} has shape {scales.shape}"
        )
    k = qweight.shape[0] * 32 // bits
    if qweight.shape[1] != n or k * bits != qweight.shape[0] * 32 or not groups or k % groups:
        raise CheckpointError(
            f"{parts['qweight']} has shape {qweight.shape}: expected (inputs * {bits} / 32, {n}), the inputs "
            f"in {groups} groups, as {parts['scales']} has shape {scales.shape}"
        )
    index = f"{prefix}.g_idx"
    if index in checkpoint:
        entry = checkpoint.entry(index)
        if entry.shape != (k,) or entry.dtype not in (torch.int32, torch.int64):
            raise CheckpointError(f"{index} is {entry.dtype} {entry.shape}: expected int32 ({k},)")
        parts["g_idx"] = index
    return StoredWeight(f"{prefix}.weight", n, k, parts)


def _order(key: str, checkpoint: Checkpoint, k: int, groups: int) -> torch.Tensor | None:
    """Columns by their groups, or ``None`` where they are so."""
    index = checkpoint.read(key).long()
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        wrong = low if low < 0 else high
        raise CheckpointError(f"{key} holds {wrong}: expected groups from 0 to {groups - 1}")
    neighbours = torch.arange(groups).repeat_interleave(k // groups)
    if torch.equal(index, neighbours):
        return None
    order = index.argsort(stable=True)
    if not torch.equal(index[order], neighbours):
        sizes = index.bincount(minlength=groups)
        raise CheckpointError(
            f"{key} makes groups of {int(sizes.min())} to {int(sizes.max())} inputs: schemes keep equal ones"
        )
    return order


def _int8(name: str, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> PackedTensors:
    if scales.shape[1] > 1:
        group = codes.shape[1] // scales.shape[1]
        raise CheckpointError(
            f"{name} has 8 bits and groups of {group}: no scheme keeps those, int8 has a scale an output"
        )
    if bool((zeros != 128).any()):
        raise CheckpointError(f"{name} has 8 bits and zeros that are not 128: int8 is symmetric")
    if not bool(scales.isfinite().all()):
        raise CheckpointError(f"{name}: its scales are not finite")
    # A group of all inputs has one scale, whatever their order.
    signed = (codes.short() - 128).to(torch.int8).contiguous()
    return PackedTensors(Int8(), {"codes": signed, "scales": scales[:, 0].float().contiguous()})
