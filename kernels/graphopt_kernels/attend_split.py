"""Attention over a store that keeps every position for some heads, for the others the first and the newest.

``graphopt::attend_split``: heads of keys in ``whole`` read all positions (retrieval heads: RazorAttention,
Tang et al. 2024); every other head reads position p from row q where ``p < first`` (attention sinks:
StreamingLLM, Xiao et al. 2024) or ``p > q - near``. Position p of such a head is in slot p where it is one of
the first, else in slot ``first + (p - first) % near``. Positions are those of the sequence: keys are not
rotated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_full import attend_full_reference
from graphopt_kernels.attend_reference import (
    allowed_keys,
    asked_at,
    attend_supports,
    attention_over,
    places_of,
)

__all__ = ["attend_split", "attend_split_reference", "attend_split_supports", "attention_split"]

_STORES = ("key_all", "value_all", "key_near", "value_near")


@torch.library.custom_op("graphopt::attend_split", mutates_args=_STORES)
def attend_split(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_all: torch.Tensor,
    value_all: torch.Tensor,
    key_near: torch.Tensor,
    value_near: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    whole: Sequence[int],
    first: int,
) -> torch.Tensor:
    """[B, H, n, Dv] of ``query`` [B, H, n, D], dense.

    ``key`` [B, Hkv, n, D] and ``value`` [B, Hkv, n, Dv] are of consecutive ``positions`` int64 [n], those
    right behind what the stores hold: ``key_all``, ``value_all`` [.., len(whole), capacity, ..] of the heads
    ``whole``, ``key_near``, ``value_near`` [.., Hkv - len(whole), first + near, ..] of the others, at least B
    sequences. All else as for ``graphopt::attend_full``. There is no gradient.
    """
    return attend_split_reference(
        query, key, value, key_all, value_all, key_near, value_near, positions, valid, slopes, sinks, scale,
        softcap, window, length, whole, first,
    )  # fmt: skip


@attend_split.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_all: torch.Tensor,
    value_all: torch.Tensor,
    key_near: torch.Tensor,
    value_near: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    whole: Sequence[int],
    first: int,
) -> torch.Tensor:
    reason = attend_split_supports(
        query, key, value, key_all, value_all, key_near, value_near, positions, valid, slopes, sinks, scale,
        softcap, window, length, whole, first,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"attend_split: {reason}")
    return query.new_empty((*query.shape[:3], value_near.shape[3]))


def attend_split_supports(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_all: torch.Tensor,
    value_all: torch.Tensor,
    key_near: torch.Tensor,
    value_near: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    whole: Sequence[int],
    first: int,
    *_: Any,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if key is None or value is None:
        return Reason("what a head keeps of the newest positions is not what the first of several rows read")
    heads = key_near.shape[1] + len(whole)
    if list(whole) != sorted({*whole}) or any(not 0 <= head < heads for head in whole):
        return Reason(f"whole heads {list(whole)}: expected some of 0 to {heads - 1}, ascending")
    if key_all.shape[1] != len(whole) or key_near.shape[2] <= first:
        return Reason(
            f"stores have {key_all.shape[1]} whole heads and {key_near.shape[2]} slots: expected "
            f"{len(whole)} heads, and more than the {first} first positions"
        )
    like = key_near.new_empty((*key_near.shape[:1], heads, *key_near.shape[2:]))
    values = value_near.new_empty((*value_near.shape[:1], heads, *value_near.shape[2:]))
    return attend_supports(
        query, key, value, like, values, positions, valid, slopes, sinks, scale, softcap, window
    )


def attend_split_reference(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_all: torch.Tensor,
    value_all: torch.Tensor,
    key_near: torch.Tensor,
    value_near: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    whole: Sequence[int],
    first: int,
) -> torch.Tensor:
    """What ``attend_split`` does, with ATen operators."""
    assert key is not None and value is not None
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    for kept, others in _parts(key.shape[1], whole):
        if not kept:
            continue
        chosen, readers = _indices(kept, query, key)
        given = query.index_select(1, readers), key.index_select(1, chosen), value.index_select(1, chosen)
        own_slopes, own_sinks = (None if x is None else x.index_select(0, readers) for x in (slopes, sinks))
        if others:
            made = attend_full_reference(
                *given,
                key_all,
                value_all,
                positions,
                valid,
                own_slopes,
                own_sinks,
                scale,
                softcap,
                window,
                length,
            )
        else:
            made = _near(
                *given,
                key_near,
                value_near,
                positions,
                valid,
                own_slopes,
                own_sinks,
                scale,
                softcap,
                window,
                first,
            )
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


def _near(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    first: int,
) -> torch.Tensor:
    """Heads that keep the first and the newest positions."""
    batch, rows = query.shape[0], positions.shape[0]
    keys, values = key_store[:batch], value_store[:batch]
    near = keys.shape[2] - first
    if rows == 1:
        _write(keys, values, key, value, positions, first)
        places, held, given = (
            _places(positions[-1], first, near),
            keys.to(query.dtype),
            values.to(query.dtype),
        )
    else:
        places = torch.cat([_places(positions[0] - 1, first, near), positions])
        held = torch.cat([keys.to(query.dtype), key], 2)
        given = torch.cat([values.to(query.dtype), value], 2)
    asked = asked_at(query, positions)
    allowed = allowed_keys(asked, places, valid, batch, window)
    allowed = allowed & ((places < first) | (places > asked[:, None] - near))
    bias = None
    if slopes is not None:
        bias = slopes.float()[None, :, None, None] * places_of(places, valid, batch)[:, None, None]
    output = attention_over(query, held, given, allowed, bias, sinks, scale, softcap)
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


def attention_split(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    whole: Sequence[int],
    first: int,
    near: int,
) -> torch.Tensor:
    """What ``attend_split`` gives for all rows of a sequence at once, without stores."""
    batch, rows = query.shape[0], query.shape[2]
    places = torch.arange(rows, device=query.device)
    allowed = allowed_keys(places, places, valid, batch, window)
    close = (places < first) | (places > places[:, None] - near)
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    for kept, others in _parts(key.shape[1], whole):
        if not kept:
            continue
        chosen, readers = _indices(kept, query, key)
        bias = None
        if slopes is not None:
            at = places_of(places, valid, batch)[:, None, None]
            bias = slopes.index_select(0, readers).float()[None, :, None, None] * at
        made = attention_over(
            query.index_select(1, readers), key.index_select(1, chosen), value.index_select(1, chosen),
            allowed if others else allowed & close, bias,
            None if sinks is None else sinks.index_select(0, readers), scale, softcap,
        )  # fmt: skip
        output.index_copy_(1, readers, made)
    return output
