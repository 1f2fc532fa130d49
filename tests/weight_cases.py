"""The files of ``tests/weights`` and models that they load into."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from graphopt.tensors_file import read_tensors

__all__ = ["EXPECTED", "KEPT", "ROWS", "WEIGHTS", "K", "N", "model_of", "weight_of"]

WEIGHTS = Path(__file__).parent / "weights"
EXPECTED, _ = read_tensors(WEIGHTS / "expected.safetensors")
N, K = 32, 128
ROWS = slice(None, None, 3)
"""Those that ``EXPECTED`` holds."""

KEPT = {
    "gptq.bits2_group32": "int2{group=32,outliers=0.0}",
    "gptq.bits3_group32": "int3{group=32,outliers=0.0}",
    "gptq.bits4_group32": "int4{group=32}",
    "gptq.bits4_group128": "int4",
    "gptq.bits8_group128": "int8",
    "gptq.act_order": "int4-ordered{group=64}",
    "awq.linear": "int4{group=32}",
    "bitsandbytes.plain": "nf4",
    "bitsandbytes.nested": "nf4",
    "bitsandbytes.wide": "nf4",
    "torchao.int8": "int8",
    "torchao.dynamic": "int8-dynamic",
    "torchao.float8": "fp8",
    "torchao.int4": "int4-offset{group=32}",
    "torchao.groups": "int4{group=32,symmetric=true}",
    "torchao.axis": "int8",
}
"""The scheme of each weight."""


def model_of(file: str, device: str = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A linear for each weight of a file."""
    names = [name.partition(".")[2] for name in KEPT if name.startswith(f"{file}.")] or ["linear"]
    biased = ("awq", "torchao") if file != "torchao" else ()
    return nn.ModuleDict(
        {
            name: nn.Linear(K, N, bias=file in biased or name == "int8", device=device, dtype=dtype)
            for name in names
        }
    )


def weight_of(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.detach()  # type: ignore[union-attr,operator]
