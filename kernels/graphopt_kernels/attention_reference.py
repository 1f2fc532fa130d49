"""Attention with ATen operators, a few rows of queries at a time: the whole scores are never held.

What ``graphopt::attention`` runs where it has no kernel, and what its kernels are compared with. Arithmetic
is float32 (float64 for float64). A slice of rows reads the keys that some row of it may see and no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

__all__ = [
    "HIDDEN",
    "SLICE_ELEMENTS",
    "arithmetic_in",
    "attention_backward_reference",
    "attention_reference",
    "gradient_buffers",
    "result_buffers",
]

HIDDEN = -16384 * math.log(2)
"""Score of what a finite bias hides, whatever it was: a row of nothing else is even, as where the bias is
added and rounded, and its log-sum-exp still tells how many they are."""

SLICE_ELEMENTS = 2**20
"""Scores that are held at a time, where a row of each head has no more."""


def arithmetic_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums for queries of ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def result_buffers(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised output [B, H, M, Dv] and log-sum-exp [B, H, M]."""
    batch, heads, rows, _ = query.shape
    lse = query.new_empty((batch, heads, rows), dtype=arithmetic_in(query.dtype))
    return _heads_inside(query, batch, heads, rows, value.shape[-1]), lse


def gradient_buffers(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised gradients; those that ``output_mask`` leaves out have no elements."""
    found = [
        _heads_inside(tensor, *tensor.shape) if wanted else tensor.new_empty(0)
        for tensor, wanted in zip((query, key, value), output_mask[:3], strict=True)
    ]
    if output_mask[3] and bias is not None:
        return found[0], found[1], found[2], bias.new_empty(bias.shape)
    return found[0], found[1], found[2], query.new_empty(0)


def _heads_inside(like: torch.Tensor, batch: int, heads: int, rows: int, width: int) -> torch.Tensor:
    """[B, H, M, D] whose memory is [B, M, H, D], as projections write it and read it."""
    return like.new_empty((batch, rows, heads, width)).transpose(1, 2)


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    factors: Callable[[slice, slice], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``attention`` computes, with ATen operators. ``factors``: what the softmax of rows and columns is
    multiplied by, [B, H, m, n], for dropout."""
    output, lse = result_buffers(query, value)
    for rows, columns in _slices(query, key, left, right):
        if columns.stop <= columns.start:
            output[:, :, rows] = 0.0
            lse[:, :, rows] = -math.inf
            continue
        scores, _ = _scores(query, key, bias, scale, softcap, left, right, rows, columns)
        highest = scores.amax(-1, keepdim=True)
        scores.sub_(highest.masked_fill(highest == -math.inf, 0.0)).exp_()
        total = scores.sum(-1, keepdim=True)
        lse[:, :, rows] = (highest + total.log()).squeeze(-1)
        if factors is not None:
            scores *= factors(rows, columns)
        # Not by the log-sum-exp, which says less of a row that is hidden whole.
        result = _grouped(scores, value[:, :, columns].to(scores.dtype))
        output[:, :, rows] = result / total.masked_fill(total == 0.0, 1.0)
    return output, lse


def attention_backward_reference(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    output_mask: Sequence[bool],
    factors: Callable[[slice, slice], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``attention_backward`` computes, with ATen operators, and the ``factors`` of the forward."""
    exact = arithmetic_in(query.dtype)
    d_query, d_key, d_value, d_bias = gradient_buffers(query, key, value, bias, output_mask)
    # Keys, values and a bias get something from several slices.
    sums = [
        torch.zeros(buffer.shape, dtype=exact, device=buffer.device) for buffer in (d_key, d_value, d_bias)
    ]
    for rows, columns in _slices(query, key, left, right):
        if columns.stop <= columns.start:
            if output_mask[0]:
                d_query[:, :, rows] = 0.0
            continue
        scores, slope = _scores(query, key, bias, scale, softcap, left, right, rows, columns)
        weights = _weights(scores, lse[:, :, rows])
        dy = grad[:, :, rows].to(exact)
        factor = None if factors is None else factors(rows, columns)
        if output_mask[2]:
            kept = weights if factor is None else weights * factor
            sums[1][:, :, columns] += _summed_over_group(kept, dy, key.shape[1])
        d_scores = _grouped(dy, value[:, :, columns].to(exact).transpose(-2, -1))
        if factor is not None:
            d_scores *= factor
        d_scores -= (dy * output[:, :, rows].to(exact)).sum(-1, keepdim=True)
        d_scores *= weights
        if output_mask[3] and bias is not None:
            _add_broadcast(sums[2], d_scores, rows, columns)
        if slope is not None:
            d_scores *= slope
        d_scores *= scale
        if output_mask[0]:
            d_query[:, :, rows] = _grouped(d_scores, key[:, :, columns].to(exact))
        if output_mask[1]:
            sums[0][:, :, columns] += _summed_over_group(d_scores, query[:, :, rows].to(exact), key.shape[1])
    for buffer, total in zip((d_key, d_value, d_bias), sums, strict=True):
        buffer.copy_(total)
    return d_query, d_key, d_value, d_bias


def _slices(
    query: torch.Tensor, key: torch.Tensor, left: int | None, right: int | None
) -> Iterator[tuple[slice, slice]]:
    """Rows of queries with the keys that some of them may see, which are none where ``stop <= start``."""
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    if not batch * heads * rows:
        return
    step = max(1, SLICE_ELEMENTS // max(1, batch * heads * keys))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first = 0 if left is None else max(0, start - left)
        last = keys if right is None else min(keys, stop + right)
        yield slice(start, stop), slice(first, max(last, 0))


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    rows: slice,
    columns: slice,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores of a slice [B, H, m, n], minus infinity where they are hidden, and the slope of the softcap."""
    exact = arithmetic_in(query.dtype)
    scores = _grouped(query[:, :, rows].to(exact), key[:, :, columns].to(exact).transpose(-2, -1))
    scores *= scale
    slope = None
    if softcap:
        scores /= softcap
        scores.tanh_()
        slope = 1.0 - scores.square()
        scores *= softcap
    if bias is not None:
        whole = bias.expand(*query.shape[:3], key.shape[2])[:, :, rows, columns]
        if bias.dtype is torch.bool:
            scores.masked_fill_(~whole, -math.inf)
        else:
            scores += whole
            # Half of the least number of the dtype, or what is as good as that.
            low = whole <= (-32752.0 if bias.dtype is torch.float16 else -1e30)
            scores.masked_fill_(low & (whole != -math.inf), HIDDEN)
    if left is not None or right is not None:
        distance = torch.arange(columns.start, columns.stop, device=query.device)[None, :]
        distance = distance - torch.arange(rows.start, rows.stop, device=query.device)[:, None]
        if left is not None:
            scores.masked_fill_(distance < -left, -math.inf)
        if right is not None:
            scores.masked_fill_(distance > right, -math.inf)
    return scores, slope


def _weights(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Softmax, written over the scores; zero in rows that are hidden whole."""
    shift = lse.masked_fill(lse == -math.inf, math.inf)
    return scores.sub_(shift[..., None]).exp_()


def _grouped(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Products [B, H, m, x] of ``left`` [B, H, m, y] and the heads of ``right`` [B, Hkv, y, x] that groups
    share, without copies of them."""
    batch, heads, rows, width = left.shape
    few = right.shape[1]
    folded = left.reshape(batch, few, heads // few * rows, width)
    return (folded @ right).view(batch, heads, rows, right.shape[-1])


def _summed_over_group(left: torch.Tensor, right: torch.Tensor, few: int) -> torch.Tensor:
    """``left`` [B, H, m, n] transposed times ``right`` [B, H, m, x], summed over groups: [B, Hkv, n, x]."""
    batch, heads, rows, _ = left.shape
    folded = [x.reshape(batch, few, heads // few * rows, x.shape[-1]) for x in (left, right)]
    return folded[0].transpose(-2, -1) @ folded[1]


def _add_broadcast(total: torch.Tensor, d_scores: torch.Tensor, rows: slice, columns: slice) -> None:
    """Add the gradient of a slice to that of a bias, summed over what the bias is broadcast over."""
    shape = (1,) * (4 - total.dim()) + tuple(total.shape)
    summed = d_scores
    for axis, size in enumerate(shape):
        if size == 1:
            summed = summed.sum(axis, keepdim=True)
    place = total.view(shape)
    place = place if shape[2] == 1 else place[:, :, rows]
    place = place if shape[3] == 1 else place[..., columns]
    place += summed
