"""store-rotary: a step's queries and keys are turned, and keys and values stored, by one kernel.

Before::

    %h = aten.transpose.int(view of %p, 1, 2)    %5 = the norm of each head, as models write it
    %9 = aten.add.Tensor(%5 * %cos, cat([-%7, %6]) * %sin)                        queries, and keys alike
    %y = graphopt.attend_full(%9, %k, %v, %keys, %values, %slots, ...)

After::

    %q = graphopt.rotary_to_stores(%h, %i, %v, %keys, %values, %slots, %cos, %sin, %w, %x, 128, ...)
    %y = graphopt.attend_full(%q, None, None, %keys, %values, %slots, ...)

One token is a few heads: what generated code makes of a rotation and a norm is one kernel or two for queries
and as many for keys, each of which takes the time that a kernel takes to begin. Programs of several rows keep
what they have, as do stores that round or drop what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.structure import Line, line_of
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.memory_place import same_place, value_of
from graphopt_passes.rotary import Rotation, rotation_at
from graphopt_passes.turned_heads import Table, TurnedHeads

__all__ = ["StoreRotary"]

_aten = torch.ops.aten
_KERNEL = "rotary-to-stores"
_STORES = {"graphopt::attend_full": False, "graphopt::attend_ring": True}
"""Operators over stores of rows as they are, and whether the stores are rings."""

_START = 1.5e-6
"""Seconds until a kernel gets going and to its end, in a queue of others
(benchmarks/results/gpu_quantized.json)."""

_MOVES = (_aten.contiguous.default, _aten.clone.default, _aten.alias.default)


@dataclass(frozen=True)
class _Turned:
    """What an attention reads as queries or keys: ``rotation``, moved by ``moves``."""

    rotation: Rotation
    moves: tuple[fx.Node, ...]

    @property
    def heads(self) -> TurnedHeads:
        return self.rotation.heads

    @property
    def nodes(self) -> frozenset[fx.Node]:
        return self.rotation.nodes | set(self.moves)


@dataclass(frozen=True)
class _Place:
    """``attend`` reads what ``query`` and ``key`` turned."""

    attend: fx.Node
    query: _Turned
    key: _Turned

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All that goes, and the attention."""
        found = sorted(self.query.nodes | self.key.nodes, key=lambda node: node.name)
        return (*found, self.attend)

    def settings(self) -> tuple[Any, ...]:
        """What the operator takes besides tensors."""
        heads, norm = self.query.heads, self.query.heads.norm
        ring = _STORES[_name(self.attend)]
        eps, offset = (None, 0.0) if norm is None else (norm.eps, norm.offset)
        return heads.width, heads.interleaved, eps, offset, ring


@dataclass(frozen=True)
class StoreRotary(Pass):
    """Turns what a step of one token asks and stores, and stores it, in one kernel. ``everywhere``: also on
    devices that the operator has no kernel for, where it gains nothing."""

    name: ClassVar[str] = "store-rotary"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "turn queries and keys of a step, and store keys and values, in one kernel"
    after: ClassVar[dict[str, str]] = {
        "normalize": "casts to the same type hide rotations",
        "functionalize": "what is turned in place hides who reads it",
        "fuse-row-product": "projections are taken before what reads them",
    }
    before: ClassVar[dict[str, str]] = {
        "rotary": "rotations that a step stores need no call of their own",
        "fuse-norm": "norms of heads belong to the rotation after them",
    }

    everywhere: bool = False

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if ctx.mode == "train":
            return
        line: Line | None = None
        for node in program.nodes():
            if _name(node) not in _STORES or not _is_row(argument(node, "query")):
                continue
            line = line or line_of(program.graph)
            found = self._found(node, line)
            if isinstance(found, Reason):
                yield NearMiss(self.name, node.name, 2, 3, found)
            elif found is not None:
                names = tuple(each.name for each in found.nodes)
                normed = found.query.heads.norm is not None
                yield Candidate(
                    f"{self.name}@{node.name}", self.name, names,
                    # Queries and keys have a kernel each, and one more for their norms.
                    CostDelta(seconds=-_START * (3 if normed else 1)), _storing(found),
                    exactness="reassociated",
                )  # fmt: skip

    def _found(self, attend: fx.Node, line: Line) -> _Place | Reason | None:
        """``None`` where nothing is turned."""
        query = _turned(argument(attend, "query"))
        if query is None or isinstance(query, Reason):
            return query
        given = argument(attend, "key"), argument(attend, "value")
        if None in given:
            return Reason("another attention writes the store that it reads", (attend.name,))
        key = _turned(given[0])
        if key is None:
            return Reason("queries are turned and keys are not", (attend.name,))
        if isinstance(key, Reason):
            return key
        place = _Place(attend, query, key)
        return _unlike(place) or self._refusal(place, line) or place

    def _refusal(self, place: _Place, line: Line) -> Reason | None:
        here = (place.attend.name,)
        kernel = default_host().kernels().get(_KERNEL)
        if kernel is None:
            return Reason(f"the kernel {_KERNEL} is not installed", here)
        value = value_of(argument(place.attend, "query"))
        if value is not None and not value.is_cuda and not self.everywhere:
            return Reason(f"no kernel runs on {value.device.type}, where the operator gains nothing", here)
        for part in (place.query, place.key):
            for node in (*part.moves, part.rotation.root):
                if any(user not in place.nodes for user in node.users):
                    return Reason("what is turned is read besides", (node.name, *here))
        states = line.ambient.states
        if place.attend not in line.position:
            return Reason("nobody reads it", here)
        key = states[line.position[place.attend]].key
        for node in place.nodes:
            if node in line.position and states[line.position[node]].key != key:
                return Reason("autocast or the gradient mode changes within it", (node.name, *here))
        roots = line.aliases.roots
        reads = {*place.query.heads.reads, *place.key.heads.reads, argument(place.attend, "value")}
        if any(roots.get(node, frozenset()) & line.aliases.written for node in reads):
            return Reason("what it reads is written by the program", here)
        reason: Reason | None = kernel.supports(*_examples(place))
        return reason


