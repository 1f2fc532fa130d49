"""The same call with one of its dimensions made smaller, to probe a kernel cheaply."""

from __future__ import annotations

import math
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


def resized(call: Call, old: int, new: int) -> Call:
    """``call`` with every dimension (and every integer argument) of ``old`` replaced by ``new``.

    The order of strides is kept, and so is what is expanded; padding between rows is not.
    """

    def swap(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            return _resized_spec(value, old, new)
        if isinstance(value, tuple):
            return tuple(swap(item) for item in value)
        return new if type(value) is int and value == old else value

    outputs = tuple(swap(spec) for spec in call.outputs)
    return replace(call, args=swap(call.args), kwargs=swap(call.kwargs), outputs=outputs)


def _resized_spec(spec: TensorSpec, old: int, new: int) -> TensorSpec:
    shape = tuple(new if size == old else size for size in spec.shape)
    if shape == spec.shape or not spec.strided:
        return spec
    # Strides shrink with every dimension inside them that shrinks, so order and gaps stay.
    strides = []
    for stride in spec.stride:
        inner = sum(
            1
            for size, other in zip(spec.shape, spec.stride, strict=True)
            if size == old and 0 < other < stride
        )
        strides.append(math.ceil(stride * new**inner / old**inner))
    return replace(spec, shape=shape, stride=tuple(strides), offset=0)
