"""Attention of new rows over keys and values that a store holds, with ATen operators.

What every store's operator computes, once it has keys, values and the position of each key::

    s[q, k] = softcap * tanh(scale * <query[q], key[k]> / softcap)      softcap 0: scale * <query[q], key[k]>
    s[q, k] += slope[head] * place[k]                                   ALiBi (Press et al. 2022)
    s[q, k] = -inf unless position[k] <= position[q]
                          and position[k] > position[q] - window        window 0: all before
                          and valid[position[k]]                        padding
    output[q] = sum_k softmax(s[q, :], sink[head])[k] * value[k]     sink: a logit without a value (gpt-oss)

``place[k]`` counts the valid keys before k, so that padding does not shift a bias. A row whose own key is
padding reads itself: what it gives is read by nobody, but it must not be NaN.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from graphopt.candidate import Reason
from graphopt.decoding.stores import SiteSpec
from graphopt_kernels.attend_operator import Asked, RowStores

__all__ = [
    "allowed_keys", "asked_at", "asked_whole", "attend_refuses", "attention_at", "attention_over",
    "attention_whole", "places_of", "rows_written",
]  # fmt: skip


def allowed_keys(
    positions: torch.Tensor,
    key_positions: torch.Tensor,
    valid: torch.Tensor | None,
    batch: int,
    window: int,
) -> torch.Tensor:
    """Which keys a row may read, bool [1 or B, 1, n, L].

    ``positions`` [n] of the rows, ``key_positions`` [L] of the keys, negative where there is none yet.
    ``valid`` bool [at least B, capacity]: what is no padding, by position.
    """
    rows = positions[:, None]
    allowed = (key_positions <= rows) & (key_positions >= 0)
    if window:
        allowed = allowed & (key_positions > rows - window)
    if valid is None:
        return allowed[None, None]
    known = valid[:batch].index_select(1, key_positions.clamp(min=0))
    return (allowed[None] & known[:, None, :] | (key_positions == rows)[None])[:, None]


def asked_at(query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Positions [m] of the rows of ``query`` [B, H, m, D], the last ones of the new rows at ``positions``
    [n]."""
    return positions[positions.shape[0] - query.shape[2] :]


def places_of(key_positions: torch.Tensor, valid: torch.Tensor | None, batch: int) -> torch.Tensor:
    """How many valid keys come before each key, float32 [1 or B, L]."""
    if valid is None:
        return key_positions.to(torch.float32)[None]
    counted = valid[:batch].to(torch.int64).cumsum(-1) - 1
    return counted.index_select(1, key_positions.clamp(min=0)).to(torch.float32)


