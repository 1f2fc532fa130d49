"""Triton source of ``graphopt_kernels.philox``. Imports triton: import it lazily.

Kernel arguments are not annotated: triton evaluates annotations, and would take ``Any`` for a
global variable of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.philox import ROUNDS as _ROUNDS

__all__ = ["factors_of_block", "factors_of_tile"]

ROUNDS = tl.constexpr(_ROUNDS)


@triton.jit
def _kept(word, cut):  # type: ignore[no-untyped-def]
    return word.to(tl.int32, bitcast=True) >= cut


@triton.jit  # type: ignore[untyped-decorator]
def factors_of_block(number, start, cut, kept, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What ``BLOCK`` elements from ``start`` on, a multiple of 4, are multiplied by; ``number`` is the
    seed."""
    group = tl.full((), start, tl.int64) // 4 + tl.arange(0, BLOCK // 4)
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(number, low, high, low * 0, low * 0, ROUNDS)
    pairs = tl.join(tl.join(_kept(a, cut), _kept(c, cut)), tl.join(_kept(b, cut), _kept(d, cut)))
    return tl.where(tl.reshape(pairs, [BLOCK]), kept, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def factors_of_tile(  # type: ignore[no-untyped-def]
    number, item, row, column, cut, kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """What the softmax of a tile of scores is multiplied by: [ROWS, COLUMNS] from ``row`` and ``column`` on,
    multiples of 16, or ``TRANSPOSED``. ``number`` is the seed."""
    height: tl.constexpr = COLUMNS if TRANSPOSED else ROWS
    width: tl.constexpr = ROWS if TRANSPOSED else COLUMNS
    rows = (row // 2 + tl.arange(0, ROWS // 2)).to(tl.uint32)
    columns = (column // 2 + tl.arange(0, COLUMNS // 2)).to(tl.uint32)
    if TRANSPOSED:
        nothing = tl.zeros([COLUMNS // 2, ROWS // 2], tl.uint32)
        first = nothing + rows[None, :]
        second = nothing + columns[:, None]
    else:
        nothing = tl.zeros([ROWS // 2, COLUMNS // 2], tl.uint32)
        first = nothing + rows[:, None]
        second = nothing + columns[None, :]
    a, b, c, d = tl.philox(number, first, second, nothing + item.to(tl.uint32), nothing, ROUNDS)
    if TRANSPOSED:
        # Which eight of sixteen stands along the second dimension first.
        pairs = tl.join(tl.join(_kept(a, cut), _kept(c, cut)), tl.join(_kept(b, cut), _kept(d, cut)))
    else:
        pairs = tl.join(tl.join(_kept(a, cut), _kept(b, cut)), tl.join(_kept(c, cut), _kept(d, cut)))
    # [height / 2, width / 2, 2 of the width, 2 of the height]
    apart = tl.reshape(pairs, [height // 16, 8, width // 16, 8, 2, 2])
    whole = tl.reshape(tl.permute(apart, [0, 5, 1, 2, 4, 3]), [height, width])
    return tl.where(whole, kept, 0.0)
