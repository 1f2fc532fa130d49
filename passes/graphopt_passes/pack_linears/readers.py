"""Whether the readers of a result take it as a strided part of something wider.

::

    view([2, 16, 512] -> [2, 16, 8, 64])   takes it: the last dimension is cut, rows stay where they are
    view([2, 16, 512] -> [2, 8192])        cannot: rows would have to lie next to each other
    contiguous, where it was already       would copy
"""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.capture.structure import Line
from graphopt.program import tensor_leaves

__all__ = ["readers_of", "spoiled", "waits"]

_aten = torch.ops.aten
_BY_LAYOUT = frozenset(
    {
        _aten.as_strided.default, _aten.view.dtype, _aten.sym_stride.int, _aten.sym_storage_offset.default,
        _aten.is_contiguous.default,
    }
)  # fmt: skip
"""Calls whose meaning depends on where elements lie."""


_LINEAR = frozenset(
    {
        _aten.add.Tensor, _aten.sub.Tensor, _aten.neg.default, _aten.cat.default, _aten.stack.default,
        _aten.clone.default, _aten.contiguous.default, _aten.reshape.default, _aten.to.dtype,
        _aten._to_copy.default, _aten.type_as.default, _aten.sum.default, _aten.sum.dim_IntList,
        _aten.mean.default, _aten.mean.dim, _aten.mul.Scalar, _aten.div.Scalar,
    }
)  # fmt: skip
"""Calls whose gradient needs nothing of what they read."""
_PRODUCTS = frozenset({_aten.mul.Tensor, _aten.div.Tensor})


def waits(node: fx.Node, line: Line, trained: Set[fx.Node]) -> bool:
    """Whether a reader's gradient needs the value, which so waits for the backward."""

    def needs(reader: fx.Node) -> bool:
        if reader.target in _LINEAR or reader not in trained:
            return False
        if reader.target not in _PRODUCTS:
            return True
        factors = [other for other in reader.args if isinstance(other, fx.Node)]
        return len(factors) == 2 and all(factor in trained for factor in factors)

    return any(needs(reader) for reader in readers_of(node, line))


_CASTS = frozenset({_aten.to.dtype, _aten._to_copy.default, _aten.type_as.default})


def spoiled(node: fx.Node, width: int, line: Line) -> Reason | None:
    """Why a reader of ``node`` could not do with rows that lie ``width`` elements apart, if one could not."""
    value = node.meta["val"]
    mode = _torch.fake_mode_of([value])
    with torch.no_grad(), mode:
        whole = torch.empty((*value.shape[:-1], width), dtype=value.dtype, device=value.device)
        part = whole.narrow(-1, 0, value.shape[-1])
        return _spoiled(node, node, part, line)


def _spoiled(root: fx.Node, node: fx.Node, value: Any, line: Line) -> Reason | None:
    for user in node.users:
        if user.op == "output":
            continue
        where = (root.name, user.name)
        target = user.target
        if target in _BY_LAYOUT:
            return Reason("its layout in memory is read", where)
        if target is not operator.getitem and not _is_aten(target):
            return Reason(f"{target} may want its rows without gaps", where)
        if root not in line.aliases.roots.get(user, ()):
            continue
        if [source for source in user.all_input_nodes if source is not node and _is_tensor(source)]:
            return Reason("it is read as part of a call that may hand it on", where)
        try:
            seen = _called(user, node, value)
        except (RuntimeError, ValueError) as error:
            first = str(error).partition("\n")[0]
            return Reason(f"a view of it cannot be taken of rows with gaps: {first}", where)
        if not _memory(seen) <= _memory(value):
            if _memory(user.meta["val"]) <= _memory(node.meta["val"]):
                return Reason("a reader would copy rows with gaps", where)
            continue  # it makes a copy in any case
        reason = _spoiled(root, user, seen, line)
        if reason is not None:
            return reason
    return None


def _called(user: fx.Node, node: fx.Node, value: Any) -> Any:
    def load(source: fx.Node) -> Any:
        return value if source is node else source.meta["val"]

    args, kwargs = fx.node.map_arg((user.args, user.kwargs), load)
    return user.target(*args, **kwargs)  # type: ignore[operator]


def _memory(value: Any) -> set[int]:
    return {_torch.storage_key(tensor) for tensor in tensor_leaves(value)}


def _is_aten(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def readers_of(node: fx.Node, line: Line, *, through_casts: bool = False) -> list[fx.Node]:
    """Calls that read a value or a view of it, views left out; ``through_casts``: or a cast of it."""
    found = []
    for user in node.users:
        if user.op == "output":
            continue
        shares = line.aliases.roots.get(user, frozenset()) & line.aliases.roots[node]
        is_view = bool(shares) and _memory(user.meta["val"]) <= _memory(node.meta["val"])
        if is_view or (through_casts and user.target in _CASTS):
            found += readers_of(user, line, through_casts=through_casts)
        else:
            found.append(user)
    return found
