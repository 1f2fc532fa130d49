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
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt.operator_scratch import state_scratch
from graphopt_kernels.attend_quant_launch import kernels_for, quant_scratch, row_on_gpu
from graphopt_kernels.attend_reference import (
    allowed_keys,
    asked_at,
    attend_supports,
    attention_over,
    places_of,
)
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

__all__ = [
    "ALONE",
    "FIRST",
    "LAST",
    "MIDDLE",
    "attend_quant",
    "attend_quant_reference",
    "attend_quant_supports",
    "attention_rounded",
]

ALONE, FIRST, MIDDLE, LAST = range(4)
"""Turns of sites that read one store, in the order of the program."""

_STORES = ("key_codes", "key_scales", "value_codes", "value_scales", "key_ring", "value_ring")


@torch.library.custom_op("graphopt::attend_quant", mutates_args=_STORES)
def attend_quant(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    key_ring: torch.Tensor,
    value_ring: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    key_bits: int,
    value_bits: int,
    group: int,
    turn: int,
) -> torch.Tensor:
    """[B, H, n, Dv] of ``query`` [B, H, n, D] over rounded and exact rows, dense.

    ``key`` [B, Hkv, n, D] and ``value`` [B, Hkv, n, Dv] are of consecutive ``positions`` int64 [n], those
    right behind what the stores hold. Stores, of at least B sequences: ``key_codes`` int32 [.., Hkv, N,
    words, D], ``key_scales`` [.., Hkv, N, 2, D], ``value_codes`` int32 [.., Hkv, N * block, words],
    ``value_scales`` [.., Hkv, N * block, 2, groups], ``key_ring`` [.., Hkv, R, D], ``value_ring`` [.., Hkv,
    R, Dv], R a multiple of ``block``. ``group``: channels of values that have one scale. ``turn``: ``ALONE``
    or ``FIRST``, ``MIDDLE``, ``LAST`` of sites that read one store. All else as for
    ``graphopt::attend_full``. There is no gradient.
    """
    stores = (key_codes, key_scales, value_codes, value_scales, key_ring, value_ring)
    kernels = None
    if query.shape[2] == positions.shape[0]:
        kernels = kernels_for(query, stores, group)
    if kernels is not None and key is not None and value is not None:
        return row_on_gpu(
            kernels, query, key, value, stores, positions, valid, slopes, sinks, scale, softcap, window,
            length, key_bits, value_bits, group, takes=turn in (ALONE, FIRST),
        )  # fmt: skip
    return attend_quant_reference(
        query, key, value, key_codes, key_scales, value_codes, value_scales, key_ring, value_ring, positions,
        valid, slopes, sinks, scale, softcap, window, length, key_bits, value_bits, group, turn,
    )  # fmt: skip


state_scratch("graphopt::attend_quant", quant_scratch)


@attend_quant.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    key_ring: torch.Tensor,
    value_ring: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    key_bits: int,
    value_bits: int,
    group: int,
    turn: int,
) -> torch.Tensor:
    reason = attend_quant_supports(
        query, key, value, key_codes, key_scales, value_codes, value_scales, key_ring, value_ring, positions,
        valid, slopes, sinks, scale, softcap, window, length, key_bits, value_bits, group, turn,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"attend_quant: {reason}")
    return query.new_empty((*query.shape[:3], value_ring.shape[3]))


