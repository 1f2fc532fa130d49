"""Operators that slide a window over an image: which rows of the input do rows of the result need?

::

    conv2d(x, w, stride=2, padding=1), kernel 3
    rows [4, 8) of the result need rows [7, 16) of x; rows [0, 4) need [-1, 8), of which one is padding

Rows are the first dimension behind batch and channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.rules import argument
from graphopt_passes.chunk.rows import follow, shape_of

__all__ = ["ROWS", "Window", "through", "window_of"]

_aten = torch.ops.aten
ROWS = 2
"""The dimension that is cut where a window slides over it."""

_CONVOLUTIONS = {
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default,
    _aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding,
}  # fmt: skip
_PADDED = {
    _aten.conv1d.padding: _aten.conv1d.default,
    _aten.conv2d.padding: _aten.conv2d.default,
    _aten.conv3d.padding: _aten.conv3d.default,
}
_LARGEST = {_aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default}
_MEANS = {_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default}


@dataclass(frozen=True)
class Window:
    """Along the rows: a ``kernel`` of so many, so far apart (``dilation``), moved by ``stride`` over an input
    with ``above`` rows of ``fill`` before and ``below`` after it. ``target(*args)`` is the call without
    padding of rows."""

    kernel: int
    stride: int
    dilation: int
    above: int
    below: int
    fill: float
    target: Any
    args: tuple[Any, ...]

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the padded input, counted from the first row that is no padding."""
        reach = self.dilation * (self.kernel - 1) + 1
        return start * self.stride - self.above, (stop - 1) * self.stride - self.above + reach


def window_of(node: fx.Node) -> Window | Reason | None:
    """The window of a call; ``None`` for operators that slide none, a reason where it cannot be cut."""
    if len(shape_of(node)) <= ROWS:
        return None
    if node.target in _CONVOLUTIONS:
        return _convolution(node)
    if node.target in _LARGEST:
        return _pool(node, float("-inf"))
    if node.target in _MEANS:
        return _mean(node)
    if node.target in (_aten.pad.default, _aten.constant_pad_nd.default):
        return _padding(node)
    return None


def _convolution(node: fx.Node) -> Window | Reason:
    image, weight = node.args[:2]
    assert isinstance(weight, fx.Node)
    kernels = shape_of(weight)[2:]
    rank = len(kernels)
    stride, dilation = (_each(argument(node, name), rank) for name in ("stride", "dilation"))
    padding: Any = argument(node, "padding")
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, kernels, strict=True)]
        if any(total % 2 for total in whole[1:]):
            return Reason("its padding is not the same on both sides", (node.name,))
        above, below, beside = whole[0] // 2, whole[0] - whole[0] // 2, [total // 2 for total in whole[1:]]
    else:
        each = _each(0 if padding == "valid" else padding, rank)
        above, below, beside = each[0], each[0], each[1:]
    bias, groups = argument(node, "bias"), argument(node, "groups")
    args = (image, weight, bias, stride, [0, *beside], dilation, groups)
    called: Any = node.target
    target = _PADDED.get(called, called)
    return Window(kernels[0], stride[0], dilation[0], above, below, 0.0, target, args)


def _pool(node: fx.Node, fill: float) -> Window | Reason:
    rank = len(shape_of(node)) - 2
    if argument(node, "ceil_mode"):
        return Reason("its windows reach over the end of the image", (node.name,))
    kernel = _each(argument(node, "kernel_size"), rank)
    stride = _each(argument(node, "stride") or kernel, rank)
    padding, dilation = (_each(argument(node, name), rank) for name in ("padding", "dilation"))
    args = (node.args[0], kernel, stride, [0, *padding[1:]], dilation)
    return Window(kernel[0], stride[0], dilation[0], padding[0], padding[0], fill, node.target, args)


def _mean(node: fx.Node) -> Window | Reason:
    rank = len(shape_of(node)) - 2
    if argument(node, "ceil_mode"):
        return Reason("its windows reach over the end of the image", (node.name,))
    kernel = _each(argument(node, "kernel_size"), rank)
    stride = _each(argument(node, "stride") or kernel, rank)
    padding = _each(argument(node, "padding"), rank)
    if any(padding) and not argument(node, "count_include_pad"):
        return Reason("its means leave padding out", (node.name,))
    # The schemas of one and more dimensions end differently, on options that are the defaults here.
    if rank > 1 and argument(node, "divisor_override") is not None:
        return Reason("its means are of another number of values", (node.name,))
    args = (node.args[0], kernel, stride, [0, *padding[1:]])
    return Window(kernel[0], stride[0], 1, padding[0], padding[0], 0.0, node.target, args)


def _padding(node: fx.Node) -> Window | Reason | None:
    """Padding is a window of one row."""
    padding = list(argument(node, "pad"))
    place = 2 * (len(shape_of(node)) - ROWS - 1)
    if len(padding) <= place:
        return None
    if node.target is _aten.pad.default and argument(node, "mode") != "constant":
        return Reason("it pads by what the image holds", (node.name,))
    above, below = padding[place : place + 2]
    padding[place : place + 2] = 0, 0
    fill = argument(node, "value") or 0.0
    args = (node.args[0], padding, fill)
    return Window(1, 1, 1, above, below, float(fill), _aten.constant_pad_nd.default, args)


def _each(value: Any, rank: int) -> list[int]:
    """An option for every spatial dimension, where one number stands for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * rank if len(values) == 1 else values


def through(node: fx.Node, cuts: Mapping[fx.Node, int]) -> dict[fx.Node, int] | Reason:
    """How a call passes cut rows on: by a window, or row by row (for ``region.grow``)."""
    window = window_of(node)
    if isinstance(window, Reason):
        return window
    if window is not None:
        read = [source for source in node.all_input_nodes if source in cuts]
        whole = len(shape_of(node)) == len(shape_of(read[0])) > ROWS
        if read != [node.args[0]] or cuts[read[0]] != ROWS or not whole:
            return Reason("it mixes the rows", (node.name,))
        return {node: ROWS}
    if node.target is _aten.batch_norm.default and not argument(node, "training"):
        image = node.args[0]
        assert isinstance(image, fx.Node)
        others = [source for source in node.all_input_nodes if source in cuts and source is not image]
        if image in cuts and cuts[image] != 1 and not others:
            return {node: cuts[image]}
    sizes = {shape_of(source)[cuts[source]] for source in node.all_input_nodes if source in cuts}
    if len(sizes) != 1:
        return Reason("its operands are of other sizes", (node.name,))
    (size,) = sizes
    found = follow(node, cuts, size)
    if isinstance(found, Reason):
        return found
    if {shape_of(n)[d] for n, d in {**found.sliced, node: found.dim}.items()} != {size}:
        return Reason("it takes rows together", (node.name,))
    return {**found.sliced, node: found.dim}
