"""Arithmetic of one operator call.

``Work.flops`` counts what runs at the matmul rate of a device: products of matrices,
convolutions, attention, recurrent layers; a multiply-add is two FLOPs. It also counts fast
Fourier transforms, at the customary 5 N log2 N for N complex points (FFTW's benchFFT) and half
of that between real and complex; they run at the vector rate (``Work.on_vectors``).
Everything else, pointwise operators, reductions, copies, has ``flops`` 0 and is priced by its
bytes; ``Work.elements``, one for each element of the largest tensor that it touches, bounds its
time from below at the vector rate.

Formulas registered with ``torch.utils.flop_counter.register_flop_formula`` are used where there
is one. Those that torch lacks or gets wrong are here:

- attention on the CPU, with grouped heads or through a composite operator;
- matrix products other than ``mm``, ``addmm``, ``bmm``, ``baddbmm``: composite, grouped, integer,
  matrix with vector, einsum;
- the backward of a grouped convolution, whose weight gradient torch counts once for each group;
- recurrent layers and Fourier transforms;
- operators of several phases (``graphopt_cost_model.phases``).

A causal mask is not taken off, as in torch's own counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils.flop_counter import flop_registry

from graphopt import _torch
from graphopt_cost_model.call import Call, TensorSpec, call_of, tensors_in
from graphopt_cost_model.phases import phases_of

__all__ = ["Work", "flops", "work"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Work:
    """``flops`` at the matmul rate, or at the vector rate if ``on_vectors``; ``elements`` touched."""

    flops: int
    elements: int
    on_vectors: bool = False


def flops(node: fx.Node) -> int:
    """Counted FLOPs of a node (see the module); 0 for what is priced by its bytes."""
    return work(call_of(node)).flops if node.op == "call_function" else 0


def work(call: Call) -> Work:
    """Arithmetic of a call. Views and calls without tensors do none."""
    if (not call.outputs and not call.mutates) or call.is_view:
        return Work(0, 0)
    elements = max((spec.elements for spec in (*call.inputs, *call.outputs)), default=0)
    packet = call.packet
    if phases := phases_of(call):
        return Work(sum(phase.flops for phase in phases), elements)
    if packet in _TRANSFORMS:
        return Work(_transform(call), elements, on_vectors=True)
    formula = _FORMULAS.get(packet)
    if formula is not None:
        return Work(formula(call), elements)
    registered = flop_registry.get(packet)
    if registered is not None:
        return Work(_from_registry(registered, call), elements)
    return Work(0, elements)


def _from_registry(formula: Callable[..., Any], call: Call) -> int:
    """torch's formula, fed tensors without data: some formulas want tensors, others only shapes."""
    with _torch.without_modes():
        args, kwargs = _meta(call.args), {name: _meta(value) for name, value in call.kwargs}
        outputs = tuple(_meta(spec) for spec in call.outputs)
        return int(formula(*args, **kwargs, out_val=outputs[0] if len(outputs) == 1 else outputs))


