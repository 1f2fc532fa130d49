"""Attention over a store that keeps every position for some heads, for the others the first and the newest.

``graphopt::attend_split``: heads of keys in ``whole`` read all positions (retrieval heads: RazorAttention,
Tang et al. 2024); every other head reads position p from row q where ``p < first`` (attention sinks:
StreamingLLM, Xiao et al. 2024) or ``p > q - near``. Position p of such a head is in slot p where it is one of
the first, else in slot ``first + (p - first) % near``. Positions are those of the sequence: keys are not
rotated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_full import read_full
from graphopt_kernels.attend_operator import Asked, AttendOperator, RowStores
from graphopt_kernels.attend_reference import asked_at, attend_refuses, attention_at

__all__ = ["SplitHeads", "SplitStores", "attend_split", "attention_split"]


class SplitStores(NamedTuple):
    """``key_all``, ``value_all`` [.., len(whole), capacity, D or Dv] of the heads ``whole``, ``key_near``,
    ``value_near`` [.., Hkv - len(whole), first + near, D or Dv] of the others, of at least B sequences."""

    key_all: torch.Tensor
    value_all: torch.Tensor
    key_near: torch.Tensor
    value_near: torch.Tensor


class SplitHeads(NamedTuple):
    """``whole``: heads of keys that read all positions, ascending; ``first``: how many of the first positions
    the others read. New rows are of consecutive positions, those right behind what the stores hold."""

    whole: Sequence[int]
    first: int


def _reference(asked: Asked, stores: SplitStores, heads: SplitHeads) -> torch.Tensor:
    query, key, value = asked[:3]
    assert key is not None and value is not None
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    for kept, others in _parts(key.shape[1], heads.whole):
        if not kept:
            continue
        chosen, readers = _indices(kept, query, key)
        part = _of_heads(asked, readers)._replace(
            key=key.index_select(1, chosen), value=value.index_select(1, chosen)
        )
        made = read_full(part, RowStores(*stores[:2])) if others else _near(part, *stores[2:], heads.first)
        output.index_copy_(1, readers, made)
    return output


def _parts(heads: int, whole: Sequence[int]) -> tuple[tuple[list[int], bool], ...]:
    """Heads of keys that keep all, and those that do not."""
    return (list(whole), True), ([head for head in range(heads) if head not in whole], False)


def _indices(
    kept: Sequence[int], query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads ``kept`` of keys, and the heads of queries that share them."""
    chosen = torch.tensor(list(kept), device=query.device)
    each = query.shape[1] // key.shape[1]
    return chosen, (chosen[:, None] * each + torch.arange(each, device=query.device)).flatten()


def _of_heads(asked: Asked, readers: torch.Tensor) -> Asked:
    """What the heads ``readers`` of queries ask."""
    slopes, sinks = (None if x is None else x.index_select(0, readers) for x in (asked.slopes, asked.sinks))
    return asked._replace(query=asked.query.index_select(1, readers), slopes=slopes, sinks=sinks)


def _near(asked: Asked, key_store: torch.Tensor, value_store: torch.Tensor, first: int) -> torch.Tensor:
    """Heads that keep the first and the newest positions."""
    query, key, value, positions = asked[:4]
    assert key is not None and value is not None
    batch, rows = query.shape[0], positions.shape[0]
    keys, values = key_store[:batch], value_store[:batch]
    near = keys.shape[2] - first
    if rows == 1:
        _write(keys, values, key, value, positions, first)
        places = _places(positions[-1], first, near)
        held, given = keys.to(query.dtype), values.to(query.dtype)
    else:
        places = torch.cat([_places(positions[0] - 1, first, near), positions])
        held = torch.cat([keys.to(query.dtype), key], 2)
        given = torch.cat([values.to(query.dtype), value], 2)
    close = (places < first) | (places > asked_at(query, positions)[:, None] - near)
    output = attention_at(asked, held, given, places, close)
    if rows > 1:
        _write(keys, values, key, value, positions, first)
    return output


def _write(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    first: int,
) -> None:
    near = keys.shape[2] - first
    last, begun = positions[-near:], positions[:first]
    slots = torch.where(last < first, last, first + (last - first).remainder(near))
    for store, new in ((keys, key), (values, value)):
        store.index_copy_(2, slots, new[:, :, -near:].to(store.dtype))
        if first:
            # Slots of rows that are none of the first, each another one, keep what is in them.
            at, is_first = begun.remainder(first), (begun < first)[:, None]
            kept = torch.where(is_first, new[:, :, :first].to(store.dtype), store.index_select(2, at))
            store.index_copy_(2, at, kept)


def _places(last: torch.Tensor, first: int, near: int) -> torch.Tensor:
    """The position in each slot once ``last`` has come, -1 where there is none."""
    slots = torch.arange(first, device=last.device)
    begun = torch.where(slots <= last, slots, -1)
    ring = last - (last - first - torch.arange(near, device=last.device)).remainder(near)
    return torch.cat([begun, torch.where(ring >= first, ring, -1)])


def _refuses(asked: Asked, stores: SplitStores, heads: SplitHeads) -> Reason | None:
    if asked.key is None or asked.value is None:
        return Reason("what a head keeps of the newest positions is not what the first of several rows read")
    key_near, value_near, whole = stores.key_near, stores.value_near, heads.whole
    count = key_near.shape[1] + len(whole)
    if list(whole) != sorted({*whole}) or any(not 0 <= head < count for head in whole):
        return Reason(f"whole heads {list(whole)}: expected some of 0 to {count - 1}, ascending")
    if stores.key_all.shape[1] != len(whole) or key_near.shape[2] <= heads.first:
        return Reason(
            f"stores have {stores.key_all.shape[1]} whole heads and {key_near.shape[2]} slots: expected "
            f"{len(whole)} heads, and more than the {heads.first} first positions"
        )
    like = (store.new_empty((*store.shape[:1], count, *store.shape[2:])) for store in (key_near, value_near))
    return attend_refuses(asked, *like)


attend_split = AttendOperator(
    "attend_split",
    SplitStores,
    SplitHeads,
    summary="attends over the first and the newest positions, all positions for some heads",
    reference=_reference,
    refuses=_refuses,
    value_width=lambda stores, _: stores.value_near.shape[3],
)


def attention_split(asked: Asked, whole: Sequence[int], first: int, near: int) -> torch.Tensor:
    """What ``attend_split`` gives for all rows of a sequence at once, without stores."""
    query, key, value, places = asked[:4]
    assert key is not None and value is not None
    close = (places < first) | (places > places[:, None] - near)
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    for kept, others in _parts(key.shape[1], whole):
        if not kept:
            continue
        chosen, readers = _indices(kept, query, key)
        keys, values = key.index_select(1, chosen), value.index_select(1, chosen)
        part = _of_heads(asked, readers)
        output.index_copy_(1, readers, attention_at(part, keys, values, places, None if others else close))
    return output
