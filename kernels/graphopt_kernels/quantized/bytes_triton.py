"""Products that read weights of a byte: on vector units, on tensor cores in slices, in tiles.

All of them stream the codes once, 16 bytes a thread at a time, and turn them into the dtype of x in
registers. On tensor cores the weight is the left-hand operand: it is then taken from registers, and what is
padded are rows of x, to 8 at least. In the kernel of slices every warp adds up a part of each sum, so that
few results keep many warps busy. Sums may also be cut into parts by programs, which ``sum_kernel`` adds up in
order.

Where x has been rounded as well (``ROUNDED``), int8 is multiplied by int8 and added up in int32; float8 is
multiplied as it is in tiles and as float16, which holds it exactly, in slices. ``TAIL``: columns of x
that are not rounded are multiplied by weights that are not either, in the end, and added before the result is
rounded.

Ways to turn four codes into numbers (``FAST``), exact all of them:

    int8 to float32      the byte + 128 below the exponent of 2**23, less 2**23 + 128
    int8 to float16      the byte + 128 below the exponent of 2**10, less 2**10 + 128
    int8 to bfloat16     seven bits below the exponent of 128, less 128, or 256 where the eighth is set
    float8 to bfloat16   the exponent moved to its place, times 2**120, the quotient of the two biases

Conversions between integers, or halves, and other floats run at a quarter of the rate of the instructions
that these take.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

__all__ = [
    "numbers", "row_kernel", "scale_kernel", "slices_kernel", "sum_kernel", "tile_kernel",
    "unpack_kernel",
]  # fmt: skip

_TO_FLOAT32: tl.constexpr = tl.constexpr(
    """{ .reg .b32 u, a;
    xor.b32 u, $4, 0x80808080;
    prmt.b32 a, u, 0x4B000000, 0x7440; mov.b32 $0, a; sub.rn.f32 $0, $0, 0f4B000080;
    prmt.b32 a, u, 0x4B000000, 0x7441; mov.b32 $1, a; sub.rn.f32 $1, $1, 0f4B000080;
    prmt.b32 a, u, 0x4B000000, 0x7442; mov.b32 $2, a; sub.rn.f32 $2, $2, 0f4B000080;
    prmt.b32 a, u, 0x4B000000, 0x7443; mov.b32 $3, a; sub.rn.f32 $3, $3, 0f4B000080; }"""
)
_TO_FLOAT16: tl.constexpr = tl.constexpr(
    """{ .reg .b32 u, a, b;
    xor.b32 u, $2, 0x80808080; mov.b32 b, 0x64806480;
    prmt.b32 a, u, 0x64646464, 0x4140; sub.rn.f16x2 $0, a, b;
    prmt.b32 a, u, 0x64646464, 0x4342; sub.rn.f16x2 $1, a, b; }"""
)
_TO_BFLOAT16: tl.constexpr = tl.constexpr(
    """{ .reg .b32 t, a, b;
    prmt.b32 t, $2, 0, 0x4140;
    lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA;
    sub.rn.bf16x2 $0, a, b;
    prmt.b32 t, $2, 0, 0x4342;
    lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA;
    sub.rn.bf16x2 $1, a, b; }"""
)
_FLOAT8_TO_BFLOAT16: tl.constexpr = tl.constexpr(
    """{ .reg .b32 t, a, c; mov.b32 c, 0x7B807B80;
    prmt.b32 t, $2, 0, 0x1404; shr.b32 a, t, 4; and.b32 a, a, 0x07F007F0;
    lop3.b32 a, t, 0x80008000, a, 0xEA; mul.rn.bf16x2 $0, a, c;
    prmt.b32 t, $2, 0, 0x3424; shr.b32 a, t, 4; and.b32 a, a, 0x07F007F0;
    lop3.b32 a, t, 0x80008000, a, 0xEA; mul.rn.bf16x2 $1, a, c; }"""
)


@triton.jit  # type: ignore[untyped-decorator]
def numbers(codes, DTYPE: tl.constexpr, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """``codes``, of int8 or float8_e4m3fn, as ``DTYPE``."""
    if FAST and codes.dtype == tl.int8 and tl.float32 == DTYPE:
        return tl.inline_asm_elementwise(
            _TO_FLOAT32, "=f,=f,=f,=f,r", [codes], dtype=tl.float32, is_pure=True, pack=4
        )
    elif FAST and codes.dtype == tl.int8 and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            _TO_FLOAT16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    elif FAST and codes.dtype == tl.int8 and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            _TO_BFLOAT16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif FAST and codes.dtype == tl.float8e4nv and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            _FLOAT8_TO_BFLOAT16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return codes.to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _beside(  # type: ignore[no-untyped-def]
    beside_ptr, exact_ptr, rows, columns, M, N, WIDTH, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Inputs [M, WIDTH] times weights [WIDTH, N] that stay as they are, by column and row."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, WIDTH, 32, num_stages=1):
        ks = start + tl.arange(0, 32)
        weights = tl.load(
            exact_ptr + ks.to(tl.int64)[None, :] * N + columns[:, None],
            mask=(columns < N)[:, None] & (ks < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            beside_ptr + rows.to(tl.int64)[None, :] * WIDTH + ks[:, None],
            mask=(rows < M)[None, :] & (ks < WIDTH)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(weights, x, total, input_precision="ieee")
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    total, x_scales_ptr, scales_ptr, bias_ptr, beside_ptr, exact_ptr, tail_ptr, out_ptr,
    rows, columns, part, M, N, WIDTH, BIASED: tl.constexpr, ROUNDED: tl.constexpr, TAIL: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``total``: sums by column and row. ``TAIL``: products of what is not rounded are added."""
    inside = (columns < N)[:, None] & (rows < M)[None, :]
    places = rows.to(tl.int64)[None, :] * N + columns[:, None]
    if PARTS == 1:
        result = total.to(tl.float32)
        result *= tl.load(scales_ptr + columns, mask=columns < N, other=0.0)[:, None]
        if ROUNDED:
            result *= tl.load(x_scales_ptr + rows, mask=rows < M, other=0.0)[None, :]
        if TAIL:
            result += _beside(beside_ptr, exact_ptr, rows, columns, M, N, WIDTH, BLOCK_M, BLOCK_N)
        if BIASED:
            result += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + part.to(tl.int64) * M * N + places, total, mask=inside)
    if TAIL and PARTS > 1:
        into = tail_ptr + places
        if part == 0:
            tail = _beside(beside_ptr, exact_ptr, rows, columns, M, N, WIDTH, BLOCK_M, BLOCK_N)
            tl.store(into, tail, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sums_of_lanes(codes, x, FAST: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """By lane, warp and row: products of ``codes`` [32, warps, rows, steps, 16 bytes] and x, float32."""
    WARPS: tl.constexpr = codes.shape[1]
    ROWS: tl.constexpr = codes.shape[2]
    STEPS: tl.constexpr = codes.shape[3]
    EACH: tl.constexpr = codes.shape[4]
    apart = tl.reshape(
        numbers(codes, tl.float32, FAST), (32, WARPS, ROWS, STEPS, EACH // VECTOR, VECTOR)
    )
    return tl.sum(tl.reshape(apart * x, (32, WARPS, ROWS, STEPS * EACH)), 3)


@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    codes, x_ptr, norm_ptr, places, left, offset,
    NORMED: tl.constexpr, WEIGHED: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """By lane, warp and row: products of ``codes`` and x at ``places``, of which those below ``left`` are
    there, all if ``EVEN``, and by lane and warp squares of x."""
    WARPS: tl.constexpr = codes.shape[1]
    EACH: tl.constexpr = codes.shape[3] * codes.shape[4]
    VECTOR: tl.constexpr = places.shape[5]
    squares = tl.zeros((32, WARPS, 1), tl.float32)
    if EVEN:
        x = tl.load(x_ptr + places).to(tl.float32)
    else:
        x = tl.load(x_ptr + places, mask=places < left, other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.sum(tl.reshape(x * x, (32, WARPS, 1, EACH)), 3)
        if WEIGHED:
            if EVEN:
                weight = tl.load(norm_ptr + places)
            else:
                weight = tl.load(norm_ptr + places, mask=places < left, other=0.0)
            x *= weight.to(tl.float32) + offset
    return _sums_of_lanes(codes, x, FAST, VECTOR), squares


@triton.jit  # type: ignore[untyped-decorator]
def gated(gate, up, GATE: tl.constexpr):  # type: ignore[no-untyped-def]
    if GATE == "silu":
        return gate / (1 + tl.exp(-gate)) * up
    elif GATE == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        # tanh(y) is 1 - 2 / (exp(2 y) + 1), at its ends too.
        wide = tl.exp(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        return gate * (1 - 1 / (wide + 1)) * up


@triton.jit  # type: ignore[untyped-decorator]
def row_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, bias_ptr, norm_ptr, added_ptr, out_ptr, N, K, STEPS, eps, offset,
    SCALED: tl.constexpr, BIASED: tl.constexpr, NORMED: tl.constexpr, WEIGHED: tl.constexpr,
    ADDED: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """x [K] times the weight: ``BLOCK_N`` of its rows a program, ``STEPS`` blocks of each sum. A lane loads
    16 bytes of each of several places in a row and sums up by itself: there is no shared memory and no
    barrier before the end. ``AHEAD``: so many steps are written out one after the other, codes of two on
    their way at a time. In a loop they would be moved from register to register, which waits for them.

    ``EARLY``: the first codes are read before the kernel ahead of this has ended (``settled.py``).
    ``NORMED``: x is over its root mean square, ``WEIGHED``: times ``norm`` [K] + ``offset``; squares are
    added up beside products, so that it costs no reading of its own. ``GATE``: the weight has 2 N rows, and
    results are the function of the first N times the others. ``ADDED``: ``added`` [N] is added. ``SCALED``:
    rows of the weight have scales; without, they are numbers."""
    ROWS: tl.constexpr = BLOCK_N // WARPS
    EACH: tl.constexpr = 128 // codes_ptr.dtype.element_ty.primitive_bitwidth
    PLACES: tl.constexpr = BLOCK_K // (32 * EACH)
    # 16 bytes of x at a time, or all that a lane multiplies 16 bytes of codes by.
    WIDE: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: tl.constexpr = WIDE if WIDE < EACH else EACH
    if EARLY:
        cuda.gdc_launch_dependents()
    part = tl.program_id(1)
    # Axes of lanes and warps come first: neighbours are given to the first axes after the contiguous one.
    lane = tl.arange(0, 32)[:, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None, None]
    row = tl.arange(0, ROWS)[None, None, :, None, None]
    place = tl.arange(0, PLACES)[None, None, None, :, None]
    # Results beyond the last are computed from its weights, and not stored.
    if GATE == "":
        column = tl.minimum(tl.program_id(0) * BLOCK_N + warp * ROWS + row, N - 1)
    else:
        PAIRS: tl.constexpr = ROWS // 2
        column = tl.program_id(0) * (BLOCK_N // 2) + warp * PAIRS + row % PAIRS
        column = tl.minimum(column, N - 1) + row // PAIRS * N
    start = part * STEPS * BLOCK_K
    ks = start + place * (32 * EACH) + lane * EACH + tl.arange(0, EACH)[None, None, None, None, :]
    codes_at = codes_ptr + column.to(tl.int64) * K + ks
    vector = tl.arange(0, EACH // VECTOR)[None, None, None, None, :, None]
    element = tl.arange(0, VECTOR)[None, None, None, None, None, :]
    of_x = start + place[:, :, :, :, :, None] * (32 * EACH) + lane[:, :, :, :, :, None] * EACH
    # Every warp loads x for itself.
    of_x = tl.broadcast_to(of_x + vector * VECTOR + element, (32, WARPS, 1, PLACES, EACH // VECTOR, VECTOR))
    if EVEN:
        codes = tl.load(codes_at, eviction_policy="evict_first")
    if AHEAD:
        others = tl.load(codes_at + BLOCK_K, eviction_policy="evict_first")
    if EARLY:
        cuda.gdc_wait()
    total = tl.zeros((32, WARPS, ROWS), tl.float32)
    squares = tl.zeros((32, WARPS, 1), tl.float32)
    if AHEAD:
        for step in tl.static_range(AHEAD):
            at = step * BLOCK_K
            sums, squared = _step(
                codes, x_ptr + at, norm_ptr + at, of_x, K, offset, NORMED, WEIGHED, True, FAST
            )
            total += sums
            squares += squared
            codes = others
            if step + 2 < AHEAD:
                others = tl.load(codes_at + at + 2 * BLOCK_K, eviction_policy="evict_first")
    else:
        for step in range(STEPS):
            at = step * BLOCK_K
            if not EVEN:
                inside = tl.broadcast_to(at + ks < K, codes_at.shape)
                codes = tl.load(codes_at + at, mask=inside, other=0.0, eviction_policy="evict_first")
            sums, squared = _step(
                codes, x_ptr + at, norm_ptr + at, of_x, K - at, offset, NORMED, WEIGHED, EVEN, FAST
            )
            total += sums
            squares += squared
            if EVEN:
                following = step + 1 < STEPS
                codes = tl.load(
                    codes_at + at + BLOCK_K, mask=following, other=0.0, eviction_policy="evict_first"
                )
    sums = tl.sum(total, 0)
    if NORMED:
        sums *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    if GATE == "":
        columns = (
            tl.program_id(0) * BLOCK_N + tl.arange(0, WARPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        )
    else:
        PAIRED: tl.constexpr = ROWS // 2
        columns = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, WARPS)[:, None] * PAIRED
        columns += tl.arange(0, PAIRED)[None, :]
        gate, up = tl.split(tl.permute(tl.reshape(sums, (WARPS, 2, PAIRED)), (0, 2, 1)))
        inside_gate = columns < N
        if SCALED:
            gate *= tl.load(scales_ptr + columns, mask=inside_gate, other=0.0)
            up *= tl.load(scales_ptr + N + columns, mask=inside_gate, other=0.0)
        if BIASED:
            gate += tl.load(bias_ptr + columns, mask=inside_gate, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + N + columns, mask=inside_gate, other=0.0).to(tl.float32)
        sums = gated(gate, up, GATE)
    within = columns < N
    if PARTS == 1:
        if GATE == "":
            if SCALED:
                sums *= tl.load(scales_ptr + columns, mask=within, other=0.0)
            if BIASED:
                sums += tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)
        if ADDED:
            sums += tl.load(added_ptr + columns, mask=within, other=0.0).to(tl.float32)
        tl.store(out_ptr + columns, sums.to(out_ptr.dtype.element_ty), mask=within)
    else:
        tl.store(out_ptr + part * N + columns, sums, mask=within)


@triton.jit  # type: ignore[untyped-decorator]
def slices_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, bias_ptr, beside_ptr, exact_ptr, tail_ptr, out_ptr,
    M, N, K, WIDTH, STEPS,
    BIASED: tl.constexpr, ROUNDED: tl.constexpr, TAIL: tl.constexpr, PARTS: tl.constexpr,
    EVEN: tl.constexpr, FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weight, a few rows: a warp for each of the ``SLICES`` of every ``BLOCK_K`` x
    ``SLICES`` products of a sum."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    DTYPE: tl.constexpr = tl.float16 if tl.float8e4nv == TYPE else TYPE
    SUM: tl.constexpr = tl.int32 if tl.int8 == TYPE else tl.float32
    across = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    rows = (tl.program_id(0) % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    starts = codes_ptr + tl.minimum(columns, N - 1).to(tl.int64)[None, :, None] * K
    inputs = x_ptr + rows.to(tl.int64)[None, None, :] * K
    here = (rows < M)[None, None, :]
    within = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((SLICES, BLOCK_N, BLOCK_M), SUM)
    for step in range(part * STEPS, (part + 1) * STEPS):
        ks = step * (SLICES * BLOCK_K) + within
        if EVEN:
            codes = tl.load(starts + ks[:, None, :], eviction_policy="evict_first")
            x = tl.load(inputs + ks[:, :, None], mask=here, other=0.0)
        else:
            reached = ks < K
            codes = tl.load(
                starts + ks[:, None, :], mask=reached[:, None, :], other=0.0, eviction_policy="evict_first"
            )
            x = tl.load(inputs + ks[:, :, None], mask=here & reached[:, :, None], other=0.0)
        total = tl.dot(numbers(codes, DTYPE, FAST), numbers(x, DTYPE, FAST), total, out_dtype=SUM)
    _store(
        tl.sum(total, 0), x_scales_ptr, scales_ptr, bias_ptr, beside_ptr, exact_ptr, tail_ptr, out_ptr,
        rows, columns, part, M, N, WIDTH, BIASED, ROUNDED, TAIL, PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def tile_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, bias_ptr, beside_ptr, exact_ptr, tail_ptr, out_ptr,
    M, N, K, WIDTH, STEPS,
    BIASED: tl.constexpr, ROUNDED: tl.constexpr, TAIL: tl.constexpr, PARTS: tl.constexpr,
    EVEN: tl.constexpr, FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weight: a tile of ``BLOCK_N`` results of ``BLOCK_M`` rows a program. Programs that
    read the same weights follow each other."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SUM: tl.constexpr = tl.int32 if tl.int8 == DTYPE else tl.float32
    across = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    rows = (tl.program_id(0) % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    starts = codes_ptr + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K
    inputs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[None, :] * K
    total = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    for step in range(part * STEPS, (part + 1) * STEPS):
        ks = step * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN:
            codes = tl.load(starts + ks[None, :])
            x = tl.load(inputs + ks[:, None])
        else:
            codes = tl.load(starts + ks[None, :], mask=ks[None, :] < K, other=0.0)
            x = tl.load(inputs + ks[:, None], mask=ks[:, None] < K, other=0.0)
        total = tl.dot(numbers(codes, DTYPE, FAST), numbers(x, DTYPE, FAST), total, out_dtype=SUM)
    _store(
        total, x_scales_ptr, scales_ptr, bias_ptr, beside_ptr, exact_ptr, tail_ptr, out_ptr,
        rows, columns, part, M, N, WIDTH, BIASED, ROUNDED, TAIL, PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, x_scales_ptr, scales_ptr, bias_ptr, tail_ptr, out_ptr, count, N,
    BIASED: tl.constexpr, ROUNDED: tl.constexpr, TAIL: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of ``count`` results, rows of ``N``, one after the other."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    total = tl.load(partial_ptr + places, mask=inside, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(partial_ptr + part * count + places, mask=inside, other=0)
    result = total.to(tl.float32)
    columns = places % N
    result *= tl.load(scales_ptr + columns, mask=inside, other=0.0)
    if ROUNDED:
        result *= tl.load(x_scales_ptr + places // N, mask=inside, other=0.0)
    if TAIL:
        result += tl.load(tail_ptr + places, mask=inside, other=0.0)
    if BIASED:
        result += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def scale_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, x_scales_ptr, scales_ptr, bias_ptr, out_ptr, N,
    BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of int32 sums, scaled both ways, and the bias."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    result = tl.load(sums_ptr + row * N + columns, mask=inside, other=0).to(tl.float32)
    result *= tl.load(scales_ptr + columns, mask=inside, other=0.0)
    result *= tl.load(x_scales_ptr + row)
    if BIASED:
        result += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + columns, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def unpack_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, out_ptr, N, K,
    FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weight [N, K]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (rows < N)[:, None] & (ks < K)
    places = rows[:, None] * K + ks
    codes = tl.load(codes_ptr + places, mask=inside, other=0.0)
    scales = tl.load(scales_ptr + rows, mask=rows < N, other=0.0)[:, None]
    weight = numbers(codes, tl.float32, FAST) * scales
    tl.store(out_ptr + places, weight.to(out_ptr.dtype.element_ty), mask=inside)
