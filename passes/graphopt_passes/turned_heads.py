"""What a rotation that a model writes out turns: the heads as they were before it, the tables, the norm.

Found from where elements lie (``memory_place``) and by going up through casts to float32, transposes and the
norm of heads, none of which the operator needs.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.rules import argument
from graphopt_passes.head_norm import HeadNorm, head_norm
from graphopt_passes.memory_place import are_halves, are_pairs, follows, same_place, upwards, value_of

__all__ = ["Table", "TurnedHeads", "turned_heads"]

_aten = torch.ops.aten
_CASTS = (_aten.to.dtype, _aten._to_copy.default, _aten.type_as.default)
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Table:
    """``node`` without its dimension ``heads``, if it has one of its own for them."""

    node: fx.Node
    heads: int | None
    halved: bool


@dataclass(frozen=True)
class TurnedHeads:
    """``input`` is [B, H, S, D] where ``heads_first``, else [B, S, H, D], as is the result
    (``result_heads_first``). ``path``: calls from the input to what is turned, which nobody needs any more
    unless they have other readers."""

    input: fx.Node
    heads_first: bool
    result_heads_first: bool
    cos: Table
    sin: Table
    width: int
    interleaved: bool
    norm: HeadNorm | None
    dtype: torch.dtype
    path: tuple[fx.Node, ...] = field(repr=False)

    @property
    def count(self) -> Any:
        """How many heads there are."""
        return self.input.meta["val"].shape[1 if self.heads_first else 2]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """What the operator reads."""
        weight = () if self.norm is None or self.norm.weight is None else (self.norm.weight,)
        return self.input, self.cos.node, self.sin.node, *weight


def turned_heads(
    *,
    cos: Any,
    sin: Any,
    first: Any,
    second: Any,
    again: tuple[Any, Any],
    joined_at: int | None,
    stacked_at: int | None,
    x: Any = None,
    rest: Any = None,
    edge: int | None = None,
    cast: Any = None,
) -> TurnedHeads | Reason:
    """What is turned, or why the operator does not do it.

    ``first`` and ``second`` are the elements of pairs, joined along ``joined_at`` or stacked along
    ``stacked_at``; ``again``: as they were cut a second time; ``x``: what they are of, where that is written.
    ``rest`` is put behind along ``edge``; ``cast``: a dtype, or a tensor of it, that it was rounded to.
    """
    values = [value_of(node) for node in (first, second)]
    if values[0] is None or values[1] is None:
        return Reason("what is turned is no tensor", _names(first, second))
    a, b = values[0], values[1]
    for other, known in zip(again, (a, b), strict=True):
        cut = value_of(other)
        if other is not None and (cut is None or not same_place(cut, known)):
            return Reason("pairs are not multiplied by sines and cosines crosswise", _names(other))
    interleaved = joined_at is None
    last = a.dim() - 1
    at, allowed = (stacked_at, (-1, last + 1)) if interleaved else (joined_at, (-1, last))
    if at not in allowed:
        return Reason("pairs are not along the last dimension", _names(first, second))
    matches = are_pairs if interleaved else are_halves
    sources = [x] if x is not None else list(upwards(first))
    turned = next(
        (s for s in sources if (v := value_of(s)) is not None and v.dim() == a.dim() and matches(a, b, v)),
        None,
    )
    if turned is None:
        what = "neighbours" if interleaved else "halves"
        return Reason(
            f"what is multiplied by the sine are no {what} of what is turned", _names(first, second)
        )
    value = turned.meta["val"]
    if value.dim() != 4:
        return Reason("what is turned are no heads [batch, heads, positions, elements]", (turned.name,))
    width = value.shape[-1]
    if not isinstance(width, int):
        return Reason("the width of heads is known at run time alone", (turned.name,))
    dtype = _result_dtype(value, cos, sin, cast)
    if isinstance(dtype, Reason):
        return dtype
    tables = [_table(table, value, interleaved) for table in (cos, sin)]
    for table in tables:
        if isinstance(table, Reason):
            return table
    first_table, second_table = (table for table in tables if isinstance(table, Table))
    if first_table.node.meta["val"].shape != second_table.node.meta["val"].shape:
        return Reason("cosines and sines are of different shapes", _names(cos, sin))
    whole = turned
    if rest is not None:
        found = _with_rest(turned, rest, edge, dtype)
        if isinstance(found, Reason):
            return found
        whole, dtype = found
    heads_first = bool(_heads_first(value, first_table.node.meta["val"]))
    above = {node for part in (first, second, *again, rest, x) if part is not None for node in upwards(part)}
    # A part of a split is a view of what was split; the split itself has no value of its own.
    above |= {
        split for node in above if node.target is python_operator.getitem for split in node.all_input_nodes
    }
    input, heads_first_there, norm, path = _before(whole, heads_first, above, (cos, sin))
    return TurnedHeads(
        input,
        heads_first_there,
        heads_first,
        first_table,
        second_table,
        width,
        interleaved,
        norm,
        dtype,
        path,
    )


def _names(*nodes: Any) -> tuple[str, ...]:
    return tuple(node.name for node in nodes if isinstance(node, fx.Node))


def _result_dtype(value: torch.Tensor, cos: Any, sin: Any, cast: Any) -> torch.dtype | Reason:
    tables = [value_of(table) for table in (cos, sin)]
    if tables[0] is None or tables[1] is None:
        return Reason("cosine or sine is no tensor", _names(cos, sin))
    if tables[0].dtype is not tables[1].dtype:
        return Reason("cosines and sines are of different dtypes", _names(cos, sin))
    if not tables[0].dtype.is_floating_point:
        return Reason(f"tables are {_short(tables[0].dtype)}", _names(cos, sin))
    if cast is None:
        return torch.promote_types(value.dtype, tables[0].dtype)
    if isinstance(cast, torch.dtype):
        return cast
    like = value_of(cast)
    return Reason("what it is rounded to is no dtype", _names(cast)) if like is None else like.dtype


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- tables ------------------------------------------------------------------------------------


def _table(node: fx.Node, heads: torch.Tensor, interleaved: bool) -> Table | Reason:
    """A table for the heads [B, H, S, D] or [B, S, H, D]."""
    given = node.meta["val"]
    width = heads.shape[-1]
    halved = given.shape[-1:] == (width // 2,)
    if interleaved and node.target is _aten.repeat_interleave.self_int and not halved:
        source = argument(node, "self")
        axis = argument(node, "dim")
        if argument(node, "repeats") == 2 and axis in (-1, given.dim() - 1) and value_of(source) is not None:
            node, halved = source, True
    value = node.meta["val"]
    if not 2 <= value.dim() <= 4 or value.shape[-1] != (width // 2 if halved else width):
        return Reason("a table has not a number for each element or pair of a position", (node.name,))
    first = _heads_first(heads, value)
    if first is None:
        return Reason("a table is not the same for all heads, or not of their positions", (node.name,))
    own = {4: 1 if first else 2, 3: None if first else 1}.get(value.dim())
    return Table(node, own, halved)


def _heads_first(heads: torch.Tensor, table: torch.Tensor) -> bool | None:
    """Whether heads come before positions, told by the dimension that the table is the same along; ``None``
    where it is along neither."""
    batch, one, two = (*(1,) * (4 - table.dim()), *table.shape)[:3]
    if not _is_one(batch) and batch != heads.shape[0]:
        return None
    if _is_one(one) and two == heads.shape[2]:
        return True
    return False if _is_one(two) and one == heads.shape[1] else None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


# --- what is turned ----------------------------------------------------------------------------


def _with_rest(
    turned: fx.Node, rest: Any, edge: int | None, dtype: torch.dtype
) -> tuple[fx.Node, torch.dtype] | Reason:
    """Heads of which ``turned`` is the front and ``rest`` the back, and the dtype of both together."""
    back, front = value_of(rest), turned.meta["val"]
    if back is None or edge not in (-1, 3) or back.dim() != 4:
        return Reason("what is not turned is not put behind what is", _names(rest))
    dtype = torch.promote_types(dtype, back.dtype)
    if back.shape[-1] == 0:
        return turned, dtype
    for candidate in upwards(rest):
        value = value_of(candidate)
        if (
            value is not None
            and value.dim() == 4
            and value.shape[-1] == front.shape[-1] + back.shape[-1]
            and follows(front, value, 0)
            and follows(back, value, front.shape[-1])
        ):
            return candidate, dtype
    return Reason("what is not turned is no part of the same heads", _names(rest))


def _before(
    node: fx.Node, heads_first: bool, cut: Set[fx.Node], tables: tuple[Any, Any]
) -> tuple[fx.Node, bool, HeadNorm | None, tuple[fx.Node, ...]]:
    """Up through what the operator does itself or does not need: what it reads, whether heads come first
    there, the norm, and the calls in between."""
    norm: HeadNorm | None = None
    path: list[fx.Node] = []
    while True:
        if (step := _step(node)) is not None:
            path.append(node)
            node, swaps = step
            heads_first ^= swaps
            continue
        found = head_norm(node) if norm is None else None
        if found is None or not _is_read_here({node, *path}, cut, tables):
            return node, heads_first, norm, tuple(path)
        norm, node = found, found.input
        path += found.nodes


def _step(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """What a transpose, a cast to float32 or an alias reads, and whether it swaps heads and positions."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    before, after = value_of(source), value_of(node)
    if not isinstance(source, fx.Node) or before is None or after is None:
        return None
    if node.target is _aten.alias.default:
        return source, False
    if node.target is _aten.transpose.int and {d % 4 for d in node.args[1:]} == {1, 2}:  # type: ignore[operator]
        return source, True
    if node.target is _aten.permute.default and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]:  # type: ignore[operator, union-attr]
        return source, True
    if node.target in _CASTS and after.dtype in (torch.float32, before.dtype):
        return (source, False) if before.dtype in (*_NARROW, after.dtype) else None
    return None


def _is_read_here(nodes: Set[fx.Node], cut: Set[fx.Node], tables: tuple[Any, Any]) -> bool:
    """Whether nobody but the rotation reads ``nodes``: others would need the normed heads as well."""
    return all(
        user in nodes
        or user in cut
        or (user.target is _aten.mul.Tensor and any(table in user.args for table in tables))
        for node in nodes
        for user in node.users
    )
