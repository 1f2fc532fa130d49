"""What ``graphopt.attention`` and its backward take: products over the scores that are seen, and little else.

Unlike torch's counts of its own attention, scores that a causal mask or a window hides are not counted: the
kernels skip them, up to the blocks along the edges. Boolean masks are read, and hide nothing here.
"""

from __future__ import annotations

import torch

from graphopt_cost_model.call import Call, TensorSpec
from graphopt_cost_model.dropout_cost import DRAWN, words_bytes
from graphopt_cost_model.phase import Phase

__all__ = [
    "SLICE_ELEMENTS",
    "attention_backward_phases",
    "attention_phases",
    "attention_workspace",
    "visible_scores",
]

SLICE_ELEMENTS = 2**20
"""Scores that the CPU holds at a time."""


def visible_scores(rows: int, columns: int, left: int | None, right: int | None) -> int:
    """How many keys queries see in all: query i those from i - left to i + right."""
    if left is None and right is None:
        return rows * columns
    total = 0
    for row in range(rows):
        first = 0 if left is None else max(0, row - left)
        last = columns - 1 if right is None else min(columns - 1, row + right)
        total += max(0, last - first + 1)
    return total


def _pairs(call: Call, query: TensorSpec, key: TensorSpec) -> int:
    batch, heads, rows, _ = query.shape
    seen = visible_scores(rows, key.shape[2], call.argument("left"), call.argument("right"))
    return batch * heads * seen


def _bytes(*specs: TensorSpec | None) -> int:
    return sum(spec.stored_bytes for spec in specs if spec is not None)


def attention_phases(call: Call) -> tuple[Phase, ...]:
    """One kernel: two products, for scores and output."""
    query, key, value = (call.argument(name) for name in ("query", "key", "value"))
    pairs = _pairs(call, query, key)
    flops = 2 * pairs * (query.shape[3] + value.shape[3])
    read = _bytes(query, key, value, call.argument("bias"))
    return (Phase(flops, _touched(call, pairs), read, _bytes(*call.outputs), _dtype(query)),)


def _touched(call: Call, pairs: int) -> int:
    """Elements of the scores, those of their mask where weights are dropped: each kernel draws it again."""
    return pairs * (1 + DRAWN) if call.argument("dropout_p") else pairs


def attention_backward_phases(call: Call) -> tuple[Phase, ...]:
    """The sums of rows; keys and values, four products; queries, three; a bias, two. On the CPU one walk
    over the scores makes all, in five."""
    grad, query, key, value, output = (
        call.argument(name) for name in ("grad", "query", "key", "value", "output")
    )
    bias = call.argument("bias")
    of_query, of_key, of_value, of_bias = call.argument("output_mask")
    pairs = _pairs(call, query, key)
    touched = _touched(call, pairs)
    width, value_width = query.shape[3], value.shape[3]
    rows = 4 * query.elements // max(1, width)
    operands = _bytes(query, key, value, grad, bias)
    d_query, d_key, d_value, d_bias = call.outputs
    if query.device == "cpu":
        products = width * (1 + of_query + of_key) + value_width * (1 + of_value)
        read = operands + _bytes(output) + rows
        return (Phase(2 * pairs * products, touched, read, _bytes(*call.outputs), _dtype(query)),)
    phases = [Phase(0, grad.elements, _bytes(grad, output) + rows, 2 * rows, "float32")]

    def add(products: int, *made: TensorSpec) -> None:
        phases.append(Phase(2 * pairs * products, touched, operands + 2 * rows, _bytes(*made), _dtype(query)))

    if of_key or of_value:
        add(2 * width + 2 * value_width, d_key, d_value)
    if of_query:
        add(2 * width + value_width, d_query)
    if of_bias:
        add(width + value_width, d_bias)
    return tuple(phases)


def attention_workspace(call: Call) -> int:
    """Bytes that a call on the CPU takes beyond its outputs, at most: some tensors of the size of a slice of
    scores, operands in the dtype of the arithmetic, and in the backward sums over slices. Counted in the
    source (``graphopt_kernels.attention_reference``) and compared with what it takes."""
    query, key, value = (call.argument(name) for name in ("query", "key", "value"))
    batch, heads, rows, width = query.shape
    few, columns, value_width = key.shape[1], key.shape[2], value.shape[3]
    left, right = call.argument("left"), call.argument("right")
    if not batch * heads * rows:
        return 0
    size: int = 8 if query.dtype is torch.float64 else 4
    step = min(rows, max(1, SLICE_ELEMENTS // max(1, batch * heads * columns)))
    seen: int = 0
    for start in range(0, rows, step):
        first = 0 if left is None else max(0, start - left)
        last = columns if right is None else min(columns, min(start + step, rows) + right)
        seen = max(seen, last - first)
    scores: int = batch * heads * step * seen * size
    # What a slice leaves behind lives until the next one has its scores.
    capped = bool(call.argument("softcap"))
    again = rows > step
    moved: int = batch * heads * step * (2 * width + value_width) + batch * few * seen * (width + value_width)
    bias = call.argument("bias")
    drops = bool(call.argument("dropout_p"))
    # Of an item at least, with counters that are whole along the keys.
    words: int = words_bytes(batch * heads, step * (seen + 16)) if drops else 0
    if call.argument("output_mask") is None:
        held: int = 1 + again + (bias is not None) + capped * (2 + again) + drops
        return held * scores + 2 * moved * size + words
    sums: int = batch * few * columns * (width + value_width) * size
    if bias is not None and call.argument("output_mask")[3]:
        sums += bias.elements * size + scores
    held = 3 + capped * (1 + 2 * again) + 2 * drops
    return held * scores + 2 * moved * size + sums + words


def _dtype(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")