def _name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def _is_row(query: Any) -> bool:
    value = value_of(query)
    size = None if value is None or value.dim() != 4 else value.shape[2]
    return isinstance(size, int) and size == 1


def _turned(node: Any) -> _Turned | Reason | None:
    """The rotation above ``node`` [B, H, 1, D], up through what moves heads."""
    moves: list[fx.Node] = []
    swapped = False
    while isinstance(node, fx.Node):
        found = rotation_at(node)
        if isinstance(found, Reason):
            return found
        if found is not None:
            value = node.meta["val"]
            if swapped == found.heads.result_heads_first and value.shape[1] * value.shape[2] != 1:
                return Reason("heads are laid out otherwise than attention reads them", (node.name,))
            return _Turned(found, tuple(moves))
        if node.target is _aten.transpose.int and {d % 4 for d in node.args[1:]} == {1, 2}:  # type: ignore[operator]
            swapped = not swapped
        elif node.target not in _MOVES:
            return None
        moves.append(node)
        node = node.args[0]
    return None


def _unlike(place: _Place) -> Reason | None:
    """Why one call does not turn both."""
    query, key = place.query.heads, place.key.heads
    names = (query.input.name, key.input.name)
    if (query.width, query.interleaved) != (key.width, key.interleaved):
        return Reason("queries are turned otherwise than keys", names)
    for one, other in ((query.cos, key.cos), (query.sin, key.sin)):
        if not _same_table(one, other):
            return Reason("queries are turned by other tables than keys", (one.node.name, other.node.name))
    norms = query.norm, key.norm
    if (norms[0] is None) != (norms[1] is None):
        return Reason("either queries or keys are normalized, not both", names)
    if norms[0] and norms[1] and (norms[0].eps, norms[0].offset) != (norms[1].eps, norms[1].offset):
        return Reason("norms of queries and keys differ in what is added", names)
    for part in (query, key):
        dtype = part.input.meta["val"].dtype
        if part.dtype is not dtype:
            return Reason(f"{dtype} is turned into {part.dtype}", (part.input.name,))
    return None


def _same_table(one: Table, other: Table) -> bool:
    if one.node is other.node:
        return True
    values = one.node.meta["val"], other.node.meta["val"]
    return one.heads == other.heads and one.halved == other.halved and same_place(*values)


def _examples(place: _Place) -> tuple[Any, ...]:
    """Values of what the operator is given, as far as they are known."""
    query, key = place.query.heads, place.key.heads
    tensors = []
    for heads in (query, key):
        value = heads.input.meta["val"]
        tensors.append(value if heads.heads_first else value.transpose(1, 2))
    tensors += [
        argument(place.attend, name).meta["val"]
        for name in ("value", "key_store", "value_store", "positions")
    ]
    for table in (query.cos, query.sin):
        value = table.node.meta["val"]
        tensors.append(value if table.heads is None else value.select(table.heads, 0))
    weights = [
        None if heads.norm is None or heads.norm.weight is None else heads.norm.weight.meta["val"]
        for heads in (query, key)
    ]
    return (*tensors, *weights, *place.settings())


@dataclass(frozen=True)
class _Operand:
    """What node ``reader`` reads as its argument ``at``: it may be the result of an earlier rewrite."""

    reader: str
    at: int

    def of(self, edit: Edit) -> Any:
        return edit.node(self.reader).args[self.at]


def _operand(node: fx.Node) -> _Operand:
    for user in node.users:
        for at, given in enumerate(user.args):
            if given is node:
                return _Operand(user.name, at)
    raise AssertionError(f"nobody reads {node.name}")


def _storing(place: _Place) -> Callable[[Edit], None]:
    query, key = place.query.heads, place.key.heads
    parts = [(_operand(heads.input), heads.heads_first) for heads in (query, key)]
    tables = [(_operand(table.node), table.heads) for table in (query.cos, query.sin)]
    weights = [
        None if heads.norm is None or heads.norm.weight is None else _operand(heads.norm.weight)
        for heads in (query, key)
    ]
    settings, name, nodes = place.settings(), place.attend.name, [node.name for node in place.nodes]

    def apply(edit: Edit) -> None:
        attend = edit.node(name)
        _, _, value, key_store, value_store, positions, *rest = attend.args
        given: list[Any] = []
        for operand, heads_first in parts:
            data = operand.of(edit)
            given.append(data if heads_first else edit.call_before(attend, _aten.transpose.int, (data, 1, 2)))
        given += [value, key_store, value_store, positions]
        for operand, heads in tables:
            table = operand.of(edit)
            if heads is not None:
                table = edit.call_before(attend, _aten.select.int, (table, heads, 0))
            given.append(table)
        given += [None if operand is None else operand.of(edit) for operand in weights]
        replaced = tuple(edit.node(node) for node in nodes)
        operator = torch.ops.graphopt.rotary_to_stores.default
        turned = edit.call_before(attend, operator, (*given, *settings), replaces=replaced)
        made = edit.call_before(
            attend, attend.target, (turned, None, None, key_store, value_store, positions, *rest),
            replaces=(attend,),
        )  # fmt: skip
        edit.replace(attend, made)
        edit.erase(attend)

    return apply
