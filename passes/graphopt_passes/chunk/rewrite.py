"""Writing a region slice by slice.

Before::

    %2 = linear(%x, %w1)    %3 = gelu(%2)    %4 = linear(%3, %w2)

After, in two slices along the first dimension::

    %s = split_with_sizes(%x, [2, 2])   %x0 = %s[0]   %x1 = %s[1]
    %20 = linear(%x0, %w1)    %30 = gelu(%20)    %40 = linear(%30, %w2)
    %21 = linear(%x1, %w1)    %31 = gelu(%21)    %41 = linear(%31, %w2)
    %4 = cat([%40, %41])

Autograd runs backwards through the slices one after another. The gradient of a split is one ``cat`` (that
of separate slices would be a sum of as many tensors of the full size), a weight's the sum of the slices'.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from graphopt.edit import Edit
from graphopt_passes.chunk.region import Region
from graphopt_passes.chunk.rows import shape_of

__all__ = ["SIZED", "groups", "unroll"]

_aten = torch.ops.aten
SIZED = {
    _aten.view.default: _aten.view.default,
    _aten.reshape.default: _aten.reshape.default,
    _aten._unsafe_view.default: _aten.reshape.default,
    _aten.flatten.using_ints: _aten.reshape.default,
    _aten.unflatten.int: _aten.reshape.default,
    _aten.expand.default: _aten.expand.default,
}
"""Calls whose results have sizes that follow from other arguments, and what states them outright."""


def groups(extent: int, count: int) -> list[int]:
    """``extent`` in ``count`` parts that differ by one at most, larger ones first."""
    return [extent // count + (part < extent % count) for part in range(count)]


def unroll(edit: Edit, region: Region, count: int) -> None:
    """Let the readers of the region's exits read values that are computed in ``count`` slices."""
    anchor = region.nodes[-1]
    parts = groups(region.extent, count)
    exits = region.exits
    slices = {entry: _split(edit, anchor, region, entry, parts) for entry in region.entries}
    results: dict[fx.Node, list[fx.Node]] = {node: [] for node in exits}
    for number, part in enumerate(parts):
        copies = {entry: pieces[number] for entry, pieces in slices.items()}
        for node in region.nodes:
            target, args, kwargs = _call(node, region, copies, part)
            copies[node] = edit.call_before(anchor, target, args, kwargs, replaces=[node])
        for node in exits:
            results[node].append(copies[node])
    inside = set(region.nodes)
    for node, pieces in results.items():
        whole = edit.call_before(anchor, _aten.cat.default, (pieces, region.cuts[node]), replaces=[node])
        inside.add(whole)
        node.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in inside)


def _split(edit: Edit, anchor: fx.Node, region: Region, entry: fx.Node, parts: list[int]) -> list[fx.Node]:
    dim = region.cuts[entry]
    unit = shape_of(entry)[dim] // region.extent
    sizes = [part * unit for part in parts]
    pieces = edit.call_before(anchor, _aten.split_with_sizes.default, (entry, sizes, dim), replaces=[anchor])
    return [
        edit.call_before(anchor, operator.getitem, (pieces, k), replaces=[anchor]) for k in range(len(parts))
    ]


def _call(
    node: fx.Node, region: Region, copies: Mapping[fx.Node, fx.Node], part: int
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The call of ``node`` for one slice of ``part`` groups."""
    if node.target in SIZED:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dim, sizes = region.cuts[node], list(shape_of(node))
        sizes[dim] = sizes[dim] // region.extent * part
        return SIZED[node.target], (copies.get(source, source), sizes), {}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda ref: copies.get(ref, ref))
    return node.target, args, kwargs
