"""AutoAWQ checkpoints, of the version GEMM: codes of four bits, eight outputs in a word.

    x.qweight int32[K, N / 8]   output 8 j + ORDER[i] in bits 4 i to 4 i + 3 of word j
    x.qzeros  int32[G, N / 8]   zeros in the same way
    x.scales  float16[G, N]
    weight    (code - zero) * scale

They become ``int4``: what inputs were scaled with as the weight was rounded is in the layer before, which the
checkpoint holds dense. Layout: https://github.com/casper-hansen/AutoAWQ
(``WQLinear_GEMM.from_linear``). GPTQ has the same names and its codes along the inputs: shapes tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.errors import CheckpointError
from graphopt.packing.checkpoint import Checkpoint
from graphopt.packing.formats import PackedTensors, StoredWeight, WeightFormat
from graphopt_kernels.formats.int32_codes import group_tensors

__all__ = ["Awq", "is_awq"]

_SUFFIX = ".qweight"
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales")


def is_awq(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether the tensors under ``prefix`` hold codes along the outputs, eight in a word."""
    if f"{prefix}.g_idx" in checkpoint or not all(f"{prefix}.{part}" in checkpoint for part in _PARTS):
        return False
    qweight, scales = (checkpoint.entry(f"{prefix}.{part}").shape for part in ("qweight", "scales"))
    return len(qweight) == len(scales) == 2 and qweight[1] * 8 == scales[1]


@dataclass(frozen=True)
class Awq(WeightFormat):
    """No options."""

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "AutoAWQ, version GEMM: qweight, qzeros, scales"

    def find(self, checkpoint: Checkpoint) -> Iterable[StoredWeight]:
        for key in checkpoint.names:
            prefix = key.removesuffix(_SUFFIX)
            if prefix != key and is_awq(checkpoint, prefix):
                yield _stored(checkpoint, prefix)

    def read(self, stored: StoredWeight, checkpoint: Checkpoint) -> PackedTensors:
        codes = _codes(checkpoint.read(stored.parts["qweight"]))
        zeros = _codes(checkpoint.read(stored.parts["qzeros"]))
        scales = checkpoint.read(stored.parts["scales"]).t()
        return group_tensors(stored.parameter, codes, scales, zeros)


def _stored(checkpoint: Checkpoint, prefix: str) -> StoredWeight:
    parts = {name: f"{prefix}.{name}" for name in _PARTS}
    qweight, qzeros, scales = (checkpoint.entry(part) for part in parts.values())
    for part, entry in ((parts["qweight"], qweight), (parts["qzeros"], qzeros)):
        if entry.dtype is not torch.int32:
            raise CheckpointError(f"{part} is {entry.dtype}: expected int32")
    if not scales.dtype.is_floating_point:
        raise CheckpointError(f"{parts['scales']} is {scales.dtype}: expected floating-point numbers")
    (groups, n), k = scales.shape, qweight.shape[0]
    if qzeros.shape != (groups, n // 8):
        raise CheckpointError(f"{parts['qzeros']} has shape {qzeros.shape}: expected {(groups, n // 8)}")
    if not groups or k % groups:
        raise CheckpointError(f"{parts['scales']} has {groups} groups: they do not divide {k} inputs")
    return StoredWeight(f"{prefix}.weight", n, k, parts)


def _codes(words: torch.Tensor) -> torch.Tensor:
    """Codes uint8[N, rows] of ``words`` int32[rows, N / 8]."""
    result = torch.empty((words.shape[1], 8, words.shape[0]), dtype=torch.uint8)
    for place, output in enumerate(_ORDER):
        result[:, output] = ((words >> (4 * place)) & 15).to(torch.uint8).t()
    return result.flatten(0, 1)
