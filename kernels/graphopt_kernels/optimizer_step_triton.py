"""Triton source of ``graphopt_kernels.optimizer_step``. Imports triton: import it lazily.

One launch goes over any number of tensors: ``table`` [4 + 2, tensors] holds the addresses of each one's
parameter, gradient and states, how many elements it has, and the number of its first chunk; ``owner`` says
which tensor each chunk of ``CHUNK`` elements is of. Whole blocks are read and written without a mask, 16
bytes at a time. Arguments are not annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["adam_kernel", "sgd_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def _place(table, row, tensors, owner, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where one of a tensor's arrays begins."""
    pointer = tl.load(table + row * tensors + owner).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit  # type: ignore[untyped-decorator]
def _read(pointer, at, count, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    found = tl.load(pointer + at, mask=at < count, other=0.0) if MASKED else tl.load(pointer + at)
    return found.to(tl.float32)


@triton.jit
def _drawn(seed, at):  # type: ignore[no-untyped-def]
    """32 random bits for each element, twice: of Philox with seven rounds (Salmon et al., "Parallel Random
    Numbers: As Easy as 1, 2, 3"): fewer pass no tests of randomness, more cost time."""
    first, second, _, _ = tl.randint4x(seed, at.to(tl.int32), 7)
    return first.to(tl.int32, bitcast=True), second.to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _write(pointer, at, count, value, noise, DTYPE: tl.constexpr, DRAWN: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """``DRAWN``: to one of the two nearest bfloat16, drawn so that on average the value stays what it is:
    ``noise`` of 16 bits is added to the bits that are cut off. Infinities and NaN are converted as ever."""
    rounded = value.to(DTYPE)
    if DRAWN:
        bits = value.to(tl.int32, bitcast=True)
        drawn = ((bits + (noise & 0xFFFF)) & -65536).to(tl.float32, bitcast=True).to(DTYPE)
        rounded = tl.where((bits & 0x7F800000) == 0x7F800000, rounded, drawn)
    if MASKED:
        tl.store(pointer + at, rounded, mask=at < count)
    else:
        tl.store(pointer + at, rounded)


@triton.jit  # type: ignore[untyped-decorator]
def _adam_block(  # type: ignore[no-untyped-def]
    p, g, m, v, at, count, scale, seed, step_size, keep, decay, rate_1, beta_2, rate_2, eps, root,
    DECAYED: tl.constexpr, DECOUPLED: tl.constexpr, ZERO: tl.constexpr, DRAWN: tl.constexpr,
    DRAWN_STATES: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    value = _read(p, at, count, MASKED)
    gradient = _read(g, at, count, MASKED) * scale
    if DECOUPLED:
        value *= keep
    elif DECAYED:
        gradient += decay * value
    average = _read(m, at, count, MASKED)
    square = _read(v, at, count, MASKED)
    average += rate_1 * (gradient - average)
    square = beta_2 * square + rate_2 * gradient * gradient
    value -= step_size * average / (tl.sqrt_rn(square) * root + eps)
    first = at.to(tl.int32)
    second = first
    if DRAWN:
        first, second = _drawn(seed, at)
    _write(p, at, count, value, first, P, DRAWN, MASKED)
    _write(m, at, count, average, first >> 16, S, DRAWN_STATES, MASKED)
    _write(v, at, count, square, second, S, DRAWN_STATES, MASKED)
    if ZERO:
        _write(g, at, count, tl.zeros_like(value), first, G, False, MASKED)


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def adam_kernel(  # type: ignore[no-untyped-def]
    table, owner, factor, tensors, seed, step_size, keep, decay, rate_1, beta_2, rate_2, eps, root,
    DECAYED: tl.constexpr, DECOUPLED: tl.constexpr, ZERO: tl.constexpr, DRAWN: tl.constexpr,
    DRAWN_STATES: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, P: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adam and AdamW. ``keep``: what a decoupled decay leaves of a parameter; ``root``: one over the root of
    the second bias correction; the first is in ``step_size``."""
    chunk = tl.program_id(0)
    tensor = tl.load(owner + chunk)
    p = _place(table, 0, tensors, tensor, P, ALIGNED)
    g = _place(table, 1, tensors, tensor, G, ALIGNED)
    m = _place(table, 2, tensors, tensor, S, ALIGNED)
    v = _place(table, 3, tensors, tensor, S, ALIGNED)
    count = tl.load(table + 4 * tensors + tensor)
    begin = (chunk - tl.load(table + 5 * tensors + tensor)) * CHUNK
    scale = 1.0
    if SCALED:
        scale = tl.load(factor)
    end = tl.minimum(count, begin + CHUNK)
    for start in range(begin, end, BLOCK):
        at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        if start + BLOCK <= count:
            _adam_block(
                p, g, m, v, at, count, scale, seed + tensor, step_size, keep, decay, rate_1, beta_2,
                rate_2, eps, root, DECAYED, DECOUPLED, ZERO, DRAWN, DRAWN_STATES, False, P, G, S,
            )  # fmt: skip
        else:
            _adam_block(
                p, g, m, v, at, count, scale, seed + tensor, step_size, keep, decay, rate_1, beta_2,
                rate_2, eps, root, DECAYED, DECOUPLED, ZERO, DRAWN, DRAWN_STATES, True, P, G, S,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _sgd_block(  # type: ignore[no-untyped-def]
    p, g, m, at, count, scale, seed, rate, momentum, share, decay,
    DECAYED: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    ZERO: tl.constexpr,
    DRAWN: tl.constexpr, DRAWN_STATES: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    value = _read(p, at, count, MASKED)
    gradient = _read(g, at, count, MASKED) * scale
    if DECAYED:
        gradient += decay * value
    noise = at.to(tl.int32)
    if DRAWN:
        noise, _ = _drawn(seed, at)
    if MOMENTUM:
        moving = gradient
        if not FIRST:
            moving = momentum * _read(m, at, count, MASKED) + share * gradient
        _write(m, at, count, moving, noise >> 16, S, DRAWN_STATES, MASKED)
        gradient = gradient + momentum * moving if NESTEROV else moving
    _write(p, at, count, value - rate * gradient, noise, P, DRAWN, MASKED)
    if ZERO:
        _write(g, at, count, tl.zeros_like(value), noise, G, False, MASKED)


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def sgd_kernel(  # type: ignore[no-untyped-def]
    table, owner, factor, tensors, seed, rate, momentum, share, decay,
    DECAYED: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    ZERO: tl.constexpr,
    DRAWN: tl.constexpr, DRAWN_STATES: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """SGD. ``share``: what a gradient counts for in its moving average, 1 less the dampening; ``FIRST``: the
    average is the first gradient itself."""
    chunk = tl.program_id(0)
    tensor = tl.load(owner + chunk)
    p = _place(table, 0, tensors, tensor, P, ALIGNED)
    g = _place(table, 1, tensors, tensor, G, ALIGNED)
    m = p
    if MOMENTUM:
        m = _place(table, 2, tensors, tensor, S, ALIGNED)
    count = tl.load(table + 4 * tensors + tensor)
    begin = (chunk - tl.load(table + 5 * tensors + tensor)) * CHUNK
    scale = 1.0
    if SCALED:
        scale = tl.load(factor)
    end = tl.minimum(count, begin + CHUNK)
    for start in range(begin, end, BLOCK):
        at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        if start + BLOCK <= count:
            _sgd_block(
                p, g, m, at, count, scale, seed + tensor, rate, momentum, share, decay,
                DECAYED, MOMENTUM, FIRST, NESTEROV, ZERO, DRAWN, DRAWN_STATES, False, P, G, S,
            )  # fmt: skip
        else:
            _sgd_block(
                p, g, m, at, count, scale, seed + tensor, rate, momentum, share, decay,
                DECAYED, MOMENTUM, FIRST, NESTEROV, ZERO, DRAWN, DRAWN_STATES, True, P, G, S,
            )  # fmt: skip
