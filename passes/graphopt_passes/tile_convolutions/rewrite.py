"""Writing a prefix tile by tile.

Before::

    %2 = conv2d(%x, %w1, padding=[1, 1]) : f32[1, 32, 512, 512]
    %3 = relu(%2)
    %4 = conv2d(%3, %w2, stride=[2, 2], padding=[1, 1]) : f32[1, 32, 256, 256]

After, in two tiles of 128 rows::

    %x0 = %x[:, :, 0:256]      %p0 = pad(%x0, above=1)   %20 = conv2d(%p0, %w1, padding=[0, 1])
    %30 = relu(%20)            %q0 = pad(%30, above=1)   %40 = conv2d(%q0, %w2, stride=[2, 2], padding=[0, 1])
    %x1 = %x[:, :, 254:512]    ...
    %4 = cat([%40, %41], 2)

Padding is written out where a tile has it: at the border of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from graphopt.edit import Edit
from graphopt_passes.chunk.rewrite import SIZED
from graphopt_passes.chunk.rows import shape_of
from graphopt_passes.tile_convolutions.tiling import Prefix, Rows
from graphopt_passes.tile_convolutions.windows import ROWS, Window

__all__ = ["tile"]

_aten = torch.ops.aten


def tile(edit: Edit, prefix: Prefix, count: int) -> None:
    """Let the readers of what a prefix ends in read a value that is computed in ``count`` tiles."""
    anchor, result = prefix.nodes[-1], prefix.result
    pieces = [_Tile(edit, prefix, anchor, rows).written() for rows in prefix.tiles(count)]
    joined = pieces, prefix.region.cuts[result]
    whole = edit.call_before(anchor, _aten.cat.default, joined, replaces=[result])
    inside = {*prefix.nodes, whole}
    result.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in inside)


class _Tile:
    """One tile: copies of the nodes, and which rows of the whole each holds."""

    def __init__(self, edit: Edit, prefix: Prefix, anchor: fx.Node, rows: Mapping[fx.Node, Rows]) -> None:
        self.edit, self.prefix, self.anchor, self.rows = edit, prefix, anchor, rows
        self.copies: dict[fx.Node, fx.Node] = {}
        self._parts: dict[tuple[fx.Node, Rows], fx.Node] = {}

    def written(self) -> fx.Node:
        for node in self.prefix.nodes:
            if node in self.rows:
                window = self.prefix.window(node)
                copy = self._plain(node) if window is None else self._slid(node, window)
                self.copies[node] = copy
        return self.copies[self.prefix.result]

    def _call(self, replaced: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        return self.edit.call_before(self.anchor, target, args, kwargs, replaces=[replaced])

    def _part(self, source: fx.Node, rows: Rows) -> fx.Node:
        """Some rows of a value: of its copy, or of the whole where it comes from outside."""
        held = self.rows[source] if source in self.copies else (0, self.prefix.size(source))
        value = self.copies.get(source, source)
        if rows == held:
            return value
        if (source, rows) not in self._parts:
            start, stop = rows[0] - held[0], rows[1] - held[0]
            args = (value, self.prefix.region.cuts[source], start, stop)
            of = source if source in self.copies else self.anchor
            self._parts[source, rows] = self._call(of, _aten.slice.Tensor, args)
        return self._parts[source, rows]

    def _plain(self, node: fx.Node) -> fx.Node:
        rows = self.rows[node]

        def part(ref: fx.Node) -> fx.Node:
            return self._part(ref, rows) if ref in self.prefix.region.cuts else ref

        if node.target in SIZED:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            sizes = list(shape_of(node))
            sizes[self.prefix.region.cuts[node]] = rows[1] - rows[0]
            return self._call(node, SIZED[node.target], (part(source), sizes))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), part)
        return self._call(node, node.target, args, kwargs)

    def _slid(self, node: fx.Node, window: Window) -> fx.Node:
        image = window.args[0]
        first, last = window.needs(*self.rows[node])
        start, stop = self.prefix.reads(node, image, self.rows[node])
        part = self._part(image, (start, stop))
        if (first, last) != (start, stop):
            beside = [0, 0] * (len(shape_of(node)) - ROWS - 1)
            padding = [*beside, start - first, last - stop]
            part = self._call(node, _aten.constant_pad_nd.default, (part, padding, window.fill))
        return self._call(node, window.target, (part, *window.args[1:]))
