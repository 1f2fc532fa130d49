"""Triton source of ``graphopt_kernels.optimizer_update``. Imports triton: import it lazily.

As ``optimizer_step_triton``, with which it shares the table of tensors and how they are read and written. A
number whose bit is set in ``LOADED`` is a pointer to it: each program reads it once. Arguments are not
annotated: triton evaluates annotations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt_kernels.optimizer_step_triton import _place, _read, _write

__all__ = ["adam_update_kernel", "sgd_update_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def _number(given, LOADED: tl.constexpr, PLACE: tl.constexpr):  # type: ignore[no-untyped-def]
    number = given
    if (LOADED >> PLACE) & 1:
        number = tl.load(given).to(tl.float32)
    return number


@triton.jit  # type: ignore[untyped-decorator]
def _adam_block(  # type: ignore[no-untyped-def]
    p, g, m, v, at, count, scale, keep, decay, weight, beta, share, rate, root, eps, KEPT: tl.constexpr,
    DECAYED: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    value = _read(p, at, count, MASKED)
    gradient = _read(g, at, count, MASKED) * scale
    if DECAYED:
        gradient += decay * value
    if KEPT:
        value *= keep
    average = _read(m, at, count, MASKED)
    square = _read(v, at, count, MASKED)
    average += weight * (gradient - average)
    square = beta * square + share * gradient * gradient
    value -= rate * average / (tl.sqrt_rn(square) * root + eps)
    _write(p, at, count, value, at, P, False, MASKED)
    _write(m, at, count, average, at, S, False, MASKED)
    _write(v, at, count, square, at, S, False, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def adam_update_kernel(  # type: ignore[no-untyped-def]
    table, owner, tensors, scale, keep, decay, weight, beta, share, rate, correction, eps,
    LOADED: tl.constexpr, KEPT: tl.constexpr, DECAYED: tl.constexpr, ALIGNED: tl.constexpr, P: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adam and AdamW, of the numbers ``ADAM_NUMBERS``."""
    scale = _number(scale, LOADED, 0)
    keep = _number(keep, LOADED, 1)
    decay = _number(decay, LOADED, 2)
    weight = _number(weight, LOADED, 3)
    beta = _number(beta, LOADED, 4)
    share = _number(share, LOADED, 5)
    rate = _number(rate, LOADED, 6)
    root = 1.0 / _number(correction, LOADED, 7)
    eps = _number(eps, LOADED, 8)
    chunk = tl.program_id(0)
    tensor = tl.load(owner + chunk)
    p = _place(table, 0, tensors, tensor, P, ALIGNED)
    g = _place(table, 1, tensors, tensor, G, ALIGNED)
    m = _place(table, 2, tensors, tensor, S, ALIGNED)
    v = _place(table, 3, tensors, tensor, S, ALIGNED)
    count = tl.load(table + 4 * tensors + tensor)
    begin = (chunk - tl.load(table + 5 * tensors + tensor)) * CHUNK
    end = tl.minimum(count, begin + CHUNK)
    for start in range(begin, end, BLOCK):
        at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        if start + BLOCK <= count:
            _adam_block(
                p, g, m, v, at, count, scale, keep, decay, weight, beta, share, rate, root, eps, KEPT,
                DECAYED, False, P, S,
            )  # fmt: skip
        else:
            _adam_block(
                p, g, m, v, at, count, scale, keep, decay, weight, beta, share, rate, root, eps, KEPT,
                DECAYED, True, P, S,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _sgd_block(  # type: ignore[no-untyped-def]
    p, g, m, at, count, scale, keep, decay, momentum, share, rate, KEPT: tl.constexpr, DECAYED: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    value = _read(p, at, count, MASKED)
    gradient = _read(g, at, count, MASKED) * scale
    if DECAYED:
        gradient += decay * value
    if KEPT:
        value *= keep
    if MOMENTUM:
        moving = momentum * _read(m, at, count, MASKED) + share * gradient
        _write(m, at, count, moving, at, S, False, MASKED)
        gradient = gradient + momentum * moving if NESTEROV else moving
    _write(p, at, count, value - rate * gradient, at, P, False, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def sgd_update_kernel(  # type: ignore[no-untyped-def]
    table, owner, tensors, scale, keep, decay, momentum, share, rate, LOADED: tl.constexpr,
    KEPT: tl.constexpr, DECAYED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr, P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """SGD, of the numbers ``SGD_NUMBERS``."""
    scale = _number(scale, LOADED, 0)
    keep = _number(keep, LOADED, 1)
    decay = _number(decay, LOADED, 2)
    momentum = _number(momentum, LOADED, 3)
    share = _number(share, LOADED, 4)
    rate = _number(rate, LOADED, 5)
    chunk = tl.program_id(0)
    tensor = tl.load(owner + chunk)
    p = _place(table, 0, tensors, tensor, P, ALIGNED)
    g = _place(table, 1, tensors, tensor, G, ALIGNED)
    m = p
    if MOMENTUM:
        m = _place(table, 2, tensors, tensor, S, ALIGNED)
    count = tl.load(table + 4 * tensors + tensor)
    begin = (chunk - tl.load(table + 5 * tensors + tensor)) * CHUNK
    end = tl.minimum(count, begin + CHUNK)
    for start in range(begin, end, BLOCK):
        at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        if start + BLOCK <= count:
            _sgd_block(
                p, g, m, at, count, scale, keep, decay, momentum, share, rate, KEPT, DECAYED, MOMENTUM,
                NESTEROV, False, P, S,
            )  # fmt: skip
        else:
            _sgd_block(
                p, g, m, at, count, scale, keep, decay, momentum, share, rate, KEPT, DECAYED, MOMENTUM,
                NESTEROV, True, P, S,
            )  # fmt: skip