def attend_quant_supports(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    key_ring: torch.Tensor,
    value_ring: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    key_bits: int,
    value_bits: int,
    group: int,
    turn: int,
    *_: Any,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if key is None or value is None:
        return Reason("rows that were rounded already are not what the first of several rows read")
    reason = attend_supports(
        query, key, value, key_ring, value_ring, positions, valid, slopes, sinks, scale, softcap, window
    )
    if reason is not None:
        return reason
    for name, bits in (("keys", key_bits), ("values", value_bits)):
        if bits not in PLANES:
            return Reason(f"{bits} bits for {name}: expected one of {', '.join(map(str, sorted(PLANES)))}")
    if key_codes.dim() != 5 or value_codes.dim() != 4 or not key_codes.shape[2]:
        return Reason(
            f"codes have shapes {list(key_codes.shape)} and {list(value_codes.shape)}: expected [batch, "
            "heads, blocks, words, width] and [batch, heads, rows, words]"
        )
    batch, heads, width = *key_ring.shape[:2], key_ring.shape[3]
    kept, value_width = key_ring.shape[2], value_ring.shape[3]
    blocks, rows = key_codes.shape[2], value_codes.shape[2]
    block = rows // blocks
    if kept % block or not kept:
        return Reason(f"rings have {kept} rows: expected a multiple of the {block} positions of a block")
    expected = {
        "key_codes": (key_codes, [batch, heads, blocks, words_of(key_bits, block), width]),
        "key_scales": (key_scales, [batch, heads, blocks, 2, width]),
        "value_codes": (value_codes, [batch, heads, blocks * block, words_of(value_bits, value_width)]),
        "value_scales": (value_scales, [batch, heads, blocks * block, 2, -(-value_width // group)]),
        "value_ring": (value_ring, [batch, heads, kept, value_width]),
    }
    for name, (store, shape) in expected.items():
        if list(store.shape) != shape:
            return Reason(f"{name} has shape {list(store.shape)}: expected {shape}")
    return None


def attend_quant_reference(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    key_ring: torch.Tensor,
    value_ring: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    key_bits: int,
    value_bits: int,
    group: int,
    turn: int,
) -> torch.Tensor:
    """What ``attend_quant`` does, with ATen operators."""
    assert key is not None and value is not None
    batch, rows = query.shape[0], positions.shape[0]
    block = value_codes.shape[2] // key_codes.shape[2]
    held = _Held(
        key_codes[:batch], key_scales[:batch], value_codes[:batch], value_scales[:batch], key_ring[:batch],
        value_ring[:batch], block, key_bits, value_bits, group,
    )  # fmt: skip
    if positions.device.type == "cpu":
        # Free to look at here; on an accelerator it would hold up the host.
        length = min(length, int(positions[-1]) + 1)
    new = _Rows(key.to(key_ring.dtype), value.to(value_ring.dtype), positions)
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
    asked = asked_at(query, positions)
    allowed = allowed_keys(asked, every.places, valid, batch, window)
    allowed = allowed & (held.reads_rounded(asked, every.places) == is_far)
    bias = None
    if slopes is not None:
        bias = slopes.float()[None, :, None, None] * places_of(every.places, valid, batch)[:, None, None]
    output = attention_over(
        query, every.keys.to(query.dtype), every.values.to(query.dtype), allowed, bias, sinks, scale, softcap
    )
    if rows > 1 and turn in (ALONE, LAST):
        held.take(new, closing)
    return output


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

    key_codes: torch.Tensor
    key_scales: torch.Tensor
    value_codes: torch.Tensor
    value_scales: torch.Tensor
    key_ring: torch.Tensor
    value_ring: torch.Tensor
    block: int
    key_bits: int
    value_bits: int
    group: int

    @property
    def kept(self) -> int:
        return self.key_ring.shape[2]

    @property
    def slots(self) -> int:
        return self.key_codes.shape[2]

    def reads_rounded(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Whether a row reads a position rounded, bool [n, L]."""
        return places // self.block <= (rows // self.block - self.kept // self.block)[:, None]

    def read(self, packed: _Packed) -> _Rows:
        keys = read_keys(packed.key_codes, packed.key_scales, self.key_bits, self.block, self.key_ring.dtype)
        values = read_values(
            packed.value_codes, packed.value_scales, self.value_bits, self.value_ring.shape[3], self.group,
            self.value_ring.dtype,
        )  # fmt: skip
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
                self.key_codes[:, :, :count],
                self.key_scales[:, :, :count],
                self.value_codes[:, :, : count * self.block],
                self.value_scales[:, :, : count * self.block],
                blocks,
            )
        )

    def newest(self, last: torch.Tensor) -> _Rows:
        """Exact rows once position ``last`` has come."""
        slots = torch.arange(self.kept, device=last.device)
        return _Rows(self.key_ring, self.value_ring, last - (last - slots).remainder(self.kept))

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
        keys = torch.cat([self.key_ring, new.keys], 2).index_select(2, index)
        values = torch.cat([self.value_ring, new.values], 2).index_select(2, index)
        is_closed = (blocks >= 0) & (blocks * self.block + self.kept > first)
        return _Packed(
            *round_keys(keys.view(*keys.shape[:2], count, self.block, keys.shape[3]), self.key_bits),
            *round_values(values, self.value_bits, self.group),
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
                (self.key_codes, closing.key_codes, 1, slots),
                (self.key_scales, closing.key_scales, 1, slots),
                (self.value_codes, closing.value_codes, self.block, rows),
                (self.value_scales, closing.value_scales, self.block, rows),
            ):
                closed = (blocks >= 0).repeat_interleave(each).view(-1, *[1] * (store.dim() - 3))
                before = store.index_select(2, index)
                store.index_copy_(2, index, torch.where(closed, packed[:, :, -len(index) :], before))
        kept = min(len(new.places), self.kept)
        slots = new.places[-kept:].remainder(self.kept)
        self.key_ring.index_copy_(2, slots, new.keys[:, :, -kept:])
        self.value_ring.index_copy_(2, slots, new.values[:, :, -kept:])


def attention_rounded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    key_bits: int,
    value_bits: int,
    block: int,
    group: int,
    kept: int,
) -> torch.Tensor:
    """What ``attend_quant`` gives for all rows [B, H, S, D] of a sequence at once, without stores: rows are
    rounded but not packed."""
    batch, rows = query.shape[0], query.shape[2]
    places = torch.arange(rows, device=query.device)
    at = places_of(places, valid, batch)
    far_keys, far_values = rounded_keys(key, key_bits, block), rounded_values(value, value_bits, group)
    outputs = []
    for start in range(0, rows, block):
        # Rows of one block read the same positions rounded.
        stop, near = min(start + block, rows), max(0, start + block - kept)
        reached = max(0, start - window + 1) if window else 0
        split = max(near, reached)
        keys = torch.cat([far_keys[:, :, reached:split], key[:, :, split:stop]], 2)
        values = torch.cat([far_values[:, :, reached:split], value[:, :, split:stop]], 2)
        allowed = allowed_keys(places[start:stop], places[reached:stop], valid, batch, window)
        bias = None
        if slopes is not None:
            bias = slopes.float()[None, :, None, None] * at[:, None, None, reached:stop]
        outputs.append(
            attention_over(
                query[:, :, start:stop], keys.to(query.dtype), values.to(query.dtype), allowed, bias, sinks,
                scale, softcap,
            )
        )  # fmt: skip
    return torch.cat(outputs, 2)
