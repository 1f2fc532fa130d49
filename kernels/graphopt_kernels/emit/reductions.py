"""Which operators reduce, along what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

__all__ = ["Reduction", "is_reduction", "reduction_of"]

aten = torch.ops.aten
prims = torch.ops.prims

_NAMES: dict[Any, str] = {
    aten.sum.default: "sum",
    aten.sum.dim_IntList: "sum",
    aten.mean.default: "mean",
    aten.mean.dim: "mean",
    aten.amax.default: "max",
    aten.amin.default: "min",
    # torch's references of ATen call prims: one dtype, no keepdim.
    prims.sum.default: "sum",
    prims.amax.default: "max",
    prims.amin.default: "min",
}


_VARIANCES = (aten.var_mean.correction, prims.var.default)


@dataclass(frozen=True)
class Reduction:
    """``name`` of ``source`` along ``dims``; ``dtype``: that of the result."""

    name: str
    source: fx.Node
    dims: tuple[int, ...]
    keepdim: bool
    dtype: torch.dtype | None = None


def is_reduction(target: Any) -> bool:
    """Whether an operator reduces."""
    return target in _NAMES or target in _VARIANCES


def reduction_of(node: fx.Node) -> Reduction | None:
    """What a node reduces, ``None`` for one that does not."""
    if node.target in _VARIANCES:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return Reduction("variance", source, _dims(dims, source), bool(node.kwargs.get("keepdim", False)))
    name = _NAMES.get(node.target)
    if name is None:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return Reduction(name, source, _dims(dims, source), bool(keepdim), node.meta["val"].dtype)


def _dims(dims: Any, source: fx.Node) -> tuple[int, ...]:
    rank = source.meta["val"].dim()
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return tuple(range(rank))
    return (int(dims),) if isinstance(dims, int) else tuple(int(d) for d in dims)
