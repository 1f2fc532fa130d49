"""What products with packed weights cost: the weight is read as it is stored.

A few rows are one kernel, bound by the packed bytes or by the instructions that make numbers of them:
``Phase.elements`` are those, since they run at the rate of the vector units. For more rows the weight is
unpacked and a dense product reads it, or, where x is rounded as well, eight-bit numbers are multiplied as
they are. Instructions were counted in disassemblies of ``graphopt_kernels.quantized.bytes_triton`` and
``groups_triton`` for sm_90.
On a CPU int8 is read as it is stored too (``byte_digits``); float8 and codes in
groups are converted first there, which is not counted.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from graphopt_cost_model.call import Call, TensorSpec
from graphopt_cost_model.phase import Phase

__all__ = [
    "DYNAMIC", "GROUPED", "OUTLIERS", "WEIGHT_ONLY", "dynamic_phases", "grouped_phases", "outlier_phases",
    "row_phases", "unpack_phases", "weight_only_phases",
]  # fmt: skip

WEIGHT_ONLY = ("int8", "fp8", "lossless12")
DYNAMIC = ("int8_dynamic", "fp8_dynamic")
OUTLIERS = ("llm_int8",)
GROUPED = ("int4", "int4_awq", "int4_ordered", "int4_offset", "nf4", "int3", "int2")

_FEW = 128
"""Rows up to which one kernel unpacks the weight as it multiplies."""

_SLOTS = 3.5
_SLOTS_A_ROW = 0.06
_SLOTS_A_NUMBER = 2.0
"""Instructions of a lane for a weight of a byte, more for each row that it is multiplied with, and those for
a weight that is a number."""


_FEW_GROUPED = 64
"""The same for weights in groups."""

_SLOTS_GROUPED = {
    "int4": 2.6, "int4_awq": 2.6, "int4_ordered": 2.6, "int4_offset": 2.6, "nf4": 4.7,
    "int3": 2.8, "int2": 2.9,
}  # fmt: skip
"""Instructions for a weight of four bits or fewer."""


def weight_only_phases(call: Call) -> tuple[Phase, ...]:
    """Products of x as it is."""
    x, codes, rows, columns, inner = _sizes(call)
    dtype, flops = _name(x.dtype), 2 * rows * columns * inner
    read, written = _read(call), call.outputs[0].stored_bytes
    elements = max(x.elements, call.outputs[0].elements)
    if rows <= _FEW:
        slots = round(codes.elements * (_SLOTS + _SLOTS_A_ROW * rows))
        return (Phase(flops, max(slots, elements), read, written, dtype),)
    wide = codes.elements * x.dtype.itemsize
    # All that is read beside x and the bias is of the weight.
    packed = read - x.stored_bytes - (bias.stored_bytes if (bias := call.argument("bias")) else 0)
    unpacked = Phase(0, codes.elements, packed, wide, "float32")
    product = Phase(flops, max(elements, codes.elements), read - packed + wide, written, dtype)
    return unpacked, product


def row_phases(call: Call) -> tuple[Phase, ...]:
    """A row's product with what is around it: one kernel that reads all there is once."""
    x, weight = call.argument("x"), call.argument("weight")
    rows, inner = weight.shape
    per_row = max(1, x.elements // inner)
    slots = _SLOTS if call.argument("scales") is not None else _SLOTS_A_NUMBER
    read = sum(spec.stored_bytes for spec in call.inputs)
    return (
        Phase(
            2 * rows * inner * per_row, round(rows * inner * (slots + _SLOTS_A_ROW * per_row)), read,
            call.outputs[0].stored_bytes, _name(x.dtype),
        ),
    )  # fmt: skip


def grouped_phases(call: Call, scheme: str) -> tuple[Phase, ...]:
    """Products of x as it is with weights in groups, of four bits or fewer, kept as ``scheme``."""
    x, _, rows, columns, inner = _sizes(call)
    dtype, flops, weights = _name(x.dtype), 2 * rows * columns * inner, columns * inner
    read, written = _read(call), call.outputs[0].stored_bytes
    elements = max(x.elements, call.outputs[0].elements)
    before: tuple[Phase, ...] = ()
    after: tuple[Phase, ...] = ()
    if scheme in ("int4_awq", "int4_ordered"):
        # x times its factors, or in its order, is a kernel of its own.
        beside = call.argument("factors" if scheme == "int4_awq" else "order").stored_bytes
        before = (Phase(0, x.elements, x.stored_bytes + beside, x.stored_bytes, "float32"),)
        read -= beside
    if scheme == "int4_offset":
        offsets, wide = call.argument("offsets").stored_bytes, 4 * call.outputs[0].elements
        groups = offsets // max(1, 4 * columns)
        if rows <= _FEW_GROUPED:
            before = (Phase(0, x.elements, x.stored_bytes, 4 * rows * groups, "float32"),)
            # Sums times offsets, added to the other product; the result rounded.
            sums = 4 * rows * groups + offsets + wide
            after = (
                Phase(2 * rows * columns * groups, elements, sums, wide, "float32"),
                Phase(0, elements, wide, written, "float32"),
            )
            read, written = read - offsets, wide
    if rows <= _FEW_GROUPED:
        slots = round(weights * (_SLOTS_GROUPED[scheme] + _SLOTS_A_ROW * rows))
        return (*before, Phase(flops, max(slots, elements), read, written, dtype), *after)
    # All that is read beside x and the bias is of the weight.
    bias = call.argument("bias")
    packed = read - x.stored_bytes - (bias.stored_bytes if bias else 0)
    wide = weights * x.dtype.itemsize
    unpacked = Phase(0, weights, packed, wide, "float32")
    product = Phase(flops, max(elements, weights), read - packed + wide, written, dtype)
    return *before, unpacked, product


def dynamic_phases(call: Call) -> tuple[Phase, ...]:
    """x is rounded by one kernel, and multiplied as what it then is."""
    x, codes, rows, columns, inner = _sizes(call)
    flops = 2 * rows * columns * inner
    small, by_row = x.elements, 4 * rows
    rounding = Phase(0, x.elements, x.stored_bytes, small + by_row, "float32")
    read = _read(call) - x.stored_bytes + small + by_row
    written, elements = call.outputs[0].stored_bytes, max(x.elements, call.outputs[0].elements)
    product = Phase(flops, max(elements, codes.elements), read, written, _name(codes.dtype))
    if codes.dtype is not torch.int8 or rows <= _FEW:
        return rounding, product
    # The library's sums have 32 bits; scaling them is a kernel of its own.
    sums = 4 * call.outputs[0].elements
    scaling = Phase(0, elements, sums, written, "float32")
    return rounding, Phase(flops, elements, read, sums, _name(codes.dtype)), scaling


def outlier_phases(call: Call) -> tuple[Phase, ...]:
    """As those of rounded inputs; columns that are outliers are multiplied as they are, in the same kernel,
    or, for more rows, by a product that adds to the result."""
    x, outliers, written = call.argument("x"), call.argument("outliers"), call.outputs[0].stored_bytes
    rows = x.elements // max(1, x.shape[-1])
    flops = 2 * rows * outliers.elements
    beside = rows * outliers.shape[0] * x.dtype.itemsize
    rounding, product, *scaling = dynamic_phases(call)
    if not outliers.elements:
        return rounding, product, *scaling
    rounding = replace(rounding, written=rounding.written + beside)
    if not scaling:
        return rounding, replace(product, flops=product.flops + flops, read=product.read + beside)
    product = replace(product, read=product.read - outliers.stored_bytes)
    added = Phase(flops, x.elements, outliers.stored_bytes + beside + written, written, _name(x.dtype))
    return rounding, product, *scaling, added


def unpack_phases(call: Call) -> tuple[Phase, ...]:
    """One kernel."""
    result = call.outputs[0]
    read = sum(spec.stored_bytes for spec in call.inputs)
    return (Phase(0, result.elements, read, result.stored_bytes, "float32"),)


def _sizes(call: Call) -> tuple[TensorSpec, TensorSpec, int, int, int]:
    """x, codes, rows, columns, products of a sum."""
    x, codes = call.argument("x"), call.argument("codes")
    inner = x.shape[-1]
    return x, codes, x.elements // max(1, inner), call.outputs[0].shape[-1], inner


def _read(call: Call) -> int:
    return sum({spec.place: spec.stored_bytes for spec in call.inputs}.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
