"""A step as a chain of blocks: where operators repeat, each kind of block is a small step of its own.

    embed  [norm linear relu linear add] x 1000  loss      ->  3 kinds, 1,002 links

Blocks are found by structure (``graphopt.capture.repeats``) and cut where the fewest bytes cross. What a
block reads of others is not part of its step; what others read of it is held, like a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.capture.repeats import Repeat, find_repeats
from graphopt_passes.insert_checkpoints.model import Slot, StepModel

__all__ = ["Block", "Chain", "find_chain"]

_FEWEST = 4
"""Blocks of one kind from which on they are worth a look."""


@dataclass(frozen=True)
class Block:
    """Operators ``start`` to ``stop`` (excluded), what they make and the slots of their backward, each from
    ``first`` to ``last`` (excluded). Blocks of one ``kind`` do the same."""

    kind: int
    start: int
    stop: int
    first: int
    last: int
    first_slot: int
    last_slot: int

    def storages(self) -> range:
        return range(self.first, self.last)


@dataclass(frozen=True)
class Chain:
    """Blocks in the order of the forward; together they are all of it."""

    model: StepModel
    blocks: tuple[Block, ...]

    def handed(self, start: int, stop: int) -> list[int]:
        """What blocks ``start`` to ``stop`` (excluded) make for operators of later ones."""
        last_read, end = self.model.last_read, self.blocks[stop - 1].stop
        return [b for k in range(start, stop) for b in self.blocks[k].storages() if last_read[b] >= end]

    def gradients(self) -> list[int]:
        """Bytes that the backward holds more after each block than before it."""
        levels = [self._level(k) for k in range(len(self.blocks))]
        return [max(before - here, 0) for before, here in zip([levels[0], *levels], levels, strict=False)]

    def _level(self, k: int) -> int:
        """Bytes that the backward itself holds as it comes to a block."""
        slots = self.model.slots
        return slots[min(self.blocks[k].first_slot, len(slots) - 1)].before

    def step(self, k: int) -> StepModel:
        """A block as a step of its own; bytes of gradients that have piled up before it are left out."""
        model, block = self.model, self.blocks[k]
        ops, made = slice(block.start, block.stop), slice(block.first, block.last)
        piled = self._level(k) - self._level(len(self.blocks) - 1)

        def inside(storages: Iterable[int]) -> tuple[int, ...]:
            return tuple(b - block.first for b in storages if block.first <= b < block.last)

        free = [model.free[b] or model.last_read[b] >= block.stop for b in block.storages()]
        slots = [
            Slot(slot.node, reads, *(max(level - piled, 0) for level in (slot.before, slot.during, slot.gap)))
            for slot in model.slots[block.first_slot : block.last_slot]
            if (reads := inside(slot.reads))
        ]
        return dataclasses.replace(
            model,
            size=model.size[made],
            scratch=model.scratch[made],
            maker=[i - block.start for i in model.maker[made]],
            representative=model.representative[made],
            inputs=[inside(read) for read in model.inputs[ops]],
            outputs=[inside(outputs) for outputs in model.outputs[ops]],
            operators=model.operators[ops],
            seconds=model.seconds[ops],
            flops=model.flops[ops],
            workspace=model.workspace[ops],
            workspace_again=model.workspace_again[ops],
            again=model.again[ops],
            free=free,
            savable=model.savable[made],
            only_saved=model.only_saved[made],
            last_read=[min(i, block.stop) - block.start for i in model.last_read[made]],
            slots=slots,
            opening=0,
            gradient_bytes=0,
            output_bytes=sum(size for size, held in zip(model.size[made], free, strict=True) if held),
            views=frozenset(),
        )


def find_chain(model: StepModel) -> Chain | None:
    """The blocks of a step; ``None`` where nothing repeats often enough."""
    count = len(model.operators)
    crossing = _crossing(model)
    taken: list[tuple[int, int, int]] = []
    gaps = [(0, count)]
    for found in find_repeats(_labels(model), least=2):
        for gap in list(gaps):
            repeat = _cut(found.clipped(*gap), crossing)
            if repeat is None or repeat.start < gap[0] or repeat.stop > gap[1]:
                continue
            gaps.remove(gap)
            gaps += [(gap[0], repeat.start), (repeat.stop, gap[1])]
            taken.append((repeat.start, repeat.stop, repeat.period))
    if not taken:
        return None
    pieces: list[tuple[int, int, int]] = []
    for kind, (start, stop, period) in enumerate(taken):
        pieces += [(at, at + period, kind) for at in range(start, stop, period)]
    rest = [gap for gap in gaps if gap[0] < gap[1]]
    pieces += [(start, stop, len(taken) + number) for number, (start, stop) in enumerate(rest)]
    return Chain(model, tuple(_blocks(model, sorted(pieces))))


def _labels(model: StepModel) -> list[int]:
    """What each operator does: equal numbers for equal operators on operands of equal sizes."""
    nodes = {node.name: node for node in model.program.graph.nodes}
    numbers: dict[object, int] = {}
    return [
        numbers.setdefault(
            (
                str(nodes[name].target),
                tuple(model.size[b] for b in model.inputs[i]),
                tuple((model.size[b], model.savable[b], model.free[b]) for b in model.outputs[i]),
                model.flops[i],
                model.again[i],
            ),
            len(numbers),
        )
        for i, name in enumerate(model.operators)
    ]


def _crossing(model: StepModel) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Bytes made before each operator that it or later ones read."""
    change = np.zeros(len(model.operators) + 2, dtype=np.int64)
    for b, size in enumerate(model.size):
        change[model.maker[b] + 1] += size
        change[model.last_read[b] + 1] -= size
    return np.cumsum(change)


def _cut(repeat: Repeat, crossing: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Repeat | None:
    """Whole blocks of a repeat, turned so that the fewest bytes cross; ``None`` if those are too few."""
    period = repeat.period
    count = repeat.count - 1
    if count < _FEWEST:
        return None
    turns = [int(crossing[repeat.start + turn :: period][:count].sum()) for turn in range(period)]
    start = repeat.start + turns.index(min(turns))
    return Repeat(period, start, start + (repeat.stop - start) // period * period)


def _blocks(model: StepModel, pieces: Sequence[tuple[int, int, int]]) -> list[Block]:
    owner = [k for k, (start, stop, _) in enumerate(pieces) for _ in range(start, stop)]
    # The backward goes through the blocks from the last to the first: a slot is of the latest that it or
    # any slot after it reads of.
    of_slot: list[int] = []
    latest = 0
    for slot in reversed(model.slots):
        latest = max([latest, *(owner[model.maker[b]] for b in slot.reads)])
        of_slot.append(latest)
    of_slot.reverse()
    slots = np.array(of_slot, dtype=np.int64)
    makers = np.array(model.maker, dtype=np.int64)
    blocks = []
    for k, (start, stop, kind) in enumerate(pieces):
        first, last = np.searchsorted(makers, (start, stop)).tolist()
        first_slot, last_slot = len(slots) - np.searchsorted(slots[::-1], (k, k + 1))[::-1]
        blocks.append(Block(kind, start, stop, first, last, int(first_slot), int(last_slot)))
    return blocks
