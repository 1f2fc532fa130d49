"""The same call with some of its dimensions made smaller, to probe a kernel cheaply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphopt_cost_model.call import Call, TensorSpec

__all__ = ["resizable_sizes", "resized"]

_SMALLEST = 32
"""Below this, a number is as likely a dimension index or a kernel size as a length."""


def resizable_sizes(call: Call) -> list[int]:
    """Sizes worth shrinking: those of the largest tensor from its first dimension on (batch and
    rows first, since kernels choose their blocking by the inner ones), then the others."""
    specs = sorted((*call.inputs, *call.outputs), key=lambda spec: -spec.stored_bytes)
    sizes = dict.fromkeys(size for spec in specs for size in spec.shape)
    return [size for size in sizes if size >= _SMALLEST]


def resized(call: Call, sizes: Mapping[int, int]) -> Call:
    """``call`` with every dimension, and every integer argument, replaced as ``sizes`` says.

    The order of strides is kept, and so is what is expanded; padding between rows is not.
    """

    def swap(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            return _resized_spec(value, sizes)
        if isinstance(value, tuple):
            return tuple(swap(item) for item in value)
        return sizes.get(value, value) if type(value) is int else value

    outputs = tuple(swap(spec) for spec in call.outputs)
    return replace(call, args=swap(call.args), kwargs=swap(call.kwargs), outputs=outputs)


def _resized_spec(spec: TensorSpec, sizes: Mapping[int, int]) -> TensorSpec:
    shape = tuple(sizes.get(size, size) for size in spec.shape)
    if shape == spec.shape or not spec.strided:
        return spec
    # A stride shrinks with every dimension inside it that shrinks, so order and gaps stay.
    strides = []
    for stride in spec.stride:
        new, old = stride, 1
        for size, other in zip(spec.shape, spec.stride, strict=True):
            if size in sizes and 0 < other < stride:
                new, old = new * sizes[size], old * size
        strides.append(math.ceil(new / old))
    return replace(spec, shape=shape, stride=tuple(strides), offset=0)
