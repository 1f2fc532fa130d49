"""Logits and gradients of a linear layer, a block of classes at a time.

What there is of the logits [N, V] is one block [N, v] in one buffer. A row of the weight's gradient
belongs to one class, so it is written once, when its block comes, and rounded as a whole product is. Every
block adds to the gradient of the input, which is summed in float32 (float64 for float64) and rounded once.

Where that sum is wider than the gradient it takes memory of its own: N x D in float32. As long as the
weight's gradient is not complete there is a place for it, in the rows that come last::

    rows of the weight's gradient    0 ............... front ........... V
    classes before front             written           | sum of d input
    classes from front on            written           | sum of d input   (added to the sum only)
    d input = the sum, rounded       written           | free
    classes from front on again      written           | written

The logits of those last classes are computed once more than else: 2 N D (V - front - v) FLOPs, which is a
fraction (V - front) / V of a product, for N x D floats of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from graphopt_kernels.cross_entropy_rows import BLOCK_ELEMENTS, computes_in

__all__ = [
    "ALIGNED",
    "BlockGradients",
    "ClassBlocks",
    "HeldLogits",
    "add_matrices",
    "empty_gradients",
    "front_classes",
]

ALIGNED = 64
"""Rows of logits on a GPU, and the place of a sum, are padded to a multiple of this many elements: products
of matrices read and write 16 bytes at a time only where rows begin on such a boundary."""


class ClassBlocks:
    """Products of ``input`` [N, D] with blocks of at most ``size`` rows of ``weight`` [V, D]."""

    def __init__(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: int
    ) -> None:
        self._operands = (input, weight, bias)
        self.rows, self.size = input.shape[0], min(size, weight.shape[0])
        self.width = -(-self.size // ALIGNED) * ALIGNED if input.is_cuda else self.size
        self._buffer = input.new_empty(self.rows, self.width)

    def within(self, begin: int, end: int) -> list[slice]:
        """The classes from ``begin`` to ``end``, block by block."""
        return [slice(start, min(start + self.size, end)) for start in range(begin, end, self.size)]

    def buffer(self, part: slice) -> torch.Tensor:
        """The memory that all blocks share, as far as ``part`` needs it."""
        return self._buffer[:, : part.stop - part.start]

    def of_rows(self) -> torch.Tensor:
        """A number for each row, of the dtype that rows are computed in; its values are arbitrary."""
        return self._buffer.new_empty(self.rows, dtype=computes_in(self._buffer.dtype))

    def logits(self, part: slice, into: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [N, v] of the classes ``part``, in memory of their own or in what all blocks share."""
        input, weight, bias = self._operands
        logits = self.buffer(part) if into is None else into
        if bias is None:
            torch.mm(input, weight[part].t(), out=logits)
        else:
            torch.addmm(bias[part], input, weight[part].t(), out=logits)
        return logits


