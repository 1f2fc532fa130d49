"""Workspaces of CPU kernels that are known from their source, or that must not be run to find out.

Extrapolating from smaller calls needs a workspace that grows with them. A chunked loss converts some rows
of a chunk at a time, as many as fit a core's cache, and those take the same whatever the size.
Hand-counted from ``graphopt_kernels.linear_cross_entropy`` and ``cross_entropy_rows``.
"""

from __future__ import annotations

import torch

from graphopt.collectives import is_collective, staged_bytes
from graphopt.product_scratch import product_scratch
from graphopt_cost_model.attend_cost import attend_workspace, joint_workspace
from graphopt_cost_model.attention_cost import attention_workspace
from graphopt_cost_model.call import Call, TensorSpec
from graphopt_cost_model.class_blocks import BLOCK_ELEMENTS, block_workspace
from graphopt_cost_model.class_blocks import PREFIX as BLOCKS
from graphopt_cost_model.dropout_cost import dropout_workspace

__all__ = ["stated_workspace"]

_ATTENTION = ("graphopt.attention", "graphopt.attention_backward")
_STORES = tuple(f"graphopt.attend_{name}" for name in ("cross", "full", "relative", "ring"))
_PREFIX = "graphopt.linear_cross_entropy"


def stated_workspace(call: Call) -> int | None:
    """Bytes that a call on the CPU takes beyond its outputs; ``None`` for operators that state none."""
    if is_collective(call.target):
        # Probing would communicate.
        return staged_bytes(
            call.target,
            *(max((s.stored_bytes for s in side), default=0) for side in (call.inputs, call.outputs)),
        )
    name = str(call.packet)
    if name.startswith(BLOCKS):
        return block_workspace(call)
    if name in _ATTENTION:
        return attention_workspace(call)
    if name in _STORES:
        return attend_workspace(call)
    if name == "graphopt.attend_joint":
        return joint_workspace(call)
    if name == "graphopt.dropout_add":
        return dropout_workspace(call)
    if not name.startswith(_PREFIX):
        return None
    data: TensorSpec = call.argument("input")
    weight: TensorSpec = call.argument("weight")
    rows, columns = data.shape[0], weight.shape[0]
    size = data.dtype.itemsize
    wide = 8 if data.dtype is torch.float64 else 4
    step = min(-(-rows // int(call.argument("chunks"))), rows)
    block = min(step, max(1, BLOCK_ELEMENTS // max(columns, 1)))
    # Rows in the dtype of the arithmetic, the slope of a softcap, what is kept of each row, and numbers.
    converted = int(size < wide)
    of_block = (9 + 5 * wide) * block
    if name == _PREFIX:
        of_rows = rows * wide - call.outputs[0].stored_bytes
    elif name.endswith("_backward"):
        grad: TensorSpec = call.argument("grad")
        scales = 1 if call.argument("reduction") == "mean" else grad.elements * (grad.dtype.itemsize != wide)
        of_rows, of_block = scales * wide, (9 + 2 * wide) * block + 8 + wide
        if call.argument("sum_grad") is not None:
            of_block += wide * block
    else:
        of_rows = (2 * rows + 1) * wide - call.outputs[0].stored_bytes
    mask = (False,) * 3 if name == _PREFIX else call.argument("output_mask")
    if name != _PREFIX and call.argument("softcap"):
        converted += 1
    held = sums = 0
    if mask[2]:
        # Summed in the wider dtype, which takes the place of the output until the end.
        held = columns * (wide - size)
        sums = columns * size + (columns * wide if size < wide else 0)
    of_block += converted * block * columns * wide
    products = _products(step, data.shape[1], columns, data.dtype, mask)
    return step * columns * size + of_rows + held + max(of_block, sums, products)


def _products(
    rows: int, width: int, columns: int, dtype: torch.dtype, mask: tuple[bool, bool, bool]
) -> int:
    """What the largest product of a chunk takes beside its result."""
    taken = [product_scratch((rows, width), (width, columns), dtype, turned="right")]
    if mask[0]:
        taken.append(product_scratch((rows, columns), (columns, width), dtype))
    if mask[1]:
        taken.append(product_scratch((columns, rows), (rows, width), dtype, turned="left"))
    return max(taken)
