"""Products that read bfloat16 weights with exponents of four bits (``exponents.py``): in slices, in tiles.

As ``bytes_triton``, whose kernels these follow: the weight is the left-hand operand of tensor cores, rows of
x are padded to 8, a warp has its own slice of each sum. A byte of two exponents serves two weights, one of
each half of a row, so that every tensor is streamed 16 bytes a thread at a time.

A weight is its byte with the exponent in between, which takes three instructions::

    sign and mantissa   the byte, its sign repeated above it, as prmt does      s ssss ssss mmm mmmm
    exponent            the four bits moved to their place, plus the base       0 eeee eeee 000 0000
    weight              the first without the bits of the second, or the second

The weights that escape stand for a power of two with their sign, which can be told from the list alone: what
is missing is added to the sums in the end, in the order of the list. It is x times the difference, or, where
x is infinite, times the weight itself, as the sum is infinite of the same sign already, and 0 times infinity
has to be NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_kernel", "slices_kernel", "tile_kernel", "unpack_kernel", "weights"]

# Of four weights two each are neighbours in a row; the pairs may be of different rows, as in operands that
# warp groups take from registers.
_LOW: tl.constexpr = tl.constexpr(
    """{ .reg .b32 a, e;
    prmt.b32 e, $3, 0, 0x4140; shl.b32 e, e, 7; and.b32 e, e, 0x07800780; add.u32 e, e, $4;
    prmt.b32 a, $2, 0, 0x9180; lop3.b32 $0, a, 0x807F807F, e, 0xEA;
    prmt.b32 e, $3, 0, 0x4342; shl.b32 e, e, 7; and.b32 e, e, 0x07800780; add.u32 e, e, $6;
    prmt.b32 a, $2, 0, 0xB3A2; lop3.b32 $1, a, 0x807F807F, e, 0xEA; }"""
)
_HIGH: tl.constexpr = tl.constexpr(_LOW.value.replace("shl.b32 e, e, 7", "shl.b32 e, e, 3"))


@triton.jit  # type: ignore[untyped-decorator]
def weights(  # type: ignore[no-untyped-def]
    codes, pairs, bases, HIGH: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr
):
    """Of bytes ``codes`` and the lower or higher halves of ``pairs``; ``bases``: the least exponent in its
    place in both halves of 32 bits. ``FAST``: as bfloat16, by the instructions above."""
    if FAST:
        if HIGH:
            return tl.inline_asm_elementwise(
                _HIGH, "=r,=r,r,r,r,r,r,r", [codes, pairs, bases], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                _LOW, "=r,=r,r,r,r,r,r,r", [codes, pairs, bases], dtype=tl.bfloat16, is_pure=True, pack=4
            )
    else:
        wide = codes.to(tl.int32)
        index = (pairs.to(tl.int32) >> (4 if HIGH else 0)) & 15
        word = ((wide & 0x80) << 8) | (wide & 0x7F) | ((index << 7) + (bases & 0x7F80))
        return (word << 16).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def _bases(bases_ptr, columns, N):  # type: ignore[no-untyped-def]
    return tl.load(bases_ptr + columns, mask=columns < N, other=0).to(tl.int32) * 0x00800080


@triton.jit  # type: ignore[untyped-decorator]
def _with_escapes(  # type: ignore[no-untyped-def]
    total, x_ptr, bases_ptr, escapes_ptr, rows, columns, part, M, N, K,
    ROOM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``total``, sums by column and row, with what escapes; of all parts in the first."""
    inside = columns < N
    starts = escapes_ptr + columns.to(tl.int64) * ROOM
    places = tl.arange(0, WIDE)
    held = tl.load(
        starts[:, None] + places[None, :], mask=inside[:, None] & (places < ROOM)[None, :], other=-1
    )
    most = tl.max(tl.sum((held != -1).to(tl.int32), 1), 0)
    if part != 0:
        most = 0
    least = (tl.load(bases_ptr + columns, mask=inside, other=0).to(tl.int32) + 1) << 7
    for place in range(most):
        entry = tl.load(starts + place, mask=inside, other=-1)
        used = entry != -1
        entry = tl.where(used, entry, 0)
        ks = (entry >> 16) & 0xFFFF
        weight = (entry << 16).to(tl.float32, bitcast=True)
        stood = (((entry & 0x8000) | least) << 16).to(tl.float32, bitcast=True)
        x = tl.load(
            x_ptr + rows.to(tl.int64)[None, :] * K + ks[:, None],
            mask=used[:, None] & (rows < M)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        infinite = tl.abs(x) == float("inf")
        total += x * tl.where(infinite, weight[:, None], (weight - stood)[:, None])
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    total, bias_ptr, out_ptr, rows, columns, part, M, N, BIASED: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    inside = (columns < N)[:, None] & (rows < M)[None, :]
    places = rows.to(tl.int64)[None, :] * N + columns[:, None]
    if PARTS == 1:
        if BIASED:
            total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + part.to(tl.int64) * M * N + places, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def slices_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, pairs_ptr, bases_ptr, escapes_ptr, bias_ptr, out_ptr, M, N, K, H, STEPS,
    ROOM: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weight, a few rows: a warp for each of the ``SLICES`` of every ``BLOCK_K`` x
    ``SLICES`` bytes of exponents, twice as many products of a sum."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    across = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    rows = (tl.program_id(0) % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(columns, N - 1).to(tl.int64)[None, :, None]
    codes_at, pairs_at = codes_ptr + row * K, pairs_ptr + row * H
    inputs = x_ptr + rows.to(tl.int64)[None, None, :] * K
    here = (rows < M)[None, None, :]
    bases = _bases(bases_ptr, columns, N)[None, :, None]
    within = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for step in range(part * STEPS, (part + 1) * STEPS):
        js = step * (SLICES * BLOCK_K) + within
        if EVEN:
            pairs = tl.load(pairs_at + js[:, None, :], eviction_policy="evict_first")
            low = tl.load(codes_at + js[:, None, :], eviction_policy="evict_first")
            high = tl.load(codes_at + H + js[:, None, :], eviction_policy="evict_first")
            x = tl.load(inputs + js[:, :, None], mask=here, other=0.0)
            y = tl.load(inputs + H + js[:, :, None], mask=here, other=0.0)
        else:
            first, second = (js < H) & (js < K), (js < H) & (H + js < K)
            pairs = tl.load(pairs_at + js[:, None, :], mask=(js < H)[:, None, :], other=0)
            low = tl.load(codes_at + js[:, None, :], mask=first[:, None, :], other=0)
            high = tl.load(codes_at + H + js[:, None, :], mask=second[:, None, :], other=0)
            x = tl.load(inputs + js[:, :, None], mask=here & first[:, :, None], other=0.0)
            y = tl.load(inputs + H + js[:, :, None], mask=here & second[:, :, None], other=0.0)
        total = tl.dot(weights(low, pairs, bases, False, DTYPE, FAST), x, total)
        total = tl.dot(weights(high, pairs, bases, True, DTYPE, FAST), y, total)
    sums = _with_escapes(
        tl.sum(total, 0), x_ptr, bases_ptr, escapes_ptr, rows, columns, part, M, N, K, ROOM, WIDE
    )
    _store(sums, bias_ptr, out_ptr, rows, columns, part, M, N, BIASED, PARTS)


@triton.jit  # type: ignore[untyped-decorator]
def tile_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, pairs_ptr, bases_ptr, escapes_ptr, bias_ptr, out_ptr, M, N, K, H, STEPS,
    ROOM: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weight: a tile of ``BLOCK_N`` results of ``BLOCK_M`` rows a program, ``BLOCK_K``
    bytes of exponents a step."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    across = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    rows = (tl.program_id(0) % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(columns, N - 1).to(tl.int64)[:, None]
    codes_at, pairs_at = codes_ptr + row * K, pairs_ptr + row * H
    inputs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[None, :] * K
    bases = _bases(bases_ptr, columns, N)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(part * STEPS, (part + 1) * STEPS):
        js = step * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN:
            pairs = tl.load(pairs_at + js[None, :])
            low = tl.load(codes_at + js[None, :])
            high = tl.load(codes_at + H + js[None, :])
            x = tl.load(inputs + js[:, None])
            y = tl.load(inputs + H + js[:, None])
        else:
            first, second = (js < H) & (js < K), (js < H) & (H + js < K)
            pairs = tl.load(pairs_at + js[None, :], mask=(js < H)[None, :], other=0)
            low = tl.load(codes_at + js[None, :], mask=first[None, :], other=0)
            high = tl.load(codes_at + H + js[None, :], mask=second[None, :], other=0)
            x = tl.load(inputs + js[:, None], mask=first[:, None], other=0.0)
            y = tl.load(inputs + H + js[:, None], mask=second[:, None], other=0.0)
        total = tl.dot(weights(low, pairs, bases, False, DTYPE, FAST), x, total)
        total = tl.dot(weights(high, pairs, bases, True, DTYPE, FAST), y, total)
    total = _with_escapes(total, x_ptr, bases_ptr, escapes_ptr, rows, columns, part, M, N, K, ROOM, WIDE)
    _store(total, bias_ptr, out_ptr, rows, columns, part, M, N, BIASED, PARTS)


@triton.jit  # type: ignore[untyped-decorator]
def add_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, bias_ptr, out_ptr, count, N,
    BIASED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of ``count`` results, rows of ``N``, one after the other."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    total = tl.load(partial_ptr + places, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(partial_ptr + part * count + places, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias_ptr + places % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def unpack_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, pairs_ptr, bases_ptr, escapes_ptr, out_ptr, N, K, H,
    ROOM: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weight [N, K] as bfloat16, written as words of 16 bits; a program writes columns of both halves,
    and over them what escapes there."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    js = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = rows.to(tl.int64)[:, None]
    there = (rows < N)[:, None]
    first = there & ((js < H) & (js < K))[None, :]
    second = there & ((js < H) & (H + js < K))[None, :]
    bases = _bases(bases_ptr, rows, N)[:, None]
    pairs = tl.load(pairs_ptr + row * H + js[None, :], mask=there & (js < H)[None, :], other=0)
    low = tl.load(codes_ptr + row * K + js[None, :], mask=first, other=0)
    high = tl.load(codes_ptr + row * K + H + js[None, :], mask=second, other=0)
    out = out_ptr + row * K + js[None, :]
    if FAST:
        tl.store(out, weights(low, pairs, bases, False, tl.bfloat16, True).to(tl.int16, bitcast=True), first)
        tl.store(
            out + H, weights(high, pairs, bases, True, tl.bfloat16, True).to(tl.int16, bitcast=True), second
        )
    else:
        words = weights(low, pairs, bases, False, tl.float32, False).to(tl.int32, bitcast=True)
        tl.store(out, (words >> 16).to(tl.int16), first)
        words = weights(high, pairs, bases, True, tl.float32, False).to(tl.int32, bitcast=True)
        tl.store(out + H, (words >> 16).to(tl.int16), second)
    # All threads have written before some of them write over it.
    tl.debug_barrier()
    places = tl.arange(0, WIDE)[None, :]
    entries = tl.load(escapes_ptr + row * ROOM + places, mask=there & (places < ROOM), other=-1)
    ks = (entries >> 16) & 0xFFFF
    at = tl.where(ks < H, ks, ks - H)
    start = tl.program_id(1) * BLOCK_K
    mine = (entries != -1) & (at >= start) & (at < start + BLOCK_K)
    tl.store(out_ptr + row * K + ks, entries.to(tl.int16), mine)