def _meta(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    return tuple(_meta(item) for item in value) if isinstance(value, tuple) else value


# --- products of matrices ----------------------------------------------------------------------


def _last_contracted(call: Call) -> int:
    """Every element of the output sums over the last dimension of the first input."""
    return 2 * call.outputs[0].elements * call.inputs[0].shape[-1]


def _vector_product(call: Call) -> int:
    """dot, vdot, mv: each element of the matrix (or first vector) is multiplied once."""
    return 2 * call.inputs[0].elements


def _added_vector_product(call: Call) -> int:
    return 2 * call.inputs[1].elements


def _outer(call: Call) -> int:
    return 2 * call.outputs[0].elements


def _added_batched(call: Call) -> int:
    """addbmm: every batch is summed into one output."""
    batch, _, inner = call.inputs[1].shape
    return 2 * call.outputs[0].elements * inner * batch


def _grouped(call: Call) -> int:
    """Rows, columns or the inner dimension of one operand are split among groups."""
    left, right = call.inputs[:2]
    rows, inner = left.shape[-2:]
    groups = left.shape[0] if len(left.shape) == 3 and len(right.shape) == 3 else 1
    return 2 * groups * rows * inner * right.shape[-1]


def _einsum(call: Call) -> int:
    """Contracted pairwise from the left, as torch does without opt_einsum."""
    operands = list(tensors_in(call.args[1]))
    terms, result = _letters(str(call.args[0]), [len(spec.shape) for spec in operands])
    size: dict[str, int] = {}
    for term, spec in zip(terms, operands, strict=True):
        for letter, length in zip(term, spec.shape, strict=True):
            size[letter] = max(size.get(letter, 1), length)
    total, held = 0, set(terms[0])
    for index in range(1, len(terms)):
        total += 2 * math.prod(size[letter] for letter in held | set(terms[index]))
        needed = set("".join(terms[index + 1 :])) | set(result)
        held = (held | set(terms[index])) & needed
    return total


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """One letter for each dimension of each operand, and those of the result.

    Dimensions behind an ellipsis get digits, counted from the right as they are broadcast.
    """
    sources, arrow, result = equation.replace(" ", "").partition("->")
    terms, dots = [], ""
    for term, rank in zip(sources.split(","), ranks, strict=True):
        hidden = "".join(chr(ord("0") + n) for n in reversed(range(rank - len(term.replace("...", "")))))
        dots = hidden if "..." in term and len(hidden) > len(dots) else dots
        terms.append(term.replace("...", hidden))
    if arrow:
        return terms, result.replace("...", dots)
    joined = "".join(terms)
    return terms, dots + "".join(letter for letter in joined if joined.count(letter) == 1)


# --- attention ---------------------------------------------------------------------------------


def _attention_shape(query: TensorSpec, key: TensorSpec, value: TensorSpec) -> tuple[int, int, int]:
    """(query-key pairs over batch and heads, head width of query and key, head width of value)."""
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return pairs, query.shape[-1], value.shape[-1]


def _attention(call: Call) -> int:
    """Two products: scores and output."""
    pairs, width, value_width = _attention_shape(*call.inputs[:3])
    return 2 * pairs * (width + value_width)


def _attention_backward(call: Call) -> int:
    """Five products: the scores again, then gradients of value, scores, query and key."""
    pairs, width, value_width = _attention_shape(*call.inputs[1:4])
    return 2 * pairs * (3 * width + 2 * value_width)


# --- convolution, recurrence, transforms -------------------------------------------------------


def _filtered(spec: TensorSpec, weight: TensorSpec) -> int:
    return 2 * spec.elements * math.prod(weight.shape[1:])


def _convolution(call: Call) -> int:
    data, weight = call.inputs[:2]
    return _filtered(data if call.argument("transposed", False) else call.outputs[0], weight)


def _plain_convolution(call: Call) -> int:
    return _filtered(call.outputs[0], call.inputs[1])


def _transposed_convolution(call: Call) -> int:
    return _filtered(call.inputs[0], call.inputs[1])


def _convolution_backward(call: Call) -> int:
    """The gradients of input and of weight each cost what the forward does, groups or not."""
    grad, data, weight = call.inputs[:3]
    forward = _filtered(data if call.argument("transposed") else grad, weight)
    return forward * sum(map(bool, call.argument("output_mask")[:2]))


def _recurrent(*weights: str, passes: int = 1) -> Callable[[Call], int]:
    """Each matrix among the arguments ``weights`` meets each time step of each sequence once.

    A backward makes two such ``passes``, for the gradients of data and of weights.
    """

    def formula(call: Call) -> int:
        steps = math.prod(call.inputs[0].shape[:-1])
        matrices = tensors_in(tuple(call.argument(name) for name in weights))
        return passes * 2 * steps * sum(spec.elements for spec in matrices if len(spec.shape) == 2)

    return formula


def _transform(call: Call) -> int:
    data = call.inputs[0]
    points = max(data, call.outputs[0], key=lambda spec: spec.elements)
    length = math.prod(points.shape[dim] for dim in call.argument("dim"))
    factor = 5.0 if call.packet is aten._fft_c2c else 2.5
    return int(factor * points.elements * math.log2(max(length, 2)))


_TRANSFORMS = frozenset({aten._fft_c2c, aten._fft_r2c, aten._fft_c2r})

_FORMULAS: dict[Any, Callable[[Call], int]] = {
    aten.linear: _last_contracted,
    aten.matmul: _last_contracted,
    aten.inner: _last_contracted,
    aten._int_mm: _last_contracted,
    aten._weight_int8pack_mm: _last_contracted,
    aten._weight_int4pack_mm: _last_contracted,
    aten._weight_int4pack_mm_for_cpu: _last_contracted,
    aten.mv: _vector_product,
    aten.dot: _vector_product,
    aten.vdot: _vector_product,
    aten.addmv: _added_vector_product,
    aten.outer: _outer,
    aten.addr: _outer,
    aten.addbmm: _added_batched,
    aten._grouped_mm: _grouped,
    aten._scaled_grouped_mm: _grouped,
    aten.einsum: _einsum,
    aten.scaled_dot_product_attention: _attention,
    aten._scaled_dot_product_attention_math: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten.conv1d: _plain_convolution,
    aten.conv2d: _plain_convolution,
    aten.conv3d: _plain_convolution,
    aten.mkldnn_convolution: _plain_convolution,
    aten.conv_transpose1d: _transposed_convolution,
    aten.conv_transpose2d: _transposed_convolution,
    aten.conv_transpose3d: _transposed_convolution,
    aten.convolution_backward: _convolution_backward,
    aten.lstm: _recurrent("params"),
    aten.gru: _recurrent("params"),
    aten.rnn_tanh: _recurrent("params"),
    aten.rnn_relu: _recurrent("params"),
    aten.mkldnn_rnn_layer: _recurrent("weight0", "weight1"),
    aten._cudnn_rnn: _recurrent("weight"),
    aten.mkldnn_rnn_layer_backward: _recurrent("weight1", "weight2", passes=2),
    aten._cudnn_rnn_backward: _recurrent("weight", passes=2),
}
