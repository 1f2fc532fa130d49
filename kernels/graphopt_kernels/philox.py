"""Random numbers that are a function of a seed and a place: which elements dropout keeps.

Philox 4x32 makes four words of 32 bits of a counter of 128 bits and a key of 64, the seed. The counter says
where an element stands, so whoever asks about it again, in a backward or a recomputed forward, in tiles of
any size and on any device, gets the same answer, and no mask is kept::

    element i of a tensor     counter (i / 4 low, i / 4 high, 0, 0)                     word i % 4
    score [item, row, column] counter (row', column', item, 0), item over batch, head   word 2 a + b
        where a = row / 8 % 2, row' = row / 16 * 8 + row % 8; b and column' likewise

The four scores of a counter are eight rows and eight columns apart: a thread holds all of them, as tensor
cores lay tiles out over threads, transposed or not.

An element is kept where its word, read as a signed number, is at least ``(p - 1/2) * 2^32``. Seven rounds
are the fewest that pass all of TestU01's BigCrush (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3").

Here is what the Triton functions (``philox_triton``) compute, in ATen, bit for bit.
"""

from __future__ import annotations

import torch

__all__ = [
    "ROUNDS",
    "SEEDS",
    "cut_of",
    "drawn_seed",
    "factors_of_elements",
    "factors_of_scores",
    "philox",
    "rate_reason",
    "seed_reason",
]

ROUNDS = 7

SEEDS = 2**63 - 1
"""Seeds are drawn from 0 to this, without it."""

BLOCK_ELEMENTS = 2**17
"""Elements whose words are held at a time."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def drawn_seed(device: torch.device | str) -> torch.Tensor:
    """A seed, int64 [1], from the default generator of ``device``, which the host does not wait for."""
    return torch.randint(SEEDS, (1,), dtype=torch.int64, device=device)


def rate_reason(p: float) -> str:
    """Why dropout does not take this probability, or ``""``."""
    return "" if 0.0 <= p < 1.0 else f"takes a probability of at least 0 and below 1, got {p:g}"


def seed_reason(seed: torch.Tensor | None, device: torch.device) -> str:
    """Why this cannot be the seed of numbers on ``device``, or ``""``."""
    if seed is None or (seed.dtype is torch.int64 and seed.numel() == 1 and seed.device == device):
        return ""
    return f"takes a seed of one int64 on {device}, got {seed.dtype} {list(seed.shape)} on {seed.device}"


def cut_of(p: float) -> int:
    """An element is kept where its word, read as a signed number, is at least this."""
    return min(round(p * 2**32), _WORD) - 2**31


def philox(seed: torch.Tensor, counter: Words, rounds: int = ROUNDS) -> Words:
    """Four words for each of the counters, int64 tensors of numbers of 32 bits that broadcast; ``seed`` int64
    of one element."""
    a, b, c, d = counter
    low, high = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        # Products of 64 bits wrap around in int64, which has the same bits.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = ((right >> 32) & _WORD) ^ b ^ low, right & _WORD
        c, d = ((left >> 32) & _WORD) ^ d ^ high, left & _WORD
        low, high = (low + _STEPS[0]) & _WORD, (high + _STEPS[1]) & _WORD
    return a, b, c, d


def factors_of_elements(
    seed: torch.Tensor, p: float, start: int, stop: int, dtype: torch.dtype
) -> torch.Tensor:
    """What dropout multiplies the elements from ``start`` to ``stop`` by: 0 or 1 / (1 - p). ``start`` is a
    multiple of 4."""
    found = torch.empty(stop - start, dtype=dtype, device=seed.device)
    for first in range(start, stop, BLOCK_ELEMENTS):
        last = min(first + BLOCK_ELEMENTS, stop)
        group = torch.arange(first // 4, -(-last // 4), device=seed.device)
        nothing = torch.zeros_like(group)
        words = torch.stack(philox(seed, (group & _WORD, group >> 32, nothing, nothing)), -1).flatten()
        found[first - start : last - start] = _factors(words[: last - first], p, dtype)
    return found


def factors_of_scores(
    seed: torch.Tensor, p: float, items: int, rows: slice, columns: slice, dtype: torch.dtype
) -> torch.Tensor:
    """What dropout multiplies the softmax of scores by, [items, m, n]: 0 or 1 / (1 - p)."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    row = torch.arange(rows.start, rows.stop, device=seed.device)[:, None]
    # Whole counters of columns, of which the ends may not be asked for.
    first = columns.start // 16 * 16
    column = torch.arange(first // 2, -(-columns.stop // 16) * 8, device=seed.device)[None, :]
    late = (row >> 3) % 2 == 1
    row = (row >> 4) * 8 + row % 8
    found = torch.empty((items, height, width), dtype=dtype, device=seed.device)
    step = max(1, BLOCK_ELEMENTS // max(1, height * width))
    for start in range(0, items, step):
        item = torch.arange(start, min(start + step, items), device=seed.device)[:, None, None]
        a, b, c, d = philox(seed, (row, column, item, torch.zeros_like(row)))
        words = torch.stack((torch.where(late, c, a), torch.where(late, d, b)), -2)
        # [items, m, 2, n / 16 * 8]: the eight columns of a counter lie beside those of its other half.
        words = words.view(*words.shape[:-1], -1, 8).transpose(-3, -2).flatten(-3)
        found[start : start + step] = _factors(words[..., columns.start - first :][..., :width], p, dtype)
    return found


def _factors(words: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    # Signed numbers in the order of unsigned ones.
    kept = (words ^ 2**31) >= cut_of(p) + 2**31
    return kept.to(dtype) * (1.0 / (1.0 - p))
