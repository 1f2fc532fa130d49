"""Triton source of ``graphopt_kernels.rotary``. Imports triton: import it lazily.

A tile is ``POSITIONS`` x ``HEADS`` x half of what is turned, in two tensors, so that both elements of a pair
are in the registers of one thread and the tables are read once for all heads of a position. What is not
turned is a third tensor. Kernel arguments are not annotated: triton evaluates annotations, and would take
``Any`` for a global variable of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "factors",
    "heads_of",
    "load_pairs",
    "load_rest",
    "load_table",
    "norm_scale",
    "store_pairs",
    "store_rest",
    "tile_of",
    "turn",
    "turn_kernel",
    "turn_part",
]


@triton.jit  # type: ignore[untyped-decorator]
def load_pairs(rows, inside, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both elements of the pairs of rows, float32; zeros where there are none."""
    if INTERLEAVED:
        at = tl.arange(0, 2 * HALF)[None, None, :]
        both = tl.load(rows + at, mask=inside & (at < WIDTH), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (both.shape[0], both.shape[1], HALF, 2)))
    else:
        at = tl.arange(0, HALF)[None, None, :]
        within = inside & (at < WIDTH // 2)
        first = tl.load(rows + at, mask=within, other=0.0).to(tl.float32)
        second = tl.load(rows + (WIDTH // 2 + at), mask=within, other=0.0).to(tl.float32)
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def store_pairs(  # type: ignore[no-untyped-def]
    rows, inside, first, second, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    dtype = rows.dtype.element_ty
    if INTERLEAVED:
        at = tl.arange(0, 2 * HALF)[None, None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], first.shape[1], 2 * HALF))
        tl.store(rows + at, both.to(dtype), mask=inside & (at < WIDTH))
    else:
        at = tl.arange(0, HALF)[None, None, :]
        within = inside & (at < WIDTH // 2)
        tl.store(rows + at, first.to(dtype), mask=within)
        tl.store(rows + (WIDTH // 2 + at), second.to(dtype), mask=within)


@triton.jit  # type: ignore[untyped-decorator]
def load_rest(rows, inside, WIDTH: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is not turned, as it is stored."""
    at = tl.arange(0, REST)[None, None, :]
    return tl.load(rows + (WIDTH + at), mask=inside & (at < SIZE - WIDTH), other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def store_rest(rows, inside, rest, WIDTH: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, REST)[None, None, :]
    tl.store(rows + (WIDTH + at), rest.to(rows.dtype.element_ty), mask=inside & (at < SIZE - WIDTH))


@triton.jit  # type: ignore[untyped-decorator]
def load_table(  # type: ignore[no-untyped-def]
    rows,
    inside,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALVED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Numbers for the first and second element of each pair; ``HALVED``: they are the same.

    For each head, so that they are read 16 bytes a thread and lie where the heads do; all but the first read
    them from the cache.
    """
    rows = tl.broadcast_to(rows, (rows.shape[0], HEADS, 1))
    if HALVED:
        at = tl.arange(0, HALF)[None, None, :]
        first = tl.load(rows + at, mask=inside & (at < WIDTH // 2), other=0.0).to(tl.float32)
        second = first
    else:
        first, second = load_pairs(rows, inside, WIDTH, HALF, INTERLEAVED)
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def turn(first, second, cos_first, cos_second, sin_first, sin_second, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    if BACK:
        return first * cos_first + second * sin_second, second * cos_second - first * sin_first
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit  # type: ignore[untyped-decorator]
def tile_of(group, positions, length, POSITIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sample and place in it of a tile's positions, and which there are; [POSITIONS, 1, 1] each."""
    position = (group * POSITIONS + tl.arange(0, POSITIONS))[:, None, None]
    return (position // length).to(tl.int64), (position % length).to(tl.int64), position < positions


@triton.jit  # type: ignore[untyped-decorator]
def heads_of(  # type: ignore[no-untyped-def]
    start,
    TOTAL: tl.constexpr,
    EACH: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Heads of a part from ``start`` on, which of all heads they are, and which there are."""
    head = (start + tl.arange(0, HEADS))[None, :, None]
    return head, head // EACH * STEP + FIRST + head % EACH, head < TOTAL


@triton.jit  # type: ignore[untyped-decorator]
def norm_scale(first, second, rest, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    squares = tl.sum(first * first + second * second, axis=2, keep_dims=True)
    if SIZE > WIDTH:
        squares += tl.sum(rest * rest, axis=2, keep_dims=True)
    return 1.0 / tl.sqrt(squares / SIZE + eps)


@triton.jit  # type: ignore[untyped-decorator]
def factors(  # type: ignore[no-untyped-def]
    weight,
    offset,
    WEIGHTED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """What each element of a head is multiplied by after its norm: of both elements of pairs, of the rest."""
    first = tl.full([1, 1, HALF], 1.0, tl.float32)
    second = first
    rest = tl.full([1, 1, REST], 1.0, tl.float32)
    if WEIGHTED:
        always = tl.full([1, 1, 1], 1, tl.int1)
        first, second = load_pairs(weight, always, WIDTH, HALF, INTERLEAVED)
        first += offset
        second += offset
        if SIZE > WIDTH:
            rest = load_rest(weight, always, WIDTH, SIZE, REST).to(tl.float32) + offset
    return first, second, rest


@triton.jit  # type: ignore[untyped-decorator]
def turn_part(  # type: ignore[no-untyped-def]
    whole,
    whole_head,
    part,
    part_head,
    weight,
    start,
    present,
    kept,
    cos_first,
    cos_second,
    sin_first,
    sin_second,
    eps,
    offset,
    TOTAL: tl.constexpr,
    EACH: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    TURNED: tl.constexpr,
    POISONED: tl.constexpr,
    GIVEN: tl.constexpr,
    BACK: tl.constexpr,
    NORMED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """A tile of one part, out of ``whole``, or ``BACK`` into it; both point to the tile's positions.

    ``POISONED``: positions that are not ``kept`` give NaN.
    """
    head, index, known = heads_of(start, TOTAL, EACH, FIRST, STEP, HEADS)
    inside = present & known
    source = whole + index * whole_head
    target = part + head * part_head
    if BACK:
        source, target = target, source
    there = inside
    if not GIVEN:
        there = inside & (head < 0)
    first, second = load_pairs(source, there, WIDTH, HALF, INTERLEAVED)
    rest = first
    if SIZE > WIDTH:
        rest = load_rest(source, there, WIDTH, SIZE, REST)
    if NORMED and TURNED:
        rest = rest.to(tl.float32)
        scale = norm_scale(first, second, rest, eps, SIZE, WIDTH)
        factor_first, factor_second, factor_rest = factors(
            weight, offset, WEIGHTED, INTERLEAVED, SIZE, WIDTH, HALF, REST
        )
        first *= scale * factor_first
        second *= scale * factor_second
        if SIZE > WIDTH:
            rest *= scale * factor_rest
    if TURNED:
        first, second = turn(first, second, cos_first, cos_second, sin_first, sin_second, BACK)
    if POISONED:
        first = tl.where(kept, first, float("nan"))
        second = tl.where(kept, second, float("nan"))
    store_pairs(target, inside, first, second, WIDTH, HALF, INTERLEAVED)
    if SIZE > WIDTH:
        store_rest(target, inside, rest, WIDTH, SIZE, REST)


@triton.jit  # type: ignore[untyped-decorator]
def turn_kernel(  # type: ignore[no-untyped-def]
    whole,
    query,
    key,
    value,
    cos,
    sin,
    query_weight,
    key_weight,
    places,
    whole_batch,
    whole_position,
    whole_head,
    query_batch,
    query_position,
    query_head,
    key_batch,
    key_position,
    key_head,
    value_batch,
    value_position,
    value_head,
    cos_batch,
    cos_position,
    sin_batch,
    sin_position,
    positions,
    length,
    capacity,
    eps,
    offset,
    CACHED: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    VALUES_MOVED: tl.constexpr,
    QUERY_GIVEN: tl.constexpr,
    KEY_GIVEN: tl.constexpr,
    VALUE_GIVEN: tl.constexpr,
    BACK: tl.constexpr,
    NORMED: tl.constexpr,
    QUERY_WEIGHTED: tl.constexpr,
    KEY_WEIGHTED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALVED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The parts of ``whole``, turned; or ``BACK``: the gradient of ``whole`` from those of its parts, where
    there is no norm. A program has some heads of one part; programs of the same positions are neighbours.
    ``WHOLE``: it has all heads of its positions, one tile after the other, and reads their tables once.

    Strides are in elements. ``..._GIVEN``: where not, gradients are zero. ``CACHED``: keys and values go to
    ``places`` of ``capacity`` positions; others get no key, and their queries are NaN.
    """
    STEP: tl.constexpr = QUERIES + KEYS + VALUES
    QUERY_BLOCKS: tl.constexpr = (GROUPS * QUERIES + HEADS - 1) // HEADS
    KEY_BLOCKS: tl.constexpr = (GROUPS * KEYS + HEADS - 1) // HEADS
    VALUE_BLOCKS: tl.constexpr = (GROUPS * VALUES * VALUES_MOVED + HEADS - 1) // HEADS
    BLOCKS: tl.constexpr = QUERY_BLOCKS + KEY_BLOCKS + VALUE_BLOCKS
    EACH: tl.constexpr = BLOCKS if WHOLE else 1
    start = tl.program_id(0) * EACH
    batch, at, present = tile_of(start // BLOCKS, positions, length, POSITIONS)
    whole_rows = whole + (batch * whole_batch + at * whole_position)
    cos_rows = cos + (batch * cos_batch + at * cos_position)
    sin_rows = sin + (batch * sin_batch + at * sin_position)
    kept = present
    place = at
    if CACHED:
        place = tl.load(places + at, mask=present, other=-1).to(tl.int64)
        kept = present & (place >= 0) & (place < capacity)
    # Values need no tables.
    turns = present
    if not WHOLE:
        turns = present & (start % BLOCKS < QUERY_BLOCKS + KEY_BLOCKS)
    cos_first, cos_second = load_table(cos_rows, turns, WIDTH, HALF, INTERLEAVED, HALVED, HEADS)
    sin_first, sin_second = load_table(sin_rows, turns, WIDTH, HALF, INTERLEAVED, HALVED, HEADS)
    for own in tl.static_range(EACH):
        block = own if WHOLE else start % BLOCKS
        if block < QUERY_BLOCKS:
            if QUERIES > 0:
                turn_part(
                    whole_rows, whole_head, query + (batch * query_batch + at * query_position), query_head,
                    query_weight, block * HEADS, present, kept, cos_first, cos_second, sin_first, sin_second,
                    eps, offset, GROUPS * QUERIES, QUERIES, 0, STEP, True, CACHED, QUERY_GIVEN, BACK, NORMED,
                    QUERY_WEIGHTED, INTERLEAVED, SIZE, WIDTH, HALF, REST, HEADS,
                )  # fmt: skip
        elif block < QUERY_BLOCKS + KEY_BLOCKS:
            if KEYS > 0:
                turn_part(
                    whole_rows, whole_head, key + (batch * key_batch + place * key_position), key_head,
                    key_weight, (block - QUERY_BLOCKS) * HEADS, kept, kept, cos_first, cos_second, sin_first,
                    sin_second, eps, offset, GROUPS * KEYS, KEYS, QUERIES, STEP, True, False, KEY_GIVEN, BACK,
                    NORMED, KEY_WEIGHTED, INTERLEAVED, SIZE, WIDTH, HALF, REST, HEADS,
                )  # fmt: skip
        else:
            if VALUE_BLOCKS > 0:
                turn_part(
                    whole_rows, whole_head, value + (batch * value_batch + place * value_position),
                    value_head, key_weight, (block - QUERY_BLOCKS - KEY_BLOCKS) * HEADS, kept, kept,
                    cos_first, cos_second, sin_first, sin_second, eps, offset, GROUPS * VALUES, VALUES,
                    QUERIES + KEYS, STEP, False, False, VALUE_GIVEN, BACK, NORMED, False, INTERLEAVED, SIZE,
                    WIDTH, HALF, REST, HEADS,
                )  # fmt: skip
