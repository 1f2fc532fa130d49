"""What linear + cross entropy in blocks of classes costs: its kernels in order, and the memory within a call.

Hand-counted from ``graphopt_kernels.linear_cross_entropy_blocks``, ``class_blocks``, ``cross_entropy_blocks``
and ``cross_entropy_rows``, with N rows of width D and V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from graphopt.product_scratch import product_scratch
from graphopt_cost_model.call import Call, TensorSpec
from graphopt_cost_model.phase import Phase

__all__ = ["BLOCK_ELEMENTS", "PREFIX", "block_phases", "block_workspace"]

PREFIX = "graphopt.linear_cross_entropy_blocks"

BLOCK_ELEMENTS = 2**18
"""Elements of rows that are handled at a time on the CPU."""

_ALIGNED = 64
"""Elements to which rows on a GPU are padded, and classes to which the place of a sum is."""


@dataclass(frozen=True)
class _Blocks:
    """One call, and where its blocks of classes are."""

    call: Call

    @cached_property
    def rows(self) -> int:
        return int(self._input.shape[0])

    @cached_property
    def width(self) -> int:
        return int(self._input.shape[1])

    @cached_property
    def classes(self) -> int:
        weight: TensorSpec = self.call.argument("weight")
        return int(weight.shape[0])

    @cached_property
    def _input(self) -> TensorSpec:
        spec: TensorSpec = self.call.argument("input")
        return spec

    @property
    def dtype(self) -> torch.dtype:
        return self._input.dtype

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of an element of the dtype of the arithmetic."""
        return 8 if self.dtype is torch.float64 else 4

    @property
    def computes_gradients(self) -> bool:
        return str(self.call.packet) != PREFIX

    @property
    def holds_logits(self) -> bool:
        return str(self.call.packet).endswith("_with_gradients")

    @property
    def into(self) -> TensorSpec | None:
        """What the weight's gradient is added to, where it is."""
        adds = str(self.call.packet).endswith("_add_backward")
        return self.call.argument("into") if adds else None

    @cached_property
    def mask(self) -> tuple[bool, bool, bool]:
        if not self.computes_gradients:
            return (False, False, False)
        of_input, of_weight, of_bias = self.call.argument("output_mask")
        return bool(of_input), bool(of_weight), bool(of_bias)

    @cached_property
    def step(self) -> int:
        """Classes of a block."""
        return min(int(self.call.argument("block")), self.classes)

    @property
    def sums(self) -> bool:
        """Whether the gradient of the input is summed in a wider dtype."""
        return self.mask[0] and self.size < self.wide

    @cached_property
    def front(self) -> int:
        """Classes before the place of that sum; all where it has memory of its own."""
        if not (self.sums and self.mask[1]) or self.into is not None:
            return self.classes
        taken = -(-self.rows * self.wide // self.size)
        return max(0, (self.classes - taken) // _ALIGNED * _ALIGNED) or self.classes

    @property
    def own_sum(self) -> int:
        """Bytes that the sum takes beside the gradients."""
        return self.rows * self.width * self.wide if self.sums and self.front == self.classes else 0

    @property
    def _of_block(self) -> int:
        """Elements of a block of logits."""
        padded = self.step if self._input.device == "cpu" else -(-self.step // _ALIGNED) * _ALIGNED
        return self.rows * padded

    @cached_property
    def in_weight(self) -> int:
        """Blocks whose logits the weight's gradient holds from the first visit to the second."""
        if not (self.holds_logits and self.mask[1] and self.rows):
            return 0
        return min(self.front // self.step, self.front * self.width // self._of_block)

    @cached_property
    def held(self) -> int:
        """Those, and one in the input's gradient."""
        fits = (self.in_weight + 1) * self.step <= self.front and self.rows * self.width >= self._of_block
        return self.in_weight + bool(self.holds_logits and self.rows and self.sums and fits)

    @cached_property
    def at_hand(self) -> tuple[int, int] | None:
        """The block before ``front`` that is still there at its second visit: of the last two the larger
        whose rows lie behind those."""
        if not (self.holds_logits and any(self.mask)):
            return None
        last = sorted(self.parts(0, self.front)[-2:], key=lambda part: part[1], reverse=True)
        for start, count in last:
            index = start // self.step
            rows = start * self.width if self.mask[1] else 0
            if index >= self.held and rows >= self.in_weight * self._of_block:
                return start, count
        return None

    def parts(self, begin: int, end: int) -> list[tuple[int, int]]:
        """First class and number of classes of each block."""
        return [(start, min(self.step, end - start)) for start in range(begin, end, self.step)]


def block_phases(call: Call) -> tuple[Phase, ...]:
    """The kernels that a call of one of the three operators runs in order."""
    blocks = _Blocks(call)
    return tuple(_phases(blocks))


def _phases(blocks: _Blocks) -> Iterator[Phase]:
    front, classes = blocks.front, blocks.classes
    everything = [*blocks.parts(0, front), *blocks.parts(front, classes)]
    if blocks.holds_logits or not blocks.computes_gradients:
        for _, count in everything:
            yield _product(blocks, count)
            yield Phase(0, blocks.rows * count, blocks.rows * count * blocks.size, 0, "float32")
    if not any(blocks.mask):
        return
    first = blocks.parts(0, front)
    for index, (start, count) in enumerate(first):
        is_held = index < blocks.held or (start, count) == blocks.at_hand
        yield from _gradient(blocks, count, is_held=is_held)
        yield from _added(blocks, count, is_first=index == 0)
        yield from _written(blocks, count)
    last = blocks.parts(front, classes)
    for index, (_, count) in enumerate(last):
        yield from _gradient(blocks, count)
        yield from _added(blocks, count, is_first=not front and not index)
    if blocks.sums:
        elements = blocks.rows * blocks.width
        yield Phase(0, elements, elements * blocks.wide, elements * blocks.size, "float32")
    for index, (_, count) in enumerate(reversed(last)):
        if index:
            yield from _gradient(blocks, count)
        yield from _written(blocks, count)


def _product(blocks: _Blocks, count: int) -> Phase:
    """Logits of ``count`` classes."""
    rows, width, size = blocks.rows, blocks.width, blocks.size
    read = (rows + count) * width * size
    return _matmul(blocks, count, read, rows * count * size)


def _gradient(blocks: _Blocks, count: int, *, is_held: bool = False) -> Iterator[Phase]:
    """Logits, unless they are there, and their gradient written over them."""
    if not is_held:
        yield _product(blocks, count)
    moved = blocks.rows * count * blocks.size
    yield Phase(0, blocks.rows * count, moved, moved, "float32")


def _added(blocks: _Blocks, count: int, *, is_first: bool) -> Iterator[Phase]:
    """A block's share of the gradient of the input."""
    if blocks.mask[0]:
        rows, width, size = blocks.rows, blocks.width, blocks.size
        total = rows * width * (blocks.wide if blocks.sums else size)
        read = (rows + width) * count * size + (0 if is_first else total)
        yield _matmul(blocks, count, read, total)


def _written(blocks: _Blocks, count: int) -> Iterator[Phase]:
    """Gradients of the weight and the bias of a block."""
    rows, width, size = blocks.rows, blocks.width, blocks.size
    if blocks.mask[1]:
        into = blocks.into
        summed = count * width * (size if into is None else into.dtype.itemsize)
        read = (count + width) * rows * size + (0 if into is None else summed)
        yield _matmul(blocks, count, read, summed)
    if blocks.mask[2]:
        yield Phase(0, rows * count, rows * count * size, count * size, "float32")


def _matmul(blocks: _Blocks, count: int, read: int, written: int) -> Phase:
    rows, width = blocks.rows, blocks.width
    touched = max(rows * count, rows * width, count * width)
    dtype = str(blocks.dtype).removeprefix("torch.")
    return Phase(2 * rows * width * count, touched, read, written, dtype)


# --- memory ------------------------------------------------------------------------------------


def block_workspace(call: Call) -> int:
    """Bytes that a call on the CPU takes beyond its outputs."""
    blocks = _Blocks(call)
    rows, size, wide = blocks.rows, blocks.size, blocks.wide
    counts = {
        count for _, count in (*blocks.parts(0, blocks.front), *blocks.parts(blocks.front, blocks.classes))
    }
    taken = (max(_folded(blocks, count), _logits_scratch(blocks, count)) for count in counts)
    folding = max(taken, default=0)
    first = rows * wide + folding
    held = rows * blocks.step * size
    if not blocks.computes_gradients:
        return held + first + rows * wide - call.outputs[0].stored_bytes
    working = max((_worked(blocks, count) for count in counts), default=0) if any(blocks.mask) else 0
    held += blocks.own_sum
    if blocks.holds_logits:
        # Losses, log-sum-exps and the scale, which the loss outlives.
        return held + 2 * rows * wide + wide + max(first, working) - call.outputs[0].stored_bytes
    grad: TensorSpec = call.argument("grad")
    scales = 1 if call.argument("reduction") == "mean" else grad.elements * (grad.dtype.itemsize != wide)
    return held + scales * wide + working


def _together(blocks: _Blocks, count: int) -> int:
    """Rows that are handled at a time."""
    return min(blocks.rows, max(1, BLOCK_ELEMENTS // count))


def _folded(blocks: _Blocks, count: int) -> int:
    """While a block is taken in: its rows in the dtype of the arithmetic, and what is kept of each."""
    together = _together(blocks, count)
    is_held = blocks.held > 0 and count == blocks.step
    is_held = is_held or (blocks.at_hand is not None and count == blocks.at_hand[1])
    converted = is_held or blocks.size < blocks.wide
    return together * (9 + 2 * blocks.wide + converted * count * blocks.wide)


def _worked(blocks: _Blocks, count: int) -> int:
    """While a block's gradient is computed, or a product of it whose result is wider."""
    together, wide = _together(blocks, count), blocks.wide
    converted = (blocks.size < wide) + bool(blocks.call.argument("softcap"))
    is_part, is_summed = count != blocks.classes, blocks.call.argument("sum_grad") is not None
    kept = 9 + 2 * wide + is_part * (1 + wide) + is_summed * wide
    numbers = 0 if is_part else 8 + wide
    gradient = together * (kept + converted * count * wide) + numbers
    product = (blocks.width + together) * count * wide if blocks.sums else 0
    return max(gradient, product, _logits_scratch(blocks, count), _gradient_scratch(blocks, count))


def _logits_scratch(blocks: _Blocks, count: int) -> int:
    """What the product that gives a block's logits takes beside them."""
    rows, width = blocks.rows, blocks.width
    return product_scratch((rows, width), (width, count), blocks.dtype, turned="right")


def _gradient_scratch(blocks: _Blocks, count: int) -> int:
    """What the products that give gradients of a block take beside them. Wider sums are counted apart."""
    rows, width, taken = blocks.rows, blocks.width, 0
    if blocks.mask[0] and not blocks.sums:
        taken = product_scratch((rows, count), (count, width), blocks.dtype)
    if blocks.mask[1] or (blocks.into is not None and blocks.into.dtype is blocks.dtype):
        taken = max(taken, product_scratch((count, rows), (rows, width), blocks.dtype, turned="left"))
    return taken
