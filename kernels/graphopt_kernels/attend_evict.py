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

from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.decoding.cache_scores import ScoreContext, known_cache_scores, scored
from graphopt_kernels.attend_reference import allowed_keys, attend_supports, places_of

__all__ = ["attend_evict", "attend_evict_reference", "attend_evict_supports", "attention_evicting"]

_STORES = ("key_store", "value_store", "place_store", "score_store")


@torch.library.custom_op("graphopt::attend_evict", mutates_args=_STORES)
def attend_evict(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    place_store: torch.Tensor,
    score_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    policy: str,
    recent: int,
) -> torch.Tensor:
    """[B, H, n, Dv] of ``query`` [B, H, n, D], dense.

    ``key`` [B, Hkv, n, D] and ``value`` [B, Hkv, n, Dv] are of consecutive ``positions`` int64 [n].
    ``key_store`` [.., Hkv, L, D], ``value_store`` [.., Hkv, L, Dv], ``place_store`` int64 and ``score_store``
    float32 [.., Hkv, L], of at least B sequences. All else as for ``graphopt::attend_full``. There is no
    gradient.
    """
    return attend_evict_reference(
        query, key, value, key_store, value_store, place_store, score_store, positions, valid, slopes, sinks,
        scale, softcap, window, length, policy, recent,
    )  # fmt: skip


@attend_evict.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    place_store: torch.Tensor,
    score_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    policy: str,
    recent: int,
) -> torch.Tensor:
    reason = attend_evict_supports(
        query, key, value, key_store, value_store, place_store, score_store, positions, valid, slopes, sinks,
        scale, softcap, window, length, policy, recent,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"attend_evict: {reason}")
    return query.new_empty((*query.shape[:3], value_store.shape[3]))


def attend_evict_supports(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    place_store: torch.Tensor,
    score_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    policy: str,
    recent: int,
    *_: Any,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if key is None or value is None:
        return Reason("what a row has driven out is not what the rows before it read")
    if list(positions.shape) != [query.shape[2]]:
        return Reason(
            f"{query.shape[2]} rows ask at positions {list(positions.shape)}: all that come are scored by"
        )
    if policy not in (known := known_cache_scores()):
        return Reason(f"policy {policy!r}: expected one of {', '.join(known)}")
    if not 0 < recent < key_store.shape[2]:
        return Reason(
            f"recent={recent}: expected 1 to {key_store.shape[2] - 1}, of {key_store.shape[2]} slots"
        )
    for name, store, dtype in (("places", place_store, torch.int64), ("scores", score_store, torch.float32)):
        if store.dtype is not dtype or store.shape != key_store.shape[:3]:
            return Reason(
                f"{name} are {store.dtype} {list(store.shape)}: expected {dtype} {list(key_store.shape[:3])}"
            )
    return attend_supports(
        query, key, value, key_store, value_store, positions, valid, slopes, sinks, scale, softcap, window
    )


def attend_evict_reference(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    place_store: torch.Tensor,
    score_store: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    length: int,
    policy: str,
    recent: int,
) -> torch.Tensor:
    """What ``attend_evict`` does, with ATen operators."""
    assert key is not None and value is not None
    batch, heads = query.shape[:2]
    keys, values, places, scores = (
        store[:batch] for store in (key_store, value_store, place_store, score_store)
    )
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
        slot = _driven_out(places, scores, at, valid, batch, recent)[..., None]
        for store, new in ((keys, key[:, :, row : row + 1]), (values, value[:, :, row : row + 1])):
            index = slot[..., None].expand(-1, -1, -1, store.shape[3])
            store.scatter_(2, index, new.to(store.dtype))
        places.scatter_(2, slot, (at + 1).expand_as(slot))
        scores.scatter_(2, slot, torch.where(again, scores.gather(2, slot), 0.0))
        held = places - 1
        allowed = (held >= 0) & ((held > at - window) if window else torch.ones_like(held, dtype=torch.bool))
        if valid is not None:
            allowed = allowed & (_known(valid, held, batch) | (held == at))
        bias = None
        if slopes is not None:
            place = held.float() if counted is None else _taken(counted, held).float()
            bias = slopes.float().view(1, groups, -1, 1) * place[:, :, None]
        asked = query[:, :, row].reshape(batch, groups, heads // groups, -1)
        shares = _shares(asked, keys.to(query.dtype), allowed, bias, sinks, scale, softcap)
        made = torch.matmul(shares.to(query.dtype), values.to(query.dtype))
        outputs.append(made.reshape(batch, heads, 1, width))
        kept = held >= 0
        if valid is not None:
            kept = kept & _known(valid, held, batch)
        given = ScoreContext(scores, shares.mean(2), asked, keys, values, held, at, kept)
        scores.copy_(torch.where(again, scores, scored(policy, given)))
    return torch.cat(outputs, 2)


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
    asked: torch.Tensor,
    keys: torch.Tensor,
    allowed: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """How much of each slot is read, float32 [B, Hkv, g, L], of queries [B, Hkv, g, D]."""
    # In float32: of two keys that are read about as much, who goes must not hang on an order of sums.
    logits = torch.matmul(asked.float(), keys.float().transpose(2, 3)) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~allowed[:, :, None], float("-inf"))
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.float().view(1, asked.shape[1], -1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def attention_evicting(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    policy: str,
    recent: int,
    keep: int,
) -> torch.Tensor:
    """What ``attend_evict`` gives for all rows of a sequence at once, without slots: positions are crossed
    out."""
    batch, heads, rows = query.shape[:3]
    groups = key.shape[1]
    places = torch.arange(rows, device=query.device)
    readable = allowed_keys(places, places, valid, batch, window).expand(batch, 1, rows, rows)
    asked = query.view(batch, groups, heads // groups, rows, -1)
    logits = torch.matmul(asked.float(), key[:, :, None].float().transpose(3, 4)) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
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
            scores, shares.mean(2), asked[:, :, :, row], key, value, places.expand_as(scores), places[row],
            kept,
        )  # fmt: skip
        scores = torch.where(left, scored(policy, given), scores)
    return torch.cat(outputs, 2)
