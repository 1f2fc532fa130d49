"""Operators that run kernels of different kinds one after the other: each kernel is a phase of its own.

A call that is as slow as its slowest resource would hide the others: a chunked loss computes products
of matrices, then waits for memory while rows are reduced, then computes again. Its time is the sum over
phases, its FLOPs and bytes too.

Operators are known by name, since they belong to packages that may be absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from graphopt_cost_model.attend_cost import attend_phases
from graphopt_cost_model.attention_cost import attention_backward_phases, attention_phases
from graphopt_cost_model.call import Call, TensorSpec
from graphopt_cost_model.class_blocks import PREFIX, block_phases
from graphopt_cost_model.phase import Phase
from graphopt_cost_model.quantized_cost import (
    DYNAMIC,
    GROUPED,
    OUTLIERS,
    WEIGHT_ONLY,
    dynamic_phases,
    grouped_phases,
    outlier_phases,
    row_phases,
    unpack_phases,
    weight_only_phases,
)
from graphopt_cost_model.rotary_cost import (
    cached_rotary_phases,
    rotary_backward_phases,
    rotary_phases,
    stored_rotary_phases,
)

__all__ = ["Phase", "phases_of"]


def phases_of(call: Call) -> tuple[Phase, ...]:
    """The kernels that a call runs in order; ``()`` for an operator that is priced as one."""
    formula = _FORMULAS.get(str(call.packet))
    return formula(call) if formula is not None else ()


def _loss(call: Call) -> tuple[Phase, ...]:
    """Logits and their losses, chunk by chunk."""
    return _chunked(call, call.inputs[:2], gradient=False, output_mask=())


def _loss_with_gradients(call: Call) -> tuple[Phase, ...]:
    return _chunked(call, call.inputs[:2], gradient=True, output_mask=call.argument("output_mask"))


def _loss_backward(call: Call) -> tuple[Phase, ...]:
    """Logits again, then their gradient and what follows from it."""
    return _chunked(call, call.inputs[1:3], gradient=True, output_mask=call.argument("output_mask"))


def _loss_add_backward(call: Call) -> tuple[Phase, ...]:
    """The same, where the first chunk too reads what the weight's gradient is added to."""
    mask = call.argument("output_mask")
    return _chunked(call, call.inputs[2:4], gradient=True, output_mask=mask, into=call.inputs[0])


