"""What is kept of a block of positions of several attentions, as bytes.

::

    rows of M attentions  [M, B, Hkv, N, block, D]  -- store.join -->  tensors by name [B, N, ..]
    tensors by name       -- laid end to end -->  records uint8 [B, N, bytes]
    records  -- store.part -->  rows of one attention [B, Hkv, N, block, D]

A method says what it keeps of a block and how rows become that and come back. The tensor that it names
``rows`` is kept in codes where the store has ``bits`` (``cache_codes``: keys per channel in the block, values
per token), all others as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from graphopt_kernels.cache_codes import (
    read_keys,
    read_values,
    round_keys,
    round_values,
    rounded_keys,
    rounded_values,
    scale_dtype,
    words_of,
)

__all__ = ["JoinsRows", "JointRows", "Kinds", "joined_records", "joined_rows", "kinds_of", "parted_rows"]

Kinds = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class JointRows:
    """Rows of ``members`` attentions: keys or values, ``heads`` of ``width`` numbers."""

    what: Literal["keys", "values"]
    members: int
    heads: int
    width: int
    dtype: torch.dtype


class JoinsRows(Protocol):
    """What a store says that joins the rows of several attentions, block by block."""

    @property
    def block(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int: ...

    def kept(self, spec: JointRows) -> Kinds: ...
    def join(
        self, spec: JointRows, rows: torch.Tensor, shown: torch.Tensor | None, basis: torch.Tensor | None
    ) -> Mapping[str, torch.Tensor]: ...
    def part(
        self, spec: JointRows, kept: Mapping[str, torch.Tensor], member: int, basis: torch.Tensor | None
    ) -> torch.Tensor: ...


def kinds_of(store: JoinsRows, spec: JointRows) -> Kinds:
    """Shape and dtype of all that is kept of one block of one sequence, in the order of a record."""
    kinds: dict[str, Any] = dict(store.kept(spec))
    if store.bits:
        (heads, block, width), dtype = kinds.pop("rows")
        if spec.what == "keys":
            codes: tuple[int, ...] = (words_of(store.bits, block), width)
            scales: tuple[int, ...] = (2, width)
        else:
            codes, scales = (block, words_of(store.bits, width)), (block, 2, -(-width // store.group))
        kinds["codes"] = (heads, *codes), torch.int32
        kinds["scales"] = (heads, *scales), scale_dtype(dtype)
    return kinds


def joined_records(
    store: JoinsRows,
    spec: JointRows,
    rows: torch.Tensor,
    shown: torch.Tensor | None,
    basis: torch.Tensor | None,
) -> torch.Tensor:
    """Records uint8 [B, N, bytes] of ``rows`` [M, B, Hkv, N, block, D]; ``shown`` bool [B, N, block]: which
    are no padding."""
    made = dict(store.join(spec, rows, shown, basis))
    if store.bits:
        one = made.pop("rows")
        made["codes"], made["scales"] = (
            round_keys(one, store.bits)
            if spec.what == "keys"
            else round_values(one, store.bits, store.group)
        )
    parts = [
        made[name].to(dtype).reshape(*made[name].shape[:2], math.prod(shape)).contiguous().view(torch.uint8)
        for name, (shape, dtype) in kinds_of(store, spec).items()
    ]
    return torch.cat(parts, -1)


def parted_rows(
    store: JoinsRows, spec: JointRows, records: torch.Tensor, member: int, basis: torch.Tensor | None
) -> torch.Tensor:
    """Rows [B, Hkv, N, block, D] of attention ``member`` of ``records`` uint8 [B, N, bytes]."""
    found: dict[str, torch.Tensor] = {}
    start = 0
    for name, (shape, dtype) in kinds_of(store, spec).items():
        stop = start + math.prod(shape) * dtype.itemsize
        # A copy: bytes of a record lie at offsets of which wider numbers are not a multiple.
        part = records[..., start:stop].clone(memory_format=torch.contiguous_format)
        found[name] = part.view(dtype).view(*records.shape[:2], *shape)
        start = stop
    if store.bits:
        (_, block, width), dtype = store.kept(spec)["rows"]
        codes, scales = found.pop("codes"), found.pop("scales")
        found["rows"] = (
            read_keys(codes, scales, store.bits, block, dtype)
            if spec.what == "keys"
            else read_values(codes, scales, store.bits, width, store.group, dtype)
        )
    return store.part(spec, found, member, basis)


def joined_rows(
    store: JoinsRows,
    spec: JointRows,
    rows: torch.Tensor,
    shown: torch.Tensor | None,
    member: int,
    basis: torch.Tensor | None,
) -> torch.Tensor:
    """Rows [B, Hkv, N, block, D] as attention ``member`` reads them, without records and without packing."""
    made = dict(store.join(spec, rows, shown, basis))
    kinds = store.kept(spec)
    if store.bits:
        one = made["rows"].to(kinds["rows"][1])
        made["rows"] = (
            rounded_keys(one, store.bits, store.block)
            if spec.what == "keys"
            else rounded_values(one, store.bits, store.group)
        )
    return store.part(spec, {name: made[name].to(kinds[name][1]) for name in kinds}, member, basis)
