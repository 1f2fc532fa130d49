"""Products that read weights of four bits and fewer, a scale for each group of neighbours, on tensor cores.

As in ``bytes_triton`` the weight is the left-hand operand, taken from registers, and rows of x are what is
padded; codes are streamed once, 16 bytes a thread at a time. A block of codes (``nibbles``) is two products,
one of the low halves of its bytes and one of the high ones; one of fewer bits (``planes``) becomes two or
four such pairs. The sum of a group is scaled as it is added to the total, in float32. Words of groups are
given to the instructions that make numbers of codes (``group_numbers_triton``), whether they need them or
not: the compiler fetches ahead what products depend on.

Extra bits of blocks that are outliers are read where words name a slot, else 0 without reading: no program
branches, and without outliers there is nothing of this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.quantized.group_numbers_triton import nibbles2, nibbles3, numbers

__all__ = ["slices_kernel", "sum_kernel", "tile_kernel", "unpack_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def _words(  # type: ignore[no-untyped-def]
    words_ptr, ranges_ptr, rows, groups, inside, GROUPS, RANGES,
    OUTLIERS: tl.constexpr, LEVELS: tl.constexpr, DOUBLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Zeros, scales and words of ``groups`` of ``rows``. Where words name slots scales have fewer bits."""
    if EVEN:
        words = tl.load(words_ptr + rows * GROUPS + groups)
    else:
        words = tl.load(words_ptr + rows * GROUPS + groups, mask=inside, other=0)
    if DOUBLE:
        ranges = tl.load(ranges_ptr + rows * RANGES + groups // 256, mask=inside, other=0.0)
        zeros, scales = words, words.to(tl.float32) * ranges
    elif LEVELS:
        zeros, scales = words.to(tl.uint8), words.to(tl.float32, bitcast=True)
    else:
        zeros = (words & 127).to(tl.uint8)
        # As ``group_products.GroupWeight.scale_bits``.
        SCALE: tl.constexpr = -65536 if OUTLIERS else -256
        scales = (words & SCALE).to(tl.float32, bitcast=True)
    return zeros, scales, words


@triton.jit  # type: ignore[untyped-decorator]
def _bytes(starts, inside, EVEN: tl.constexpr, POLICY: tl.constexpr):  # type: ignore[no-untyped-def]
    if EVEN:
        return tl.load(starts, eviction_policy=POLICY)
    else:
        return tl.load(starts, mask=inside, other=0, eviction_policy=POLICY)


@triton.jit  # type: ignore[untyped-decorator]
def _pairs(  # type: ignore[no-untyped-def]
    codes_ptr, thirds_ptr, extra_ptr, rows, block, blocks, words, SLOTS, order, inside,
    BITS: tl.constexpr, OUTLIERS: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr,
    EVEN: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Bytes of codes of four bits of ``block`` of ``rows``, ``HALF`` of each two halves of codes. The last
    dimension is that of ``order``; the others have size 1 there."""
    if BITS == 4:
        return (_bytes(codes_ptr + (rows * blocks + block) * HALF + order, inside, EVEN, POLICY),)
    else:
        if OUTLIERS:
            # Counted from 0; what has none has the highest of unsigned numbers.
            slot = ((words >> 7) & 511) - 1
            extra = tl.load(
                extra_ptr + (rows * SLOTS + slot) * HALF + order,
                mask=slot.to(tl.uint32, bitcast=True) < SLOTS, other=0, eviction_policy=POLICY,
            )  # fmt: skip
        if BITS == 2:
            codes = _bytes(codes_ptr + (rows * blocks + block) * HALF + order, inside, EVEN, POLICY)
            if not OUTLIERS:
                extra = tl.zeros_like(codes)
            return nibbles2(codes, extra, FAST)
        else:
            starts = codes_ptr + (rows * blocks + block) * (2 * HALF) + order
            low = _bytes(starts, inside, EVEN, POLICY)
            high = _bytes(starts + HALF, inside, EVEN, POLICY)
            thirds = _bytes(thirds_ptr + (rows * blocks + block) * HALF + order, inside, EVEN, POLICY)
            if not OUTLIERS:
                extra = tl.zeros_like(thirds)
            return nibbles3(low, high, thirds, extra, FAST)


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    total, bias_ptr, out_ptr, rows, columns, part, M, N, BIASED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``total``: sums by column and row."""
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
    x_ptr, codes_ptr, thirds_ptr, extra_ptr, words_ptr, ranges_ptr, bias_ptr, out_ptr,
    M, N, K, GROUPS, RANGES, SLOTS, STEPS,
    BIASED: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    BITS: tl.constexpr, OUTLIERS: tl.constexpr, LEVELS: tl.constexpr, DOUBLE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weight, a few rows: a warp for each of ``SLICES`` blocks of a step."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    across = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    rows = (tl.program_id(0) % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Results beyond the last are computed from its weights, and not stored.
    real = tl.minimum(columns, N - 1).to(tl.int64)[None, :]
    PAIRS: tl.constexpr = 1 if BITS == 4 else (2 if BITS == 2 else 4)
    BLOCK: tl.constexpr = 2 * HALF * PAIRS
    blocks = tl.cdiv(K, BLOCK)
    inputs = x_ptr + rows.to(tl.int64)[None, None, :] * K
    here = (rows < M)[None, None, :]
    order = tl.arange(0, HALF)[None, None, :]
    within = tl.arange(0, HALF)[None, :, None]
    total = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for step in range(part * STEPS, (part + 1) * STEPS):
        block = step * SLICES + tl.arange(0, SLICES)
        first = block[:, None] * BLOCK // GROUP
        zeros, scales, words = _words(
            words_ptr, ranges_ptr, real, first, first < GROUPS,
            GROUPS, RANGES, OUTLIERS, LEVELS, DOUBLE, EVEN,
        )  # fmt: skip
        pairs = _pairs(
            codes_ptr, thirds_ptr, extra_ptr, real[:, :, None], block[:, None, None], blocks,
            words[:, :, None], SLOTS, order, (block < blocks)[:, None, None],
            BITS, OUTLIERS, HALF, FAST, EVEN, "evict_first",
        )  # fmt: skip
        for pair in tl.static_range(0, PAIRS):
            ks = block[:, None, None] * BLOCK + pair * 2 * HALF + within
            if EVEN:
                x = tl.load(inputs + ks, mask=here, other=0.0)
                y = tl.load(inputs + ks + HALF, mask=here, other=0.0)
            else:
                x = tl.load(inputs + ks, mask=here & (ks < K), other=0.0)
                y = tl.load(inputs + ks + HALF, mask=here & (ks + HALF < K), other=0.0)
            group = first + pair * 2 * HALF // GROUP
            if pair and pair * 2 * HALF % GROUP == 0:
                zeros, scales, _ = _words(
                    words_ptr, ranges_ptr, real, group, group < GROUPS,
                    GROUPS, RANGES, OUTLIERS, LEVELS, DOUBLE, EVEN,
                )  # fmt: skip
            low, high = numbers(pairs[pair], zeros[:, :, None], DTYPE, LEVELS, FAST)
            if pair * 2 * HALF % GROUP == 0:  # noqa: SIM108
                sums = tl.dot(low, x)
            else:
                sums = tl.dot(low, x, sums)
            if GROUP == HALF:
                # The halves are groups of their own.
                total += sums * scales[:, :, None]
                zeros, scales, _ = _words(
                    words_ptr, ranges_ptr, real, group + 1, group + 1 < GROUPS,
                    GROUPS, RANGES, OUTLIERS, LEVELS, DOUBLE, EVEN,
                )  # fmt: skip
                low, high = numbers(pairs[pair], zeros[:, :, None], DTYPE, LEVELS, FAST)
                sums = tl.dot(high, y)
            else:
                sums = tl.dot(high, y, sums)
            if (pair + 1) * 2 * HALF % GROUP == 0 or pair == PAIRS - 1:
                total += sums * scales[:, :, None]
    _store(tl.sum(total, 0), bias_ptr, out_ptr, rows, columns, part, M, N, BIASED, PARTS)


@triton.jit  # type: ignore[untyped-decorator]
def tile_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, thirds_ptr, extra_ptr, words_ptr, ranges_ptr, bias_ptr, out_ptr,
    M, N, K, GROUPS, RANGES, SLOTS, STEPS,
    BIASED: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    BITS: tl.constexpr, OUTLIERS: tl.constexpr, LEVELS: tl.constexpr, DOUBLE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weight: a tile of ``BLOCK_N`` results of ``BLOCK_M`` rows a program, a block of
    codes a step. Programs that read the same weights follow each other."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    across = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    rows = (tl.program_id(0) % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = tl.minimum(columns, N - 1).to(tl.int64)
    PAIRS: tl.constexpr = 1 if BITS == 4 else (2 if BITS == 2 else 4)
    BLOCK: tl.constexpr = 2 * HALF * PAIRS
    blocks = tl.cdiv(K, BLOCK)
    inputs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[None, :] * K
    order = tl.arange(0, HALF)[None, :]
    within = tl.arange(0, HALF)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(part * STEPS, (part + 1) * STEPS):
        first = step * BLOCK // GROUP
        zeros, scales, words = _words(
            words_ptr, ranges_ptr, real, first, first < GROUPS,
            GROUPS, RANGES, OUTLIERS, LEVELS, DOUBLE, EVEN,
        )  # fmt: skip
        pairs = _pairs(
            codes_ptr, thirds_ptr, extra_ptr, real[:, None], step, blocks, words[:, None], SLOTS, order,
            step < blocks, BITS, OUTLIERS, HALF, FAST, EVEN, "",
        )  # fmt: skip
        for pair in tl.static_range(0, PAIRS):
            ks = step * BLOCK + pair * 2 * HALF + within
            if EVEN:
                x = tl.load(inputs + ks)
                y = tl.load(inputs + ks + HALF)
            else:
                x = tl.load(inputs + ks, mask=ks < K, other=0.0)
                y = tl.load(inputs + ks + HALF, mask=ks + HALF < K, other=0.0)
            group = first + pair * 2 * HALF // GROUP
            if pair and pair * 2 * HALF % GROUP == 0:
                zeros, scales, _ = _words(
                    words_ptr, ranges_ptr, real, group, group < GROUPS,
                    GROUPS, RANGES, OUTLIERS, LEVELS, DOUBLE, EVEN,
                )  # fmt: skip
            low, high = numbers(pairs[pair], zeros[:, None], DTYPE, LEVELS, FAST)
            if pair * 2 * HALF % GROUP == 0:  # noqa: SIM108
                sums = tl.dot(low, x)
            else:
                sums = tl.dot(low, x, sums)
            if GROUP == HALF:
                total += sums * scales[:, None]
                zeros, scales, _ = _words(
                    words_ptr, ranges_ptr, real, group + 1, group + 1 < GROUPS,
                    GROUPS, RANGES, OUTLIERS, LEVELS, DOUBLE, EVEN,
                )  # fmt: skip
                low, high = numbers(pairs[pair], zeros[:, None], DTYPE, LEVELS, FAST)
                sums = tl.dot(high, y)
            else:
                sums = tl.dot(high, y, sums)
            if (pair + 1) * 2 * HALF % GROUP == 0 or pair == PAIRS - 1:
                total += sums * scales[:, None]
    _store(total, bias_ptr, out_ptr, rows, columns, part, M, N, BIASED, PARTS)


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
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
    codes_ptr, thirds_ptr, extra_ptr, words_ptr, ranges_ptr, factors_ptr, offsets_ptr, out_ptr,
    N, K, GROUPS, RANGES, SLOTS,
    FACTORED: tl.constexpr, OFFSET: tl.constexpr, FAST: tl.constexpr, BITS: tl.constexpr,
    OUTLIERS: tl.constexpr, LEVELS: tl.constexpr, DOUBLE: tl.constexpr, GROUP: tl.constexpr,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The weight [N, K]: ``WIDE`` blocks of ``BLOCK_N`` rows a program."""
    PAIRS: tl.constexpr = 1 if BITS == 4 else (2 if BITS == 2 else 4)
    BLOCK: tl.constexpr = 2 * HALF * PAIRS
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    blocks = tl.cdiv(K, BLOCK)
    here = (rows < N)[:, None]
    inside = here & (block < blocks)[None, :]
    order = tl.arange(0, HALF)[None, None, :]
    first = (block * BLOCK)[None, :] // GROUP
    _, _, words = _words(
        words_ptr, ranges_ptr, rows[:, None], first, here & (first < GROUPS),
        GROUPS, RANGES, OUTLIERS, LEVELS, DOUBLE, False,
    )  # fmt: skip
    pairs = _pairs(
        codes_ptr, thirds_ptr, extra_ptr, rows[:, None, None], block[None, :, None], blocks,
        words[:, :, None], SLOTS, order, inside[:, :, None], BITS, OUTLIERS, HALF, FAST, False, "",
    )  # fmt: skip
    for pair in tl.static_range(0, PAIRS):
        ks = block[:, None] * BLOCK + pair * 2 * HALF + tl.arange(0, HALF)[None, :]
        places = rows[:, None, None] * K + ks[None, :, :]
        for side in tl.static_range(0, 2):
            # Both halves of a pair are in one group, or each is a group.
            groups = (block * BLOCK + (pair * 2 + side) * HALF)[None, :] // GROUP
            zeros, scales, _ = _words(
                words_ptr, ranges_ptr, rows[:, None], groups, here & (groups < GROUPS),
                GROUPS, RANGES, OUTLIERS, LEVELS, DOUBLE, False,
            )  # fmt: skip
            low, high = numbers(pairs[pair], zeros[:, :, None], tl.float32, LEVELS, FAST)
            weight = (high if side else low) * scales[:, :, None]
            if OFFSET:
                offsets = tl.load(
                    offsets_ptr + rows[:, None] * GROUPS + groups, mask=here & (groups < GROUPS), other=0.0
                )
                weight += offsets[:, :, None]
            reached = ks + side * HALF < K
            if FACTORED:
                weight *= tl.load(factors_ptr + ks + side * HALF, mask=reached, other=0.0)[None, :, :]
            tl.store(
                out_ptr + places + side * HALF,
                weight.to(out_ptr.dtype.element_ty),
                mask=inside[:, :, None] & reached[None, :, :],
            )
