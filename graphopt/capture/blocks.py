"""Find the repeated blocks of a model in its graph, by structure alone.

A stack of layers shows as a stretch of nodes that repeats itself at once (``repeats``). Any rotation
of the layer repeats as well; the blocks are cut where the fewest values cross from one into the next:

    ... | norm attn add norm mlp add | norm attn add norm mlp add | ...      1 value crosses
    norm attn | add norm mlp add norm attn | add norm ...                    2 values cross

and are kept where their wiring agrees too, not only their labels. Values made before the stack and read
in it (masks, rotary tables, the encoder's output) are not counted: each block takes them as inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.cuts import CutMap, cut_map
from graphopt.capture.repeats import Repeat, find_repeats
from graphopt.capture.structure import Line, Signature, line_of, signature_of

__all__ = ["Blocks", "Run", "find_blocks"]

LEAST_NODES = 6
MOST_CROSSING = 8
TRIES = 16
"""How many rotations of one repeat are compared block by block, those with fewest values first."""


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks that are one program called with other arguments.

    ``blocks[k]`` names the nodes of block ``k`` in execution order; node ``j`` of one block answers to
    node ``j`` of every other. ``crossing`` is the number of values that pass from a block into later
    ones.
    """

    blocks: tuple[tuple[str, ...], ...]
    crossing: int

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class Blocks:
    """Runs in execution order, and why stretches that repeat were not made runs."""

    runs: tuple[Run, ...]
    declined: tuple[Reason, ...]

    def __bool__(self) -> bool:
        return bool(self.runs)


def find_blocks(
    graph: fx.Graph, *, least_nodes: int = LEAST_NODES, most_crossing: int = MOST_CROSSING
) -> Blocks:
    """Repeated blocks of a graph whose nodes carry ``meta["val"]``.

    Blocks hold at least ``least_nodes`` nodes: less is not worth a compiled function of its own.
    At most ``most_crossing`` values may cross from a block to later ones. Near-linear in the size of
    the graph. Calls without effect that nobody reads are left out.
    """
    line = line_of(graph)
    search = _Search(line, cut_map(line), line.last_reads(), most_crossing)
    repeats = find_repeats(line.labels, least=least_nodes)
    found: list[tuple[int, Run]] = []
    todo = [(0, len(line.nodes), repeats)]
    while todo:
        start, stop, candidates = todo.pop()
        clipped = [c for c in (r.clipped(start, stop) for r in candidates) if c.count >= 2]
        clipped.sort(key=lambda r: (-r.saved, r.period, r.start))
        for candidate in clipped:
            placed = search.place(candidate)
            if placed is not None:
                first, last, run = placed
                found.append((first, run))
                todo += [(start, first, clipped), (last, stop, clipped)]
                break
    found.sort(key=lambda pair: pair[0])
    declined = search.declined if not found else _outside(search.declined, found)
    return Blocks(tuple(run for _, run in found), tuple(declined))


def _outside(reasons: list[Reason], found: list[tuple[int, Run]]) -> list[Reason]:
    """Reasons about stretches that ended up in no run: other ways to cut a run need no excuse."""
    taken = {name for _, run in found for block in run.blocks for name in block}
    return [reason for reason in reasons if not taken.intersection(reason.nodes)]


@dataclass
class _Search:
    line: Line
    cuts: CutMap
    last: dict[fx.Node, int]
    most_crossing: int
    declined: list[Reason] = field(default_factory=list)
    tried: dict[tuple[int, int], Signature] = field(default_factory=dict)

    def place(self, repeat: Repeat) -> tuple[int, int, Run] | None:
        """The best way to cut ``repeat`` into blocks: (first node, end, run), or ``None``."""
        crossings = self._crossings(repeat)
        ranked = []
        latest = min(repeat.start + repeat.period - 1, repeat.stop - 2 * repeat.period)
        for start in range(repeat.start, latest + 1):
            count = (repeat.stop - start) // repeat.period
            bounds = [start + k * repeat.period for k in range(count + 1)]
            ranked.append((max(crossings[b - repeat.start] for b in bounds[1:-1]), -count, start, bounds))
        ranked.sort()
        best: tuple[tuple[int, int, int], int, int] | None = None
        refused: Reason | None = None
        tries = TRIES
        for width, _, start, bounds in ranked:
            if (best is not None and width > best[0][0]) or tries == 0:
                break
            if width > self.most_crossing:
                ends = (self.line.nodes[repeat.start].name, self.line.nodes[repeat.stop - 1].name)
                refused = refused or Reason(f"{width} values cross from one repetition to the next", ends)
                break
            shut = [b for b in bounds if not self.cuts.free[b]]
            if len(bounds) - len(shut) < 3:
                refused = refused or self.cuts.why_not(shut[0])
                continue
            tries -= 1
            stretch = self._equal_stretch(bounds)
            if stretch is None:
                continue
            first, end = stretch
            rank = (width, first - end, start)
            if best is None or rank < best[0]:
                best = (rank, bounds[first], bounds[end])
            if end - first == len(bounds) - 1:
                break
        if best is None:
            if refused is not None and refused not in self.declined:
                self.declined.append(refused)
            return None
        (width, _, _), first, end = best
        names = [node.name for node in self.line.nodes[first:end]]
        blocks = tuple(tuple(names[i : i + repeat.period]) for i in range(0, len(names), repeat.period))
        return first, end, Run(blocks, width)

    def _crossings(self, repeat: Repeat) -> list[int]:
        """Values made inside the repeat before a position and read inside it at or after, by position.

        What is read only after the repeat (caches, auxiliary losses) crosses wherever it is cut.
        """
        last: dict[int, int] = {}
        for i in range(repeat.start, repeat.stop):
            for ref in self.line.refs[i]:
                made = self.line.position.get(ref, -1)
                if made >= repeat.start:
                    last[made] = i
        change = [0] * (repeat.stop - repeat.start + 2)
        for made, read in last.items():
            change[made + 1 - repeat.start] += 1
            change[read + 1 - repeat.start] -= 1
        return list(accumulate(change))

    def _equal_stretch(self, bounds: list[int]) -> tuple[int, int] | None:
        """The longest row of blocks with one signature and free ends, at least two, as (first, end)."""
        keys: list[Hashable] = []
        for k in range(len(bounds) - 1):
            free = self.cuts.free[bounds[k]] and self.cuts.free[bounds[k + 1]]
            keys.append(self._signature(bounds[k], bounds[k + 1]).key if free else ("shut", k))
        first, end = max(_stretches(keys), key=lambda s: (s[1] - s[0], -s[0]))
        return (first, end) if end - first >= 2 else None

    def _signature(self, start: int, stop: int) -> Signature:
        if (start, stop) not in self.tried:
            self.tried[start, stop] = signature_of(self.line, start, stop, self.last)
        return self.tried[start, stop]


def _stretches(keys: list[Hashable]) -> Iterator[tuple[int, int]]:
    """Maximal ranges of equal neighbours."""
    start = 0
    for i in range(1, len(keys) + 1):
        if i == len(keys) or keys[i] != keys[start]:
            yield start, i
            start = i
