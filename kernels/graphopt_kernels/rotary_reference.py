"""``graphopt_kernels.rotary`` with ATen operators, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["empty_weights", "given_gradient", "rotary_backward_reference", "rotary_reference"]

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def given_gradient(*gradients: torch.Tensor | None) -> torch.Tensor:
    """The first gradient that there is."""
    found = next((gradient for gradient in gradients if gradient is not None), None)
    if found is None:
        raise ValueError("rotary_backward: takes one gradient or more, got none")
    return found


def empty_weights(
    like: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (
        like.new_empty(0) if weight is None else weight.new_empty(weight.shape if wanted else (0,))
        for weight, wanted in ((query_weight, output_mask[1]), (key_weight, output_mask[2]))
    )
    return first, second


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _parts(heads: Sequence[int], packed: torch.Tensor) -> _Results:
    """Queries, keys and values of ``packed`` [B, S, N, D]; copies where there are several groups."""
    batch, length, _, size = packed.shape
    groups, *counts = heads
    each = torch.split(packed.reshape(batch, length, groups, sum(counts), size), list(counts), 3)
    first, second, third = (part.flatten(2, 3) for part in each)
    return first, second, third


def _split(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Both elements of every pair of the last dimension."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _tables(
    table: torch.Tensor, exact: torch.dtype, width: int, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers for the first and second element of each pair, [B or 1, S, 1, width / 2]."""
    wide = table.to(exact).unsqueeze(-2)
    return (wide, wide) if table.shape[-1] != width else _split(wide, interleaved)


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, width: int, interleaved: bool, back: bool
) -> torch.Tensor:
    """``x`` [B, S, H, D] turned, or what the gradient of that is for ``x``, in the dtype of ``x``."""
    cos_first, cos_second = _tables(cos, x.dtype, width, interleaved)
    sin_first, sin_second = _tables(sin, x.dtype, width, interleaved)
    first, second = _split(x[..., :width], interleaved)
    if back:
        a = first * cos_first + second * sin_second
        b = second * cos_second - first * sin_first
    else:
        a = first * cos_first - second * sin_first
        b = second * cos_second + first * sin_second
    pairs = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((pairs, x[..., width:]), -1)


def _factor(weight: torch.Tensor, offset: float, exact: torch.dtype) -> torch.Tensor:
    return weight.to(exact) + offset if offset else weight.to(exact)


def rotary_reference(
    input: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    copies_values: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``rotary`` computes, with ATen operators."""
    exact = _exact(input.dtype)
    query, key, value = _parts(heads, input)
    found = []
    for part, weight in ((query, query_weight), (key, key_weight)):
        x = part.to(exact)
        if eps is not None:
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            x = x if weight is None else x * _factor(weight, weight_offset, exact)
        turned = _turned(x, cos, sin, width, interleaved, back=False)
        found.append(turned.to(dtype).contiguous())
    copy = (
        value.clone(memory_format=torch.contiguous_format)
        if copies_values
        else value.new_empty((*value.shape[:2], 0, value.shape[3]))
    )
    return found[0], found[1], copy


def rotary_backward_reference(
    d_query: torch.Tensor | None,
    d_key: torch.Tensor | None,
    d_value: torch.Tensor | None,
    input: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``rotary_backward`` computes, with ATen operators."""
    exact = _exact(dtype)
    given = given_gradient(d_query, d_key, d_value)
    batch, length, _, size = given.shape
    groups, *counts = heads
    whole = given.new_zeros((batch, length, groups, sum(counts), size), dtype=dtype)
    weights = empty_weights(given, query_weight, key_weight, output_mask)
    rows = (None, None) if input is None else _parts(heads, input)[:2]
    start = 0
    for number, (gradient, count) in enumerate(zip((d_query, d_key, d_value), counts, strict=True)):
        target = whole.narrow(3, start, count)
        start += count
        if gradient is None:
            if number < 2 and weights[number].numel():
                weights[number].zero_()
            continue
        dx = gradient.to(exact)
        if number < 2:
            dx = _turned(dx, cos, sin, width, interleaved, back=True)
            if eps is not None:
                part, weight = rows[number], (query_weight, key_weight)[number]
                assert part is not None
                x = part.to(exact)
                scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
                x = x * scale
                if weights[number].numel():
                    weights[number].copy_((dx * x).sum((0, 1, 2)))
                if weight is not None:
                    dx = dx * _factor(weight, weight_offset, exact)
                dx = scale * (dx - x * (dx * x).mean(-1, keepdim=True))
        target.copy_(dx.reshape(batch, length, groups, count, size))
    d_input = whole.flatten(2, 3) if output_mask[0] else given.new_empty((0,), dtype=dtype)
    return d_input, weights[0], weights[1]
