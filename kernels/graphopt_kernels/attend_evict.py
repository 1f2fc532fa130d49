"""Attention over a store of as many positions as there are slots, from which the least important one goes.

Each head of keys has ``L`` slots. The row at position q::

    slot        one that is empty, else the one of least score that is not among the newest ``recent``
    write       key, value, position + 1 (0: empty), score 0
    read        softmax over all slots
    score       what the policy makes of the score before and of what was read (``ScoreContext``)

Padding goes first. Rows of a prompt come one after another: what they give does not depend on how a prompt is
taken in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt.decoding.cache_scores import ScoreContext, known_cache_scores, scored
from graphopt_kernels.attend_operator import Asked, AttendOperator
from graphopt_kernels.attend_reference import allowed_keys, attend_refuses, places_of

__all__ = ["EvictPolicy", "EvictStores", "attend_evict", "attention_evicting"]


class EvictStores(NamedTuple):
    """``key_store`` [.., Hkv, L, D], ``value_store`` [.., Hkv, L, Dv], ``place_store`` int64 and
    ``score_store`` float32 [.., Hkv, L], of at least B sequences."""

    key_store: torch.Tensor
    value_store: torch.Tensor
    place_store: torch.Tensor
    score_store: torch.Tensor


class EvictPolicy(NamedTuple):
    """``policy``: what makes scores, by name; ``recent``: how many of the newest positions are never driven
    out. New rows are of consecutive positions."""

    policy: str
    recent: int


def _refuses(asked: Asked, stores: EvictStores, by: EvictPolicy) -> Reason | None:
    if asked.key is None or asked.value is None:
        return Reason("what a row has driven out is not what the rows before it read")
    if list(asked.positions.shape) != [asked.query.shape[2]]:
        return Reason(
            f"{asked.query.shape[2]} rows ask at positions {list(asked.positions.shape)}: all that come are "
            "scored by"
        )
    if by.policy not in (known := known_cache_scores()):
        return Reason(f"policy {by.policy!r}: expected one of {', '.join(known)}")
    shape = stores.key_store.shape
    if not 0 < by.recent < shape[2]:
        return Reason(f"recent={by.recent}: expected 1 to {shape[2] - 1}, of {shape[2]} slots")
    for name, store, dtype in zip(
        ("places", "scores"), stores[2:], (torch.int64, torch.float32), strict=True
    ):
        if store.dtype is not dtype or store.shape != shape[:3]:
            return Reason(f"{name} are {store.dtype} {list(store.shape)}: expected {dtype} {list(shape[:3])}")
    return attend_refuses(asked, *stores[:2])


def _reference(asked: Asked, stores: EvictStores, by: EvictPolicy) -> torch.Tensor:
    query, key, value, positions, valid, slopes = asked[:6]
    assert key is not None and value is not None
    batch, heads = query.shape[:2]
    keys, values, places, scores = (store[:batch] for store in stores)
    width, groups = value.shape[3], key.shape[1]
    counted = None if slopes is None or valid is None else valid[:batch].long().cumsum(-1) - 1
    outputs = []
    for row in range(query.shape[2]):
        at = positions[row]
        # Stores are not emptied between sequences: what is ahead of a row, or there before the first one, is
        # of another.
        other = (places > at + 1) | (at == 0)
        places.masked_fill_(other, 0)
        scores.masked_fill_(other, 0.0)
        # A row that is taken in twice is not read twice.
        again = (places == at + 1).any(-1, keepdim=True)
        slot = _driven_out(places, scores, at, valid, batch, by.recent)[..., None]
        for store, new in ((keys, key[:, :, row : row + 1]), (values, value[:, :, row : row + 1])):
            index = slot[..., None].expand(-1, -1, -1, store.shape[3])
            store.scatter_(2, index, new.to(store.dtype))
        places.scatter_(2, slot, (at + 1).expand_as(slot))
        scores.scatter_(2, slot, torch.where(again, scores.gather(2, slot), 0.0))
        held = places - 1
        allowed = held >= 0
        if asked.window:
            allowed = allowed & (held > at - asked.window)
        if valid is not None:
            allowed = allowed & (_known(valid, held, batch) | (held == at))
        bias = None
        if slopes is not None:
            place = held.float() if counted is None else _taken(counted, held).float()
            bias = slopes.float().view(1, groups, -1, 1) * place[:, :, None]
        rows = query[:, :, row].reshape(batch, groups, heads // groups, -1)
        shares = _shares(asked, rows, keys.to(query.dtype), allowed, bias)
        made = torch.matmul(shares.to(query.dtype), values.to(query.dtype))
        outputs.append(made.reshape(batch, heads, 1, width))
        kept = held >= 0
        if valid is not None:
            kept = kept & _known(valid, held, batch)
        given = ScoreContext(scores, shares.mean(2), rows, keys, values, held, at, kept)
        scores.copy_(torch.where(again, scores, scored(by.policy, given)))
    return torch.cat(outputs, 2)


attend_evict = AttendOperator(
    "attend_evict",
    EvictStores,
    EvictPolicy,
    summary="attends over as many positions as there are slots, the least important one going",
    reference=_reference,
    refuses=_refuses,
    value_width=lambda stores, _: stores.value_store.shape[3],
)


def _driven_out(
    places: torch.Tensor,
    scores: torch.Tensor,
    at: torch.Tensor,
    valid: torch.Tensor | None,
    batch: int,
    recent: int,
) -> torch.Tensor:
    """The slot that each head gives to position ``at``, int64 [B, Hkv]: its own where it is there."""
    infinity = float("inf")
    rank = torch.where(places - 1 > at - recent, infinity, scores)
    if valid is not None:
        rank = torch.where(_known(valid, places - 1, batch) | (rank == infinity), rank, -infinity)
    rank = torch.where(places == 0, -infinity, rank)
    # Of equals the oldest; a slot that is empty is older than all.
    oldest = torch.where(rank == rank.amin(-1, keepdim=True), places, torch.iinfo(torch.int64).max)
    return torch.where(places == at + 1, -1, oldest).argmin(-1)


def _taken(numbers: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """``numbers`` [B, C] at positions ``held`` [B, Hkv, L], negative ones those of position 0."""
    wide = numbers[:, None].expand(-1, held.shape[1], -1)
    return wide.gather(2, held.clamp(min=0))


def _known(valid: torch.Tensor, held: torch.Tensor, batch: int) -> torch.Tensor:
    return _taken(valid[:batch], held)


def _shares(
    asked: Asked,
    rows: torch.Tensor,
    keys: torch.Tensor,
    allowed: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """How much of each slot is read, float32 [B, Hkv, g, L], by ``rows`` [B, Hkv, g, D] of the queries."""
    # In float32: of two keys that are read about as much, who goes must not hang on an order of sums.
    logits = torch.matmul(rows.float(), keys.float().transpose(2, 3)) * asked.scale
    if asked.softcap:
        logits = torch.tanh(logits / asked.softcap) * asked.softcap
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~allowed[:, :, None], float("-inf"))
    if asked.sinks is None:
        return logits.softmax(-1)
    column = asked.sinks.float().view(1, rows.shape[1], -1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def attention_evicting(asked: Asked, policy: str, recent: int, keep: int) -> torch.Tensor:
    """What ``attend_evict`` gives for all rows of a sequence at once, without slots: positions are crossed
    out."""
    query, key, value, places, valid, slopes, sinks = asked[:7]
    assert key is not None and value is not None
    batch, heads, rows = query.shape[:3]
    groups = key.shape[1]
    readable = allowed_keys(places, places, valid, batch, asked.window).expand(batch, 1, rows, rows)
    asking = query.view(batch, groups, heads // groups, rows, -1)
    logits = torch.matmul(asking.float(), key[:, :, None].float().transpose(3, 4)) * asked.scale
    if asked.softcap:
        logits = torch.tanh(logits / asked.softcap) * asked.softcap
    if slopes is not None:
        at = places_of(places, valid, batch)[:, None, None, None]
        logits = logits + slopes.float().view(1, groups, -1, 1, 1) * at
    column = None if sinks is None else sinks.float().view(1, groups, -1, 1).expand(batch, -1, -1, 1)
    left = torch.zeros(batch, groups, rows, dtype=torch.bool, device=query.device)
    scores = torch.zeros(batch, groups, rows, device=query.device)
    outputs = []
    for row in range(rows):
        if row >= keep:
            old = left & (places <= row - recent)
            rank = scores.masked_fill(~old, float("inf"))
            if valid is not None:
                rank = rank.masked_fill(old & ~valid[:, None, :rows], float("-inf"))
            left.scatter_(2, rank.argmin(-1, keepdim=True), False)
        left[:, :, row] = True
        seen = logits[:, :, :, row].masked_fill(~(left & readable[:, :, row])[:, :, None], float("-inf"))
        shares = seen.softmax(-1) if column is None else torch.cat([seen, column], -1).softmax(-1)[..., :-1]
        outputs.append(torch.matmul(shares.to(value.dtype), value).reshape(batch, heads, 1, -1))
        kept = left if valid is None else left & valid[:, None, :rows]
        given = ScoreContext(
            scores, shares.mean(2), asking[:, :, :, row], key, value, places.expand_as(scores), places[row],
            kept,
        )  # fmt: skip
        scores = torch.where(left, scored(policy, given), scores)
    return torch.cat(outputs, 2)
