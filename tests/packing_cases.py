"""Schemes and models for tests of allocation: few bits, packed as plainly as can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from graphopt import hookimpl
from graphopt.candidate import Reason
from graphopt.packing import Scheme

Tensor = torch.Tensor

_library = torch.library.Library("graphopt_tests", "DEF")
_library.define("unpack_few(Tensor codes, Tensor scales, int k, ScalarType dtype) -> Tensor")
_library.define("linear_few(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int k) -> Tensor")


def _unpack(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    low, high = (codes & 15).to(torch.int16), (codes >> 4).to(torch.int16)
    both = torch.stack([low, high], -1).flatten(1)[:, :k] - 8
    return (both.float() * scales[:, None]).to(dtype)


def _linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, k: int) -> Tensor:
    return torch.nn.functional.linear(x, _unpack(codes, scales, k, x.dtype), bias)


for _name, _function in (("unpack_few", _unpack), ("linear_few", _linear)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("graphopt_tests::unpack_few", lib=_library)
def _fake_unpack(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((codes.shape[0], k), dtype=dtype)


@torch.library.register_fake("graphopt_tests::linear_few", lib=_library)
def _fake_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, k: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@dataclass(frozen=True)
class Few(Scheme):
    """Four bits a weight, two in a byte, a scale for each row. ``by_rows`` as packed rows are rows."""

    name: ClassVar[str] = "few"
    summary: ClassVar[str] = "4 bits a weight"
    unpack_op: ClassVar[str] = "graphopt_tests::unpack_few"
    linear_op: ClassVar[str] = "graphopt_tests::linear_few"

    least: int = 1

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        return Reason(f"takes {self.least} rows or more, got {n}") if n < self.least else None

    def pack(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        exact = weight.float()
        largest = exact.abs().amax(1)
        scales = torch.where(largest > 0, largest / 7, 1.0)
        codes = (exact / scales[:, None]).round().clamp(-7, 7).to(torch.int16) + 8
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2), value=8)
        return {"codes": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), "scales": scales}

    def constants(self, n: int, k: int) -> tuple[Any, ...]:
        return (k,)

    def stored_bytes(self, n: int, k: int, dtype: torch.dtype) -> int:
        return n * ((k + 1) // 2) + 4 * n


class Plugin:
    """Schemes and scorers for one host."""

    graphopt_api = 1

    def __init__(self, *schemes: Any, scorers: Any = ()) -> None:
        def graphopt_schemes() -> Any:
            return schemes

        def graphopt_scorers() -> Any:
            return scorers

        self.graphopt_schemes = hookimpl(graphopt_schemes)
        self.graphopt_scorers = hookimpl(graphopt_scorers)


FEW = Plugin(Few)


class Chain(nn.Module):
    """A table that is tied to the head, ``depth`` residual layers of two products, a norm: ids to logits."""

    def __init__(self, depth: int = 3, width: int = 32, classes: int = 40) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(depth)
        self.embed = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * (0.2 + 0.1 * (number % 4)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def batches(count: int = 3, rows: int = 2, length: int = 8) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randint(0, 40, (rows, length), generator=generator),) for _ in range(count)]
