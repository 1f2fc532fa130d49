"""Attention over a store that several attentions write into.

Positions come in blocks of ``block``. The row at position q of attention m reads::

    position p     joined   where p // block < q // block     what the store keeps of the block, as m's
                   as it is where p // block == q // block    m's own row, in slot p % block of its ring

which depends on p and q alone. All rows of a call lie in one block: rows of a later attention are made of
what an earlier one gave, so what both come to keep of a block is known once the last of them has had its last
row. That one joins the block then, from what the rings hold: the same row may be taken in twice. Block b goes
to slot ``b % N`` of the N that are kept.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt_kernels.attend_operator import Asked, AttendOperator
from graphopt_kernels.attend_reference import attend_refuses, attention_at
from graphopt_kernels.joint_blocks import (
    JoinsRows,
    JointRows,
    joined_records,
    joined_rows,
    kinds_of,
    parted_rows,
)
from graphopt_kernels.joint_known import joint_store

__all__ = ["JointMember", "JointStores", "attend_joint", "attention_joint"]


class JointStores(NamedTuple):
    """``key_blocks`` and ``value_blocks`` uint8 [.., N, bytes], ``key_ring`` [.., M * Hkv, block, D],
    ``value_ring`` [.., M * Hkv, block, Dv], heads of one attention after those of the other, of at least B
    sequences."""

    key_blocks: torch.Tensor
    value_blocks: torch.Tensor
    key_ring: torch.Tensor
    value_ring: torch.Tensor


class JointMember(NamedTuple):
    """``store``: the store that joins attentions, as it is spelled; ``key_basis``, ``value_basis``: what it
    was fitted to, or ``None``; ``member``: whose new rows these are, of consecutive positions in one
    block."""

    key_basis: torch.Tensor | None
    value_basis: torch.Tensor | None
    store: str
    member: int


def _refuses(asked: Asked, stores: JointStores, by: JointMember) -> Reason | None:
    key, key_ring, value_ring, member = asked.key, stores.key_ring, stores.value_ring, by.member
    if key is None or asked.value is None:
        return Reason("every attention that writes into the store brings rows of its own: some are missing")
    if key.dim() != 4 or key_ring.dim() != 4 or value_ring.dim() != 4:
        return Reason("keys and rings: expected [batch, heads, rows, width]")
    heads = key.shape[1]
    if key_ring.shape[1] % heads or not 0 <= member < key_ring.shape[1] // heads:
        return Reason(
            f"attention {member} of a ring of {key_ring.shape[1]} heads, {heads} of each: there is none"
        )
    joins = joint_store(by.store)
    parts = ("keys", stores.key_blocks, key_ring), ("values", stores.value_blocks, value_ring)
    for name, blocks, ring in parts:
        if ring.shape[2] != joins.block:
            return Reason(f"the ring of {name} has {ring.shape[2]} rows: expected {joins.block}")
        size = _bytes(joins, _rows(name, ring, heads))
        if blocks.dtype is not torch.uint8 or blocks.dim() != 3 or blocks.shape[2] != size:
            return Reason(
                f"blocks of {name} are {blocks.dtype} {list(blocks.shape)}: expected torch.uint8 [batch, "
                f"blocks, {size}]"
            )
    own = slice(member * heads, (member + 1) * heads)
    return attend_refuses(asked, key_ring[:, own], value_ring[:, own])


def _rows(what: str, ring: torch.Tensor, heads: int) -> JointRows:
    kind: Literal["keys", "values"] = "keys" if what == "keys" else "values"
    return JointRows(kind, ring.shape[1] // heads, heads, ring.shape[3], ring.dtype)


def _bytes(store: JoinsRows, spec: JointRows) -> int:
    sizes = (torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kinds_of(store, spec).values())
    return sum(sizes)


def _scratch(asked: Asked, stores: JointStores, by: JointMember) -> int:
    """Bytes that a call takes on a GPU beyond its output: rows of all blocks as one attention reads them,
    once from records and once beside the newest, and what they were in records."""
    query, key, (key_blocks, value_blocks, key_ring, value_ring) = asked.query, asked.key, stores
    if query.device.type != "cuda":
        return 0
    assert key is not None
    records = key_blocks.shape[1] * max(key_blocks.shape[2], value_blocks.shape[2])
    rows, size = (key_blocks.shape[1] + 1) * key_ring.shape[2], key_ring.element_size()
    ranks = [basis.shape[-1] for basis in (by.key_basis, by.value_basis) if basis is not None]
    widths = key_ring.shape[3], value_ring.shape[3]
    # Where rows come out of codes they are integers, and float32, on their way.
    made = records + rows * max(key.shape[1] * max(widths), *ranks, 0) * (2 * size + 4 * 7)
    return int(_torch.hint(query.shape[0]) * (made + rows * key.shape[1] * sum(widths) * size))


def _reference(asked: Asked, stores: JointStores, by: JointMember) -> torch.Tensor:
    query, key, value, positions, valid = asked[:5]
    assert key is not None and value is not None
    joins, batch, heads, member = joint_store(by.store), query.shape[0], key.shape[1], by.member
    block, slots = joins.block, stores.key_blocks.shape[1]
    here, closes = positions[-1] // block, positions[-1] % block == block - 1
    filled, looked = min(slots, max(0, asked.length - 1) // block), _may_look(positions)
    if looked:
        if int(positions[0]) // block != int(here):
            raise ValueError(
                f"attend_joint: positions {int(positions[0])} to {int(positions[-1])} of one call are of "
                f"several blocks of {block}"
            )
        filled = min(slots, int(here))
    newest, inside = here - 1, torch.arange(block, device=positions.device)
    blocks = newest - (newest - torch.arange(filled, device=positions.device)).remainder(slots)
    places = torch.cat([(blocks[:, None] * block + inside).flatten(), here * block + inside])
    # Slots behind the newest row hold rows of the block before.
    places = torch.where(places > positions[-1], -1, places)
    parts: list[torch.Tensor] = []
    for name, new, records, ring, basis in (
        ("keys", key, stores.key_blocks, stores.key_ring, by.key_basis),
        ("values", value, stores.value_blocks, stores.value_ring, by.value_basis),
    ):
        own = ring[:batch, member * heads : (member + 1) * heads]
        own.index_copy_(2, positions % block, new.to(ring.dtype))
        spec = _rows(name, ring, heads)
        far = parted_rows(joins, spec, records[:batch, :filled], member, basis).flatten(2, 3)
        parts.append(torch.cat([far, own], 2).to(query.dtype))
        if member == spec.members - 1 and not (looked and not bool(closes)):
            every = ring[:batch].view(batch, spec.members, heads, 1, block, -1)
            shown = None
            if valid is not None:
                at = (here * block + inside).clamp(max=valid.shape[1] - 1)
                shown = valid[:batch].index_select(1, at).unsqueeze(1)
            slot = here.remainder(slots).view(1)
            made = joined_records(joins, spec, every.transpose(0, 1), shown, basis)
            before = records[:batch].index_select(1, slot)
            records[:batch].index_copy_(1, slot, torch.where(closes, made, before))
    keys, values = parts
    return attention_at(asked, keys, values, places)


def _may_look(positions: torch.Tensor) -> bool:
    """Whether the host may ask for numbers: on an accelerator it would be held up."""
    return positions.device.type == "cpu"


attend_joint = AttendOperator(
    "attend_joint",
    JointStores,
    JointMember,
    summary="attends over what several attentions keep in one store, block by block",
    reference=_reference,
    refuses=_refuses,
    value_width=lambda stores, _: stores.value_ring.shape[3],
    scratch=_scratch,
)


def attention_joint(
    store: JoinsRows,
    asked: Asked,
    member: int,
    bases: tuple[torch.Tensor | None, torch.Tensor | None],
) -> torch.Tensor:
    """What ``attend_joint`` gives for all rows ``query`` [B, H, S, D] of attention ``member`` at once, of
    ``key`` [M, B, Hkv, S, D] and ``value`` [M, B, Hkv, S, Dv], without rings and records."""
    query, key, value, places, valid = asked[:5]
    assert key is not None and value is not None
    batch, rows, block = query.shape[0], query.shape[2], store.block
    count = rows // block
    shown = None if valid is None else valid[:batch, : count * block].reshape(batch, count, block)
    joined: list[torch.Tensor] = []
    for name, every, basis in zip(("keys", "values"), (key, value), bases, strict=True):
        kind: Literal["keys", "values"] = "keys" if name == "keys" else "values"
        spec = JointRows(kind, every.shape[0], every.shape[2], every.shape[4], every.dtype)
        blocks = every[:, :, :, : count * block].reshape(*every.shape[:3], count, block, every.shape[4])
        joined.append(joined_rows(store, spec, blocks, shown, member, basis).flatten(2, 3))
    outputs = []
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        keys, values = (
            torch.cat([far[:, :, :start], every[member, :, :, start:stop]], 2).to(query.dtype)
            for far, every in zip(joined, (key, value), strict=True)
        )
        part = asked._replace(query=query[:, :, start:stop], positions=places[start:stop])
        outputs.append(attention_at(part, keys, values, places[:stop]))
    return torch.cat(outputs, 2)