def _chunked(
    call: Call,
    operands: Sequence[TensorSpec],
    *,
    gradient: bool,
    output_mask: Sequence[bool],
    into: TensorSpec | None = None,
) -> tuple[Phase, ...]:
    """Per chunk: the logits, one kernel over their rows, a product for each gradient that is wanted.

    The weight is read for every chunk anew, and its gradient is read and written for all but the first.
    """
    (rows, width), (columns, _) = operands[0].shape, operands[1].shape
    size, dtype = operands[0].dtype.itemsize, str(operands[0].dtype).removeprefix("torch.")
    chunks = int(call.argument("chunks"))
    step = max(1, -(-rows // chunks))
    weight = columns * width * size
    phases: list[Phase] = []
    for start in range(0, rows, step):
        count = min(step, rows - start)
        flops = 2 * count * width * columns
        logits, data = count * columns * size, count * width * size
        touched = max(count * columns, count * width, columns * width)
        phases.append(Phase(flops, touched, data + weight, logits, dtype))
        phases.append(Phase(0, count * columns, logits, logits if gradient else 0, "float32"))
        if any(output_mask[:1]):
            phases.append(Phase(flops, touched, logits + weight, data, dtype))
        if any(output_mask[1:2]):
            summed = weight if into is None else into.stored_bytes
            again = summed if start or into is not None else 0
            phases.append(Phase(flops, touched, logits + data + again, summed, dtype))
        if any(output_mask[2:3]):
            phases.append(Phase(0, count * columns, logits, columns * size, "float32"))
    return tuple(phases)


def _summed_products(call: Call) -> tuple[Phase, ...]:
    """One product after the other; all but the first read what they add to."""
    phases: list[Phase] = []
    for left, right in zip(call.argument("lefts"), call.argument("rights"), strict=True):
        (rows, depth), columns = left.shape, right.shape[1]
        size, dtype = left.dtype.itemsize, str(left.dtype).removeprefix("torch.")
        result = rows * columns * size
        read = left.stored_bytes + right.stored_bytes + (result if phases else 0)
        touched = max(rows * depth, depth * columns, rows * columns)
        phases.append(Phase(2 * rows * depth * columns, touched, read, result, dtype))
    return tuple(phases)


def _convolution_relu(call: Call) -> tuple[Phase, ...]:
    """One kernel: operands and residual are read once, the result is written once."""
    result, weight = call.outputs[0], call.inputs[1]
    flops = 2 * result.elements * math.prod(weight.shape[1:])
    read = sum(spec.stored_bytes for spec in call.inputs)
    touched = max(spec.elements for spec in (*call.inputs, result))
    dtype = str(result.dtype).removeprefix("torch.")
    return (Phase(flops, touched, read, result.stored_bytes, dtype),)


def _added_product(call: Call) -> tuple[Phase, ...]:
    """A product that reads what it is added to."""
    into, left, right = call.inputs[:3]
    (rows, depth), columns = left.shape, right.shape[1]
    dtype = str(left.dtype).removeprefix("torch.")
    result = rows * columns * into.dtype.itemsize
    touched = max(rows * depth, depth * columns, rows * columns)
    read = left.stored_bytes + right.stored_bytes + result
    return (Phase(2 * rows * depth * columns, touched, read, result, dtype),)


def _packed(call: Call) -> tuple[Phase, ...]:
    """Bits and small codes: a pass for each of the eight places in a byte, over memory at that stride.

    A pass touches every line of the unpacked side, whichever elements of it it needs.
    """
    wide = max((*call.inputs, *call.outputs), key=lambda spec: spec.stored_bytes)
    narrow = min((*call.inputs, *call.outputs), key=lambda spec: spec.stored_bytes)
    packs = wide in call.inputs
    read, written = (wide, narrow) if packs else (narrow, wide)
    again = narrow.stored_bytes if packs else 0
    each = Phase(0, narrow.elements, read.stored_bytes + again, written.stored_bytes, "float32")
    return (each,) * 8


def _converted(passes: int) -> Callable[[Call], tuple[Phase, ...]]:
    """Conversions slab by slab: ``passes`` over eight bytes an element, counted on two CPU cores."""

    def phases(call: Call) -> tuple[Phase, ...]:
        wide = max((*call.inputs, *call.outputs), key=lambda spec: spec.stored_bytes)
        moved = 8 * wide.elements
        return (Phase(0, wide.elements, moved, moved, "float32"),) * passes

    return phases


_FORMULAS: dict[str, Callable[[Call], tuple[Phase, ...]]] = {
    "graphopt.attend_cross": attend_phases,
    "graphopt.attend_full": attend_phases,
    "graphopt.attend_relative": attend_phases,
    "graphopt.attend_ring": attend_phases,
    "graphopt.attention": attention_phases,
    "graphopt.attention_backward": attention_backward_phases,
    "graphopt.linear_cross_entropy": _loss,
    "graphopt.linear_cross_entropy_backward": _loss_backward,
    "graphopt.linear_cross_entropy_add_backward": _loss_add_backward,
    "graphopt.linear_cross_entropy_with_gradients": _loss_with_gradients,
    PREFIX: block_phases,
    f"{PREFIX}_backward": block_phases,
    f"{PREFIX}_add_backward": block_phases,
    f"{PREFIX}_with_gradients": block_phases,
    "graphopt.convolution_relu": _convolution_relu,
    "graphopt.add_product": _added_product,
    "graphopt.rotary": rotary_phases,
    "graphopt.rotary_backward": rotary_backward_phases,
    "graphopt.rotary_to_cache": cached_rotary_phases,
    "graphopt.rotary_to_stores": stored_rotary_phases,
    "graphopt.row_product": row_phases,
    "graphopt.sum_products": _summed_products,
    "graphopt.pack_bits": _packed,
    "graphopt.unpack_bits": _packed,
    "graphopt.quantize_groups": _converted(20),
    "graphopt.dequantize_groups": _converted(4),
    "graphopt.pack_levels": _converted(8),
    "graphopt.unpack_levels": _converted(4),
    **{f"graphopt.linear_{scheme}": weight_only_phases for scheme in WEIGHT_ONLY},
    **{f"graphopt.linear_{scheme}": dynamic_phases for scheme in DYNAMIC},
    **{f"graphopt.linear_{scheme}": outlier_phases for scheme in OUTLIERS},
    **{f"graphopt.linear_{scheme}": partial(grouped_phases, scheme=scheme) for scheme in GROUPED},
    **{
        f"graphopt.unpack_{scheme}": unpack_phases
        for scheme in (*WEIGHT_ONLY, *DYNAMIC, *OUTLIERS, *GROUPED)
    },
}
