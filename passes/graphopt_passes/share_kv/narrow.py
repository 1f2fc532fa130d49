"""Takes away, in a training program, the columns of a projection that nobody reads any more.

Before, keys and values being read from another attention::

    %4 = aten.linear(%x, %w [192, 64], %b [192])    %5 = split(%4, 64, -1)    %q = %5[0]

After::

    %q = aten.linear(%x, slice(%w, 0, 0, 64), slice(%b, 0, 0, 64))

The weight stays the model's own; the gradient of what is cut off is zero. Columns stay where queries are
taken after heads were split, or do not follow each other (heads whose queries, keys and values alternate).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from graphopt.decoding.layouts import name_of
from graphopt.edit import Edit

__all__ = ["narrow_queries"]

_aten = torch.ops.aten
_VIEWS = ("view", "reshape", "_unsafe_view")
_SPLITS = ("split", "split_with_sizes", "chunk")
_PLACES = {"linear": (1, 0, 2), "addmm": (2, 1, 0), "mm": (1, 1, None), "matmul": (1, 1, None)}
"""Of a product: the argument that is its weight, the dimension of that which the columns are along, and the
argument that is a bias."""


def narrow_queries(edit: Edit, product: fx.Node) -> None:
    """Let ``product`` compute the columns alone that are read, where these follow each other."""
    if name_of(product) not in _PLACES:
        return
    position, dim, bias_at = _PLACES[name_of(product)]
    weight = product.args[position]
    bias = product.args[bias_at] if bias_at is not None and len(product.args) > bias_at else None
    if not isinstance(weight, fx.Node) or weight.meta["val"].dim() != 2:
        return
    if bias is not None and not (isinstance(bias, fx.Node) and bias.meta["val"].dim() == 1):
        return
    views, found = _picked(product)
    if found is None:
        return
    start, stop, node = found
    args: list[Any] = list(product.args)
    args[position] = edit.call_before(product, _aten.slice.Tensor, (weight, dim, start, stop))
    if bias is not None and bias_at is not None:
        args[bias_at] = edit.call_before(product, _aten.slice.Tensor, (bias, 0, start, stop))
    made = edit.call_before(product, product.target, args, product.kwargs, replaces=(product,))
    for view in views:
        sizes = [*_sizes(view)[:-1], stop - start]
        made = edit.call_before(node, view.target, (made, sizes), replaces=(view,))
    edit.replace(node, made)


def _picked(product: fx.Node) -> tuple[list[fx.Node], tuple[int, int, fx.Node] | None]:
    """Views of ``product`` on the way to the one value that holds what is read of it, and that value with its
    first column and the one behind its last; ``None`` where that is not all."""
    width = int(product.meta["val"].shape[-1])
    views: list[fx.Node] = []
    node = product
    while len(node.users) == 1:
        (node,) = node.users
        if name_of(node) in _VIEWS and _sizes(node)[-1:] == [width]:
            views.append(node)
            continue
        part = _part(node, width)
        if name_of(node) in _SPLITS and len(node.users) == 1:
            (node,) = node.users
            number = node.args[1] if node.target is operator.getitem else None
            part = part[number] if isinstance(number, int) and part is not None else None
        if not isinstance(part, torch.Tensor) or not 0 < len(part) < width:
            break
        start, stop = int(part[0]), int(part[0]) + len(part)
        return views, (start, stop, node) if part.tolist() == list(range(start, stop)) else None
    return views, None


def _part(node: fx.Node, width: int) -> Any:
    """The columns that a part along the last dimension holds; of several parts, a list."""
    if name_of(node) not in (*_SPLITS, "slice"):
        return None
    source: Any = node.args[0]
    names = "dim start end step" if name_of(node) == "slice" else "sizes dim"
    said: dict[str, Any] = dict(zip(names.split(), node.args[1:], strict=False)) | dict(node.kwargs)
    dims = source.meta["val"].dim()
    if any(isinstance(value, fx.Node) for value in said.values()) or said.get("dim", 0) % dims != dims - 1:
        return None
    columns = torch.arange(width)
    if name_of(node) == "slice":
        return columns[slice(said.get("start"), said.get("end"), said.get("step"))]
    if name_of(node) == "chunk":
        return list(columns.chunk(said["sizes"]))
    return list(torch.split(columns, said["sizes"]))


def _sizes(view: fx.Node) -> list[Any]:
    """The sizes of a view, as they are written."""
    sizes = view.args[1] if len(view.args) > 1 else None
    return list(sizes) if isinstance(sizes, (list, tuple)) else []
