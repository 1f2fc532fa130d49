"""Operators that move no data: which element of their input an element of their result is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt_kernels.emit.index import Affine, Bounds, Indices, Unindexable, flat, strides_of, unflat

__all__ = ["broadcast", "is_view", "source_indices"]

aten = torch.ops.aten
prims = torch.ops.prims

_Rule = Callable[[fx.Node, Indices, Bounds], tuple[fx.Node, Indices]]


def broadcast(indices: Indices, shape: Sequence[int], source: Sequence[int]) -> Indices:
    """Indices into an operand of ``source`` shape that belong to ``indices`` into a result of ``shape``."""
    lead = len(shape) - len(source)
    return tuple(Affine() if n == 1 else index for index, n in zip(indices[lead:], source, strict=True))


def _shape(node: fx.Node) -> list[int]:
    return [int(n) for n in node.meta["val"].shape]


def _of(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _same(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    return _of(node), at


def _reshaped(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    source = _of(node)
    if _shape(source) == _shape(node):
        return source, at
    return source, unflat(flat(at, strides_of(_shape(node))), _shape(source), bounds)


def _permuted(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    dims = [int(d) % len(at) for d in node.args[1]]  # type: ignore[arg-type, union-attr]
    return _of(node), tuple(at[dims.index(d)] for d in range(len(at)))


def _transposed(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    indices = list(at)
    if len(indices) > 1:
        a, b = (0, 1) if node.target is aten.t.default else (int(d) % len(at) for d in node.args[1:3])  # type: ignore[arg-type]
        indices[a], indices[b] = indices[b], indices[a]
    return _of(node), tuple(indices)


def _expanded(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    source = _of(node)
    return source, broadcast(at, _shape(node), _shape(source))


def _broadcast_in_dim(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    source, where = _of(node), node.args[2]
    picked = tuple(at[int(d)] for d in where)  # type: ignore[arg-type, union-attr]
    return source, broadcast(picked, _shape(source), _shape(source))


def _sliced(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    source = _of(node)
    given = dict(zip(("dim", "start", "end", "step"), node.args[1:], strict=False)) | dict(node.kwargs)
    dim = int(given.get("dim", 0)) % len(at)  # type: ignore[arg-type]
    size = _shape(source)[dim]
    start = int(given.get("start") or 0)  # type: ignore[arg-type]
    start = min(max(start + size if start < 0 else start, 0), size)
    step = int(given.get("step", 1))  # type: ignore[arg-type]
    return source, at[:dim] + (at[dim] * step + start,) + at[dim + 1 :]


def _selected(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    source = _of(node)
    shape = _shape(source)
    dim, index = int(node.args[1]) % len(shape), int(node.args[2])  # type: ignore[arg-type]
    return source, at[:dim] + (Affine((), index % shape[dim]),) + at[dim:]


def _flipped(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    source = _of(node)
    shape = _shape(source)
    dims = {int(d) % len(shape) for d in node.args[1]}  # type: ignore[arg-type, union-attr]
    return source, tuple(i * -1 + (shape[d] - 1) if d in dims else i for d, i in enumerate(at))


def _strided(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices]:
    source = _of(node)
    if not source.meta["val"].is_contiguous():
        raise Unindexable(f"{node.name} steps through memory that is not contiguous")
    strides = [int(s) for s in node.args[2]]  # type: ignore[arg-type, union-attr]
    offset = int(node.args[3] or 0) if len(node.args) > 3 else 0  # type: ignore[arg-type]
    return source, unflat(flat(at, strides) + offset, _shape(source), bounds)


_RULES: dict[Any, _Rule] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.contiguous.default: _same,
    aten.view.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.squeeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.squeeze.dims: _reshaped,
    prims.squeeze.default: _reshaped,
    aten.permute.default: _permuted,
    prims.transpose.default: _permuted,
    aten.transpose.int: _transposed,
    aten.t.default: _transposed,
    aten.expand.default: _expanded,
    prims.broadcast_in_dim.default: _broadcast_in_dim,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.flip.default: _flipped,
    aten.as_strided.default: _strided,
}


def is_view(target: Any) -> bool:
    """Whether an operator only moves elements about. Copies count: nothing is computed."""
    return target in _RULES


def source_indices(node: fx.Node, at: Indices, bounds: Bounds) -> tuple[fx.Node, Indices] | None:
    """The input of a view and where in it the element ``at`` lies; ``None`` for other operators."""
    rule = _RULES.get(node.target)
    return rule(node, at, bounds) if rule is not None else None
