"""Attention over a store of rounded keys and values whose newest rows are exact.

Positions come in blocks of ``block``. The row at position q reads::

    position p     rounded  where p // block <= q // block - R // block       packed (``cache_codes``)
                   exact    else: the newest R - block + 1 to R positions     in slot p % R of rings of R rows

which depends on p and q alone: a prompt taken in by parts and tokens one by one give the same. Block b is
packed as position ``b * block + R - 1`` comes, the last one before its first row is overwritten, from what
the rings then hold: the same row may be taken in twice. It goes to slot ``b % N`` of the N blocks that are
kept: all that a sequence can come to have, or those of a window.

Where several sites read one store, all of them are given the new rows. Rows of a prompt read what the store
held before: the last site writes. A single row reads what it holds afterwards: the first site writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt_kernels.attend_operator import Asked, AttendOperator
from graphopt_kernels.attend_quant_launch import (
    QuantBits,
    QuantStores,
    kernels_for,
    kernels_take,
    row_on_gpu,
    row_scratch,
)
from graphopt_kernels.attend_quant_prompts import prompt_scratch, prompts_take, rows_on_gpu
from graphopt_kernels.attend_reference import asked_at, attend_refuses, attention_at
from graphopt_kernels.cache_codes import (
    PLANES,
    read_keys,
    read_values,
    round_keys,
    round_values,
    rounded_keys,
    rounded_values,
    words_of,
)

__all__ = ["ALONE", "FIRST", "LAST", "MIDDLE", "attend_quant", "attention_rounded"]

ALONE, FIRST, MIDDLE, LAST = range(4)
"""Turns of sites that read one store, in the order of the program."""


def _reference(asked: Asked, stores: QuantStores, bits: QuantBits) -> torch.Tensor:
    query, key, value, positions = asked[:4]
    assert key is not None and value is not None
    batch, rows, length, turn = query.shape[0], positions.shape[0], asked.length, bits.turn
    held = _Held(QuantStores(*(store[:batch] for store in stores)), bits)
    if positions.device.type == "cpu":
        # Free to look at here; on an accelerator it would hold up the host.
        length = min(length, int(positions[-1]) + 1)
    new = _Rows(key.to(stores.key_ring.dtype), value.to(stores.value_ring.dtype), positions)
    if rows == 1:
        if turn in (ALONE, FIRST):
            held.take(new, held.closing(new))
        far, near = [held.rounded(positions[-1], length)], [held.newest(positions[-1])]
    else:
        closing, before = held.closing(new), positions[0] - 1
        far = [held.rounded(before, length), held.read(closing)]
        near = [held.newest(before), new]
    every = _Rows.cat([*far, *near])
    is_far = torch.arange(len(every.places), device=positions.device) < sum(len(r.places) for r in far)
    also = held.reads_rounded(asked_at(query, positions), every.places) == is_far
    keys, values = every.keys.to(query.dtype), every.values.to(query.dtype)
    output = attention_at(asked, keys, values, every.places, also)
    if rows > 1 and turn in (ALONE, LAST):
        held.take(new, closing)
    return output


def _refuses(asked: Asked, stores: QuantStores, bits: QuantBits) -> Reason | None:
    if asked.key is None or asked.value is None:
        return Reason("rows that were rounded already are not what the first of several rows read")
    key_codes, key_scales, value_codes, value_scales, key_ring, value_ring = stores
    reason = attend_refuses(asked, key_ring, value_ring)
    if reason is not None:
        return reason
    for name, count in (("keys", bits.key_bits), ("values", bits.value_bits)):
        if count not in PLANES:
            return Reason(f"{count} bits for {name}: expected one of {', '.join(map(str, sorted(PLANES)))}")
    if key_codes.dim() != 5 or value_codes.dim() != 4 or not key_codes.shape[2]:
        return Reason(
            f"codes have shapes {list(key_codes.shape)} and {list(value_codes.shape)}: expected [batch, "
            "heads, blocks, words, width] and [batch, heads, rows, words]"
        )
    batch, heads, width = *key_ring.shape[:2], key_ring.shape[3]
    kept, value_width = key_ring.shape[2], value_ring.shape[3]
    blocks = key_codes.shape[2]
    block = stores.block
    if kept % block or not kept:
        return Reason(f"rings have {kept} rows: expected a multiple of the {block} positions of a block")
    expected = {
        "key_codes": (key_codes, [batch, heads, blocks, words_of(bits.key_bits, block), width]),
        "key_scales": (key_scales, [batch, heads, blocks, 2, width]),
        "value_codes": (value_codes, [batch, heads, blocks * block, words_of(bits.value_bits, value_width)]),
        "value_scales": (value_scales, [batch, heads, blocks * block, 2, -(-value_width // bits.group)]),
        "value_ring": (value_ring, [batch, heads, kept, value_width]),
    }
    for name, (store, shape) in expected.items():
        if list(store.shape) != shape:
            return Reason(f"{name} has shape {list(store.shape)}: expected {shape}")
    return None


def _launch(asked: Asked, stores: QuantStores, bits: QuantBits) -> torch.Tensor | None:
    if asked.key is None or asked.value is None:
        return None
    kernels = kernels_for(asked.query, stores, bits.group)
    if kernels is None:
        return None
    if asked.positions.shape[0] == 1:
        return row_on_gpu(kernels, asked, stores, bits, takes=bits.turn in (ALONE, FIRST))
    if prompts_take(asked, stores) is not None:
        return None
    return rows_on_gpu(kernels, asked, stores, bits, writes=bits.turn in (ALONE, LAST))


def _scratch(asked: Asked, stores: QuantStores, bits: QuantBits) -> int:
    query = asked.query
    if query.device.type != "cuda" or kernels_take(query, stores, bits.group) is not None:
        return 0
    if _torch.hint(asked.positions.shape[0]) == 1:
        return row_scratch(asked, stores, bits)
    return prompt_scratch(asked, stores) if prompts_take(asked, stores) is None else 0


attend_quant = AttendOperator(
    "attend_quant",
    QuantStores,
    QuantBits,
    summary="writes new keys and values into stores that round all but the newest, and attends",
    reference=_reference,
    refuses=_refuses,
    value_width=lambda stores, _: stores.value_ring.shape[3],
    launch=_launch,
    scratch=_scratch,
)


class _Rows(NamedTuple):
    """Keys [B, Hkv, L, D], values [B, Hkv, L, Dv] and positions [L], negative where there is none."""

    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor

    @staticmethod
    def cat(parts: Sequence[_Rows]) -> _Rows:
        keys, values, places = zip(*parts, strict=True)
        return _Rows(torch.cat(keys, 2), torch.cat(values, 2), torch.cat(places))


class _Packed(NamedTuple):
    """Blocks as they are stored, and their numbers [J], which follow one another; negative where there is
    none."""

    key_codes: torch.Tensor
    key_scales: torch.Tensor
    value_codes: torch.Tensor
    value_scales: torch.Tensor
    blocks: torch.Tensor


@dataclass(frozen=True)
class _Held:
    """The stores of the sequences of a call."""

    stores: QuantStores
    bits: QuantBits

    @property
    def block(self) -> int:
        return self.stores.block

    @property
    def kept(self) -> int:
        return self.stores.key_ring.shape[2]

    @property
    def slots(self) -> int:
        return self.stores.key_codes.shape[2]

    def reads_rounded(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Whether a row reads a position rounded, bool [n, L]."""
        return places // self.block <= (rows // self.block - self.kept // self.block)[:, None]

    def read(self, packed: _Packed) -> _Rows:
        ring, bits = self.stores.key_ring, self.bits
        keys = read_keys(packed.key_codes, packed.key_scales, bits.key_bits, self.block, ring.dtype)
        ring = self.stores.value_ring
        values = read_values(
            packed.value_codes, packed.value_scales, bits.value_bits, ring.shape[3], bits.group, ring.dtype
        )
        inside = torch.arange(self.block, device=packed.blocks.device)
        places = (packed.blocks[:, None] * self.block + inside).flatten()
        return _Rows(keys.flatten(2, 3), values, places)

    def rounded(self, last: torch.Tensor, length: int) -> _Rows:
        """What is packed once position ``last`` has come, slots that ``length`` leaves empty left out."""
        count = min(self.slots, max(0, (length - self.kept) // self.block + 1))
        newest = (last + 1 - self.kept) // self.block
        slots = torch.arange(count, device=last.device)
        blocks = newest - (newest - slots).remainder(self.slots)
        return self.read(
            _Packed(
                self.stores.key_codes[:, :, :count],
                self.stores.key_scales[:, :, :count],
                self.stores.value_codes[:, :, : count * self.block],
                self.stores.value_scales[:, :, : count * self.block],
                blocks,
            )
        )

    def newest(self, last: torch.Tensor) -> _Rows:
        """Exact rows once position ``last`` has come."""
        slots = torch.arange(self.kept, device=last.device)
        return _Rows(self.stores.key_ring, self.stores.value_ring, last - (last - slots).remainder(self.kept))

    def closing(self, new: _Rows) -> _Packed:
        """Blocks that are packed as rows ``new`` come."""
        first, last = new.places[0], new.places[-1]
        count = -(-len(new.places) // self.block)
        if last.device.type == "cpu":
            # As many as there are: most rows close none.
            count = (int(last) + 1 - self.kept) // self.block - (int(first) - self.kept) // self.block
        blocks = (last + 1 - self.kept) // self.block - torch.arange(count - 1, -1, -1, device=last.device)
        inside = torch.arange(self.block, device=last.device)
        places = (blocks[:, None] * self.block + inside).flatten()
        index = torch.where(places < first, places.remainder(self.kept), places - first + self.kept).clamp(
            max=self.kept + len(new.places) - 1
        )
        keys = torch.cat([self.stores.key_ring, new.keys], 2).index_select(2, index)
        values = torch.cat([self.stores.value_ring, new.values], 2).index_select(2, index)
        is_closed = (blocks >= 0) & (blocks * self.block + self.kept > first)
        return _Packed(
            *round_keys(keys.view(*keys.shape[:2], count, self.block, keys.shape[3]), self.bits.key_bits),
            *round_values(values, self.bits.value_bits, self.bits.group),
            torch.where(is_closed, blocks, -1),
        )

    def take(self, new: _Rows, closing: _Packed) -> None:
        """Write blocks that close, then the newest rows in the place of theirs."""
        count = min(len(closing.blocks), self.slots)
        if count:
            blocks = closing.blocks[-count:]
            # Slots of blocks that do not close, each another one, keep what is in them.
            slots = blocks[-1] - torch.arange(count - 1, -1, -1, device=blocks.device)
            slots = slots.remainder(self.slots)
            inside = torch.arange(self.block, device=blocks.device)
            rows = (slots[:, None] * self.block + inside).flatten()
            for store, packed, each, index in (
                (self.stores.key_codes, closing.key_codes, 1, slots),
                (self.stores.key_scales, closing.key_scales, 1, slots),
                (self.stores.value_codes, closing.value_codes, self.block, rows),
                (self.stores.value_scales, closing.value_scales, self.block, rows),
            ):
                closed = (blocks >= 0).repeat_interleave(each).view(-1, *[1] * (store.dim() - 3))
                before = store.index_select(2, index)
                store.index_copy_(2, index, torch.where(closed, packed[:, :, -len(index) :], before))
        kept = min(len(new.places), self.kept)
        slots = new.places[-kept:].remainder(self.kept)
        self.stores.key_ring.index_copy_(2, slots, new.keys[:, :, -kept:])
        self.stores.value_ring.index_copy_(2, slots, new.values[:, :, -kept:])


def attention_rounded(
    asked: Asked, key_bits: int, value_bits: int, block: int, group: int, kept: int
) -> torch.Tensor:
    """What ``attend_quant`` gives for all rows [B, H, S, D] of a sequence at once, without stores: rows are
    rounded but not packed."""
    query, key, value, places = asked[:4]
    assert key is not None and value is not None
    rows, window = query.shape[2], asked.window
    far_keys, far_values = rounded_keys(key, key_bits, block), rounded_values(value, value_bits, group)
    outputs = []
    for start in range(0, rows, block):
        # Rows of one block read the same positions rounded.
        stop, near = min(start + block, rows), max(0, start + block - kept)
        reached = max(0, start - window + 1) if window else 0
        split = max(near, reached)
        keys = torch.cat([far_keys[:, :, reached:split], key[:, :, split:stop]], 2)
        values = torch.cat([far_values[:, :, reached:split], value[:, :, split:stop]], 2)
        part = asked._replace(query=query[:, :, start:stop], positions=places[start:stop])
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        outputs.append(attention_at(part, keys, values, places[reached:stop]))
    return torch.cat(outputs, 2)
