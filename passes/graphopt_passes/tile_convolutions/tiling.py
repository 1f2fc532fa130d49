"""Which rows each value of a prefix of a network needs for a tile of what it ends in, and what that costs.

Tiles of the result do not overlap; tiles of what lies before do, by what the windows in between reach over
(their halo), and are computed as often. So a prefix is cut that ends where little is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch.fx as fx

from graphopt_passes.chunk.region import Region, bytes_of
from graphopt_passes.chunk.rows import is_view, shape_of
from graphopt_passes.tile_convolutions.windows import Window, window_of

__all__ = ["Prefix", "Rows", "prefixes"]

Rows = tuple[int, int]


@dataclass(frozen=True)
class Prefix:
    """The first nodes of a region, up to one value that others read."""

    region: Region
    result: fx.Node
    _tiles: dict[int, Sequence[Mapping[fx.Node, Rows]]] = field(default_factory=dict, compare=False)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return self.region.nodes

    def size(self, node: fx.Node) -> int:
        """How many rows a value has."""
        return int(shape_of(node)[self.region.cuts[node]])

    def tiles(self, count: int) -> Sequence[Mapping[fx.Node, Rows]]:
        """For every tile of the result the rows of each value that are computed, or read, for it."""
        if count not in self._tiles:
            self._tiles[count] = self._cut(count)
        return self._tiles[count]

    def _cut(self, count: int) -> list[dict[fx.Node, Rows]]:
        size, start, found = self.size(self.result), 0, []
        for part in range(count):
            stop = start + size // count + (part < size % count)
            found.append(self._needed(start, stop))
            start = stop
        return found

    def _needed(self, start: int, stop: int) -> dict[fx.Node, Rows]:
        rows: dict[fx.Node, Rows] = {self.result: (start, stop)}
        for node in reversed(self.nodes):
            if node not in rows:
                continue
            for source in self._sources[node]:
                first, last = self.reads(node, source, rows[node])
                known = rows.get(source, (first, last))
                rows[source] = min(first, known[0]), max(last, known[1])
        return rows

    def reads(self, node: fx.Node, source: fx.Node, rows: Rows) -> Rows:
        """The rows of ``source`` that some rows of ``node`` need."""
        window = self._windows.get(node)
        if window is None:
            return rows
        first, last = window.needs(*rows)
        return max(first, 0), min(last, self.size(source))

    @cached_property
    def _sources(self) -> Mapping[fx.Node, list[fx.Node]]:
        """What nodes read that is cut."""
        cuts = self.region.cuts
        return {node: [s for s in node.all_input_nodes if s in cuts] for node in self.nodes}

    @cached_property
    def _windows(self) -> Mapping[fx.Node, Window]:
        found = ((node, window_of(node)) for node in self.nodes)
        return {node: window for node, window in found if isinstance(window, Window)}

    def window(self, node: fx.Node) -> Window | None:
        return self._windows.get(node)

    def again(self, count: int, seconds: Callable[[fx.Node], float]) -> float:
        """The share of the prefix's time that is spent on rows computed more than once."""
        whole = {node: seconds(node) for node in self.nodes if not is_view(node)}
        tiled = 0.0
        for rows in self.tiles(count):
            tiled += sum(whole[n] * (rows[n][1] - rows[n][0]) / self.size(n) for n in whole if n in rows)
        return tiled / max(sum(whole.values()), 1e-30) - 1.0

    def held(self, count: int, *, training: bool) -> int:
        """Bytes at most while one tile is computed: all that it makes in training, which waits for its
        backward, else what is alive at a time."""
        return max(self._alive(rows, training=training) for rows in self.tiles(count))

    def _alive(self, rows: Mapping[fx.Node, Rows], *, training: bool) -> int:
        share = {n: (rows[n][1] - rows[n][0]) / self.size(n) for n in self.nodes if n in rows}
        made = {n: int(bytes_of(n) * s) for n, s in share.items() if not is_view(n)}
        if training:
            return sum(made.values())
        last = {source: k for k, node in enumerate(self.nodes) for source in node.all_input_nodes}
        alive = peak = 0
        gone: dict[int, int] = {}
        for k, node in enumerate(self.nodes):
            alive += made.get(node, 0)
            peak = max(peak, alive)
            until = last.get(node, len(self.nodes))
            gone[until] = gone.get(until, 0) + made.get(node, 0)
            alive -= gone.pop(k, 0)
        return peak


def prefixes(region: Region) -> Iterator[Prefix]:
    """The prefixes of a region that end in one value, the shortest first."""
    inside: set[fx.Node] = set()
    waiting: dict[fx.Node, int] = {}
    for position, node in enumerate(region.nodes):
        inside.add(node)
        for source in node.all_input_nodes:
            if source in waiting:
                waiting[source] -= 1
                if not waiting[source]:
                    del waiting[source]
        if node.users:
            waiting[node] = len(node.users)
        if list(waiting) == [node] and not is_view(node):
            yield Prefix(Region(region.nodes[: position + 1], region.cuts, region.extent), node)
