"""Starting points for deep programs: which blocks keep what, which rows of blocks run again.

Each kind of block is searched by itself, however many there are of it. Dynamic programming over the chain
(``graphopt.chain_plan``, after Beaumont et al. 2020) picks a point for each block and rows that keep nothing
but what enters them, rows within rows. As a plan of the whole program that reads::

    saved      what a block's point hands over, and what rows and blocks hand to later ones
    released   what a row makes on its way to its last block, after the first slot of that block

so that every block, or inner row, makes it again from what enters it when its own backward comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from graphopt.candidate import Frontier, FrontierPoint
from graphopt.chain_plan import Link, Rerun, chain_choices, items
from graphopt.schedule import Schedule
from graphopt_passes.insert_checkpoints.chain import Block, Chain
from graphopt_passes.insert_checkpoints.incremental import Incremental, Snapshot
from graphopt_passes.insert_checkpoints.model import Slot, StepModel
from graphopt_passes.insert_checkpoints.portfolio import seeds
from graphopt_passes.insert_checkpoints.search import Start, search

__all__ = ["row_plans"]

_POINTS = 15
"""Points of one kind of block that the chain is planned with."""

_OPERATORS = 400
"""Operators of a block up to which it is searched; of larger ones minimum cuts are all."""


def row_plans(chain: Chain, prices: Sequence[float], rooms: Sequence[int]) -> Iterator[Start]:
    """Plans of the whole program for peaks of about ``rooms`` bytes, those that there are."""
    kinds: dict[int, list[Snapshot]] = {}
    links: list[Link] = []
    gradients = chain.gradients()
    owner = [k for k, block in enumerate(chain.blocks) for _ in range(block.start, block.stop)]
    owner.append(len(chain.blocks))
    last_read, size = chain.model.last_read, chain.model.size
    frontiers: dict[int, Frontier] = {}
    for k, block in enumerate(chain.blocks):
        if block.kind not in kinds:
            # The first of a row may read what the others do not.
            like = k + 1 if k + 1 < len(chain.blocks) and chain.blocks[k + 1].kind == block.kind else k
            kinds[block.kind] = _points(chain, like, prices)
            points = [
                FrontierPoint(
                    Schedule(()), item.forward_peak, item.backward_peak, item.retained, gradients[like],
                    item.price, label=str(number),
                )
                for number, item in enumerate(kinds[block.kind])
            ]  # fmt: skip
            frontiers[block.kind] = Frontier("", tuple(points))
        made = tuple((size[b], owner[last_read[b]]) for b in chain.handed(k, k + 1))
        links.append(Link(block.kind, frontiers[block.kind], made, sum(prices[block.start : block.stop])))
    for points, rows in chain_choices(links, rooms):
        chosen = [kinds[block.kind][int(p.label)] for block, p in zip(chain.blocks, points, strict=True)]
        yield _Realised(chain, chosen).start(rows)


def _points(chain: Chain, k: int, prices: Sequence[float]) -> list[Snapshot]:
    """Points of one block: what is handed over counts for a row of blocks, the peak for the block itself."""
    model = chain.step(k)
    block = chain.blocks[k]
    own = list(prices[block.start : block.stop])
    everything = frozenset(b for b in range(len(model.size)) if model.savable[b])
    family = [everything, *seeds(model, own, _POINTS), frozenset[int]()]
    plan = Incremental(model, own)
    found = [_tried(plan, saved) for saved in family]
    if len(model.operators) <= _OPERATORS and model.slots:
        starts: list[Start] = [(saved, frozenset()) for saved in family]
        descent = [(starts[0], 10**9)]
        found += search(plan, starts, targets=8, effort=8, own=descent, repeat=True).items
        waiting = Incremental(_waiting(model, max(item.peak for item in found)), own)
        ahead = search(waiting, starts, targets=16, effort=16, own=descent)
        found += [_tried(plan, item.saved) for item in ahead.items]
    thrifty = _hull(found, lambda item: item.retained)
    low = _hull(found, lambda item: item.peak)
    return list(dict.fromkeys([*_spread(thrifty, _POINTS - _POINTS // 3), *_spread(low, _POINTS // 3)]))


def _tried(plan: Incremental, saved: frozenset[int]) -> Snapshot:
    plan.load(saved)
    plan.settle()
    return plan.snapshot()


def _waiting(model: StepModel, level: int) -> StepModel:
    """The block as it waits for its backward while later blocks run: its peak is then what it hands over,
    ``level`` bytes higher."""
    return dataclasses.replace(model, slots=[Slot("", (), level, level, level), *model.slots])


def _hull(items: Sequence[Snapshot], size: Callable[[Snapshot], int]) -> list[Snapshot]:
    """The lower convex hull over bytes and price, least price first: between two of its points a row of
    blocks mixes both."""
    hull: list[Snapshot] = []
    for item in sorted(items, key=lambda item: (-size(item), item.price)):
        while hull and hull[-1].price >= item.price:
            hull.pop()
        while len(hull) > 1:
            (a, b), c = hull[-2:], item
            if (b.price - a.price) * (size(a) - size(c)) < (c.price - a.price) * (size(a) - size(b)):
                break
            hull.pop()
        hull.append(item)
    return hull


def _spread(items: Sequence[Snapshot], count: int) -> list[Snapshot]:
    """At most ``count``, both ends included."""
    if len(items) <= count:
        return list(items)
    return [items[round(n * (len(items) - 1) / (count - 1))] for n in range(count)]


@dataclass
class _Realised:
    """A choice of points and rows as what is saved and released in the whole program."""

    chain: Chain
    chosen: Sequence[Snapshot]

    def start(self, rows: Sequence[Rerun]) -> Start:
        self.saved: set[int] = set()
        self.released: set[tuple[int, int]] = set()
        self._within(0, len(self.chain.blocks), rows, None)
        return self.saved, self.released

    def _within(self, start: int, stop: int, rows: Sequence[Rerun], slot: int | None) -> None:
        """Blocks ``start`` to ``stop``: run once in the forward, or again before ``slot``."""
        blocks = self.chain.blocks
        for item in items(start, stop, rows):
            if isinstance(item, Rerun):
                first, last = item.start, item.stop
                self._keep(blocks[first:last], set(self.chain.handed(first, last)), slot)
                self._within(first, last, item.inner, blocks[last - 1].first_slot)
                continue
            block, point = blocks[item], self.chosen[item]
            own = {b + block.first for b in point.saved}
            self._keep([block], own.union(self.chain.handed(item, item + 1)), slot)
            if block.last_slot - block.first_slot >= len(self.chosen[item].released):
                self.released.update((b + block.first, k + block.first_slot) for b, k in point.released)

    def _keep(self, blocks: Sequence[Block], kept: set[int], slot: int | None) -> None:
        if slot is None:
            self.saved |= kept
        elif slot < len(self.chain.model.slots):
            # The backward may end before it comes to blocks: those need no gradients and never run again.
            self.released.update((b, slot) for block in blocks for b in block.storages() if b not in kept)