def front_classes(rows: int, classes: int, dtype: torch.dtype) -> int:
    """Classes whose gradients leave room for the sum of the input's behind them: all of them where the
    sum needs none of its own, 0 where it does not fit."""
    exact = computes_in(dtype)
    if exact is dtype:
        return classes
    taken = -(-rows * exact.itemsize // dtype.itemsize)
    return max(0, (classes - taken) // ALIGNED * ALIGNED)


class BlockGradients:
    """Gradients of input, weight and bias, block by block; those that ``output_mask`` leaves out have no
    elements."""

    def __init__(
        self,
        blocks: ClassBlocks,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        output_mask: Sequence[bool],
        into: torch.Tensor | None = None,
        *,
        is_new: bool = False,
    ) -> None:
        """``into``, where it is given, is what the gradient of the weight is added to, or is if it
        ``is_new``; that of ``output_mask`` is not wanted then."""
        self._blocks, self._input, self._weight, self._mask = blocks, input, weight, output_mask
        self._into, self._into_is_new = into, is_new
        self.results = empty_gradients(input, weight, bias, output_mask)
        of_input, of_weight, _ = self.results
        (rows, width), classes = input.shape, weight.shape[0]
        exact = computes_in(input.dtype)
        self.front, self._sums = classes, None
        self._sums_are_empty = True
        if output_mask[0] and exact is input.dtype:
            self._sums = of_input
        elif output_mask[0]:
            front = front_classes(rows, classes, input.dtype) if output_mask[1] else 0
            if front:
                self.front, self._sums = front, _room(of_weight[front:], exact, rows, width)
            else:
                self._sums = input.new_empty(rows, width, dtype=exact)

    def finish(self, gradient: Callable[[slice], torch.Tensor], order: Sequence[slice] | None = None) -> None:
        """Compute the gradients, with ``gradient`` for that [N, v] of the logits of some classes, in memory
        which its next call overwrites. ``order`` is that of the blocks up to ``front``."""
        for part in self._blocks.within(0, self.front) if order is None else order:
            logits = gradient(part)
            self._add(part, logits)
            self._write(part, logits)
        last = self._blocks.within(self.front, self._weight.shape[0])
        for part in last:
            logits = gradient(part)
            self._add(part, logits)
        if self._sums is not None and self._sums is not self.results[0]:
            self.results[0].copy_(self._sums)
        # The block that came last is still there.
        for part in reversed(last):
            self._write(part, logits if part is last[-1] else gradient(part))

    def _add(self, part: slice, logits: torch.Tensor) -> None:
        if self._sums is not None:
            add_matrices(self._sums, logits, self._weight[part], is_first=self._sums_are_empty)
            self._sums_are_empty = False

    def _write(self, part: slice, logits: torch.Tensor) -> None:
        if self._into is not None:
            add_matrices(self._into[part], logits.t(), self._input, is_first=self._into_is_new)
        elif self._mask[1]:
            torch.mm(logits.t(), self._input, out=self.results[1][part])
        if self._mask[2]:
            torch.sum(logits, 0, out=self.results[2][part])


def empty_gradients(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_mask: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the gradients; for those that ``output_mask`` leaves out, no elements."""
    of_input, of_weight, of_bias = output_mask
    return (
        input.new_empty(input.shape if of_input else (0,)),
        weight.new_empty(weight.shape if of_weight else (0,)),
        weight.new_empty(bias.shape if of_bias and bias is not None else (0,)),
    )


class HeldLogits:
    """Logits of some blocks of classes, in memory of gradients that are not written yet.

    The rows of the weight's gradient up to ``front`` hold as many blocks of logits as fit, one after the
    other. Each block's rows are written where blocks lay that are done with: in the order of ``order``,
    which begins with the largest class where a block's rows take more than its logits. The gradient of the
    input holds one more, where it is not added up in place. And the memory that all blocks share holds the
    block that comes last in ``arrival``, one whose rows lie behind all that is held.
    """

    def __init__(self, blocks: ClassBlocks, gradients: BlockGradients, output_mask: Sequence[bool]) -> None:
        of_input, of_weight, _ = gradients.results
        self._blocks, self._front = blocks, gradients.front
        self._memory = of_weight.view(-1)
        self._of_block = blocks.rows * blocks.width
        self._of_rows = blocks.size * of_weight.shape[1] if output_mask[1] else 0
        self.count = 0
        if output_mask[1] and self._of_block:
            room = self._front * of_weight.shape[1]
            self.count = min(self._front // blocks.size, room // self._of_block)
        sums_elsewhere = output_mask[0] and computes_in(of_input.dtype) is not of_input.dtype
        fits = (self.count + 1) * blocks.size <= self._front and of_input.numel() >= self._of_block
        self._extra = of_input.view(-1) if sums_elsewhere and fits else None
        self.at_hand: slice | None = None
        # The largest, which the last one may not be.
        parts = blocks.within(0, self._front) if any(output_mask) else []
        for part in sorted(parts[-2:], key=lambda part: part.stop - part.start, reverse=True):
            index = part.start // blocks.size
            is_clear = index * self._of_rows >= self.count * self._of_block
            if self.at_hand is None and is_clear and self.place(part) is None:
                self.at_hand = part

    def arrival(self, classes: int) -> list[slice]:
        """All blocks of ``classes`` in the order to fold them."""
        parts = [*self._blocks.within(self._front, classes), *self._blocks.within(0, self._front)]
        return sorted(parts, key=lambda part: part == self.at_hand)

    def order(self) -> list[slice]:
        """The blocks up to the last class that is not set aside, in the order to write their rows."""
        parts = self._blocks.within(0, self._front)
        if self._of_rows > self._of_block:
            parts = [*reversed(parts[: self.count]), *parts[self.count :]]
        if self.at_hand is not None:
            parts = [self.at_hand, *(part for part in parts if part != self.at_hand)]
        return parts

    def place(self, part: slice) -> torch.Tensor | None:
        """Where the logits [N, v] of ``part`` are held, if they are."""
        index = part.start // self._blocks.size
        if part.stop > self._front or index > self.count:
            return None
        if index < self.count:
            memory = self._memory[index * self._of_block :]
        elif self._extra is not None:
            memory = self._extra
        else:
            return None
        held = memory[: self._of_block].view(self._blocks.rows, self._blocks.width)
        return held[:, : part.stop - part.start]

    def is_in_the_way(self, part: slice) -> bool:
        """Whether the rows of ``part`` are written over its own logits."""
        index = part.start // self._blocks.size
        rows, logits = index * self._of_rows, index * self._of_block
        apart = rows + self._of_rows <= logits or logits + self._of_block <= rows
        return index < self.count and not apart


def _room(memory: torch.Tensor, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """A matrix of ``dtype`` in memory of another one."""
    elements = rows * columns * dtype.itemsize // memory.element_size()
    return memory.view(-1)[:elements].view(dtype).view(rows, columns)


def add_matrices(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, is_first: bool) -> None:
    """``sums += left @ right``, or ``=``, the product not rounded before it is added."""
    if sums.dtype is left.dtype:
        if is_first:
            torch.mm(left, right, out=sums)
        else:
            sums.addmm_(left, right)
    elif left.is_cuda:
        dtype = sums.dtype
        if is_first:
            torch.ops.aten.mm.dtype_out(left, right, dtype, out=sums)
        else:
            torch.ops.aten.addmm.dtype_out(sums, left, right, dtype, out=sums)
    else:
        # No product on the CPU has a wider result than its operands.
        wide = right.to(sums.dtype)
        step = max(1, BLOCK_ELEMENTS // max(left.shape[1], 1))
        for start in range(0, left.shape[0], step):
            part = slice(start, start + step)
            if is_first:
                torch.mm(left[part].to(sums.dtype), wide, out=sums[part])
            else:
                sums[part].addmm_(left[part].to(sums.dtype), wide)