def attention_over(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    allowed: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """[B, H, n, Dv] of ``query`` [B, H, n, D] over ``keys`` [B, Hkv, L, D] and ``values`` [B, Hkv, L, Dv].

    ``allowed`` bool [1 or B, 1, n, L], ``bias`` float32 [1 or B, H, 1 or n, L] or ``None``, ``sinks`` [H] or
    ``None``. Keys are not repeated for the heads that share them.
    """
    if not softcap and sinks is None:
        mask = allowed
        if bias is not None:
            mask = torch.where(allowed, bias, float("-inf")).to(query.dtype)
        shared = query.shape[1] != keys.shape[1]
        output: torch.Tensor = functional.scaled_dot_product_attention(
            query, keys, values, mask, scale=scale, enable_gqa=shared
        )
        return output
    batch, heads, rows, width = query.shape
    groups = keys.shape[1]
    grouped = query.reshape(batch, groups, heads // groups * rows, width)
    scores = torch.matmul(grouped, keys.transpose(2, 3)).view(batch, heads, rows, -1) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.float().masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, heads, 1, 1).expand(batch, heads, rows, 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[2]].to(values.dtype)
    output = torch.matmul(weights.reshape(batch, groups, heads // groups * rows, -1), values)
    return output.view(batch, heads, rows, -1)


def attention_at(
    asked: Asked,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_positions: torch.Tensor,
    also: torch.Tensor | None = None,
) -> torch.Tensor:
    """``attention_over`` keys and values at ``key_positions`` [L], negative where there is none yet.

    ``also`` bool [n, L]: which of them a row reads, of those that it may.
    """
    batch = asked.query.shape[0]
    rows = asked_at(asked.query, asked.positions)
    allowed = allowed_keys(rows, key_positions, asked.valid, batch, asked.window)
    if also is not None:
        allowed = allowed & also
    bias = None
    if asked.slopes is not None:
        places = places_of(key_positions, asked.valid, batch)
        bias = asked.slopes.float()[None, :, None, None] * places[:, None, None]
    return attention_over(asked.query, keys, values, allowed, bias, asked.sinks, asked.scale, asked.softcap)


def rows_written(asked: Asked, stores: RowStores) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, Hkv, L, D or Dv] of all positions that a call may read, once the new rows are
    written at theirs."""
    positions, length = asked.positions, asked.length
    keys, values = (store[: asked.query.shape[0]] for store in stores)
    if asked.key is not None and asked.value is not None:
        keys.index_copy_(2, positions, asked.key.to(keys.dtype))
        values.index_copy_(2, positions, asked.value.to(values.dtype))
    if positions.device.type == "cpu":
        # Free to look at here; on an accelerator it would hold up the host.
        length = min(length, int(positions[-1]) + 1)
    return keys[:, :, :length], values[:, :, :length]


def asked_whole(
    site: SiteSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> Asked:
    """What all rows [B, heads, S, width] of a sequence of ``site`` ask at once."""
    rows = query.shape[2]
    places = torch.arange(rows, device=query.device)
    return Asked(
        query, key, value, places, valid, slopes, sinks, site.scale, site.softcap, site.mask.window, rows
    )


def attention_whole(asked: Asked) -> torch.Tensor:
    """What stores that keep rows as they are give for all rows of a sequence at once."""
    assert asked.key is not None and asked.value is not None
    return attention_at(asked, asked.key, asked.value, asked.positions)


def attend_refuses(asked: Asked, key_store: torch.Tensor, value_store: torch.Tensor) -> Reason | None:
    """``None``, or why stores that hold rows as they are do not take these arguments."""
    query, positions, valid = asked.query, asked.positions, asked.valid
    if query.dim() != 4:
        return Reason(f"the query has shape {list(query.shape)}: expected [batch, heads, rows, width]")
    batch, heads, rows, width = query.shape
    for name, store in (("keys", key_store), ("values", value_store)):
        if store.dim() != 4:
            return Reason(f"the store of {name} has shape {list(store.shape)}: expected four dimensions")
    groups = key_store.shape[1]
    if heads % groups or value_store.shape[1] != groups:
        return Reason(f"{heads} heads of queries do not share {groups} heads of keys evenly")
    if key_store.shape[3] != width:
        return Reason(f"queries have {width} elements a head, the store of keys {key_store.shape[3]}")
    if (asked.key is None) is not (asked.value is None):
        return Reason("keys and values come together: one of them is missing")
    # A step's length may be a symbol, of which nothing is asked.
    is_last = isinstance(rows, int) and rows == 1 and positions.dim() == 1
    if positions.dtype is not torch.int64 or (not is_last and list(positions.shape) != [rows]):
        return Reason(
            f"positions are {positions.dtype} {list(positions.shape)}: expected torch.int64 of shape [{rows}]"
        )
    for name, new, store in (("key", asked.key, key_store), ("value", asked.value, value_store)):
        expected = [batch, groups, positions.shape[0], store.shape[3]]
        if new is not None and list(new.shape) != expected:
            return Reason(f"the new {name} has shape {list(new.shape)}: expected {expected}")
    if valid is not None and (valid.dtype is not torch.bool or valid.dim() != 2):
        return Reason(f"valid is {valid.dtype} {list(valid.shape)}: expected torch.bool [batch, positions]")
    for name, numbers in (("slopes", asked.slopes), ("sinks", asked.sinks)):
        if numbers is not None and list(numbers.shape) != [heads]:
            return Reason(f"{name} have shape {list(numbers.shape)}: expected [{heads}]")
    return None
