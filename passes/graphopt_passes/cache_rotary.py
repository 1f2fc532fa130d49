"""cache-rotary: turned keys, and values, are written where a static cache holds them.

Before::

    %a = graphopt.rotary(%h, %cos, %sin, None, None, [1, 32, 8, 8], ...)
    %k = transpose(getitem(%a, 1), 1, 2)                 %v = view of the projection
    %5 = aten.index_copy_(%keys, 2, %at, %k)
    %6 = aten.index_copy_(%values, 2, %at, %v)

After::

    %a = graphopt.rotary_to_cache(%h, %keys, %values, %at, %cos, %sin, None, None, [1, 32, 8, 8], ...)

Only without gradients, and where nobody could tell: the caches share no memory with each other or with what
is read, nobody else reads the keys before they are in the cache, and nothing looks at a cache, or has another
effect on what is read, between the rotation and the writes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.ambient import is_state_call
from graphopt.capture.structure import Line, line_of
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.memory_place import same_place, source_of, upwards, value_of

__all__ = ["CacheRotary"]

_aten = torch.ops.aten
_WRITE = _aten.index_copy_.default
_READS = ("input", "cos", "sin", "query_weight", "key_weight")


@dataclass(frozen=True)
class _Written:
    """``call`` turns; ``query`` is its first result; ``keys`` and ``values`` write into caches."""

    call: fx.Node
    query: fx.Node
    keys: fx.Node
    values: fx.Node


@dataclass(frozen=True)
class CacheRotary(Pass):
    """Writes turned keys and values into static caches. No options."""

    name: ClassVar[str] = "cache-rotary"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "write turned keys, and values, where a static cache holds them, in inference"
    after: ClassVar[dict[str, str]] = {"pack-rotary": "it makes the calls that this looks for"}

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if ctx.mode == "train" or "rotary-to-cache" not in default_host().kernels():
            return
        calls = [node for node in program.nodes() if _name(node) == "graphopt::rotary"]
        line = line_of(program.graph) if calls else None
        for call in calls:
            assert line is not None
            found = _written(call, line)
            if isinstance(found, Reason):
                yield NearMiss(self.name, call.name, 2, 3, found)
            elif found is not None:
                nodes = (found.call, found.keys, found.values)
                size = sum(
                    argument(write, "source").meta["val"].nbytes for write in (found.keys, found.values)
                )
                yield Candidate(
                    f"{self.name}@{call.name}", self.name, tuple(node.name for node in nodes),
                    CostDelta(seconds=-2 * size / ctx.cost.device.copy_bytes_per_second),
                    _writing(found, max(nodes[1:], key=lambda node: line.position[node]).name),
                )  # fmt: skip


def _name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def _written(call: fx.Node, line: Line) -> _Written | Reason | None:
    """The writes that take what ``call`` turned, ``None`` where its keys do not go to a cache."""
    elements = {user.args[1]: user for user in call.users}
    keys = _only_write(elements.get(1))
    if keys is None or not isinstance(keys, fx.Node):
        return keys
    names = (call.name, keys.name)
    if not argument(call, "heads")[3] or argument(call, "copies_values"):
        return Reason("values do not lie in the projection of the keys", names)
    if 0 not in elements:
        return Reason("nobody reads the queries", names)
    values = _write_of_values(call, keys)
    if values is None:
        return Reason("values do not go to a cache at the same positions", names)
    return _guard(call, keys, values, line) or _Written(call, elements[0], keys, values)


def _only_write(turned: fx.Node | None) -> fx.Node | Reason | None:
    """The call that writes ``turned`` [B, S, H, D] into a cache [B, H, L, D]."""
    if turned is None:
        return None
    users = list(turned.users)
    moved = users[0] if len(users) == 1 and users[0].target is _aten.transpose.int else None
    readers = [] if moved is None else list(moved.users)
    writes = [reader for reader in readers if reader.target is _WRITE and reader.args[3] is moved]
    if moved is None or not writes:
        return None
    if len(readers) > 1:
        return Reason("keys are read before they are in the cache", (turned.name, writes[0].name))
    dims = {int(dim) % 4 for dim in moved.args[1:]}  # type: ignore[arg-type]
    if dims != {1, 2} or argument(writes[0], "dim") not in (2, -2):
        return Reason("positions are not the third dimension of the cache", (writes[0].name,))
    return writes[0]


def _write_of_values(call: fx.Node, keys: fx.Node) -> fx.Node | None:
    """The write of the values that lie behind the keys in the projection, to the same positions."""
    heads = argument(call, "input")
    whole = heads.meta["val"]
    groups, queries, key_count, value_count = argument(call, "heads")
    each = queries + key_count + value_count
    rows = whole.unflatten(2, (groups, each))[:, :, :, queries + key_count :]
    wanted = (rows[:, :, 0] if groups == 1 else rows[:, :, :, 0]).transpose(1, 2)
    at = argument(keys, "index")
    nodes: Iterable[fx.Node] = call.graph.nodes
    for node in nodes:
        source = argument(node, "source") if node.target is _WRITE else None
        value = value_of(source)
        if node is keys or value is None or not same_place(value, wanted):
            continue
        if argument(node, "dim") in (2, -2) and argument(node, "index") is at:
            return node
    return None


def _guard(call: fx.Node, keys: fx.Node, values: fx.Node, line: Line) -> Reason | None:
    caches = [argument(write, "self") for write in (keys, values)]
    names = (call.name, *(cache.name for cache in caches))
    at = argument(keys, "index")
    stored = [cache.meta["val"] for cache in caches]
    data, query = argument(call, "input").meta["val"], call.meta["val"][0]
    for cache in stored:
        if cache.dim() != 4 or (cache.stride(3) != 1 and cache.shape[3] > 1):
            return Reason("elements of a head do not lie next to each other in the cache", names)
    if stored[0].dtype is not query.dtype or stored[1].dtype is not data.dtype:
        return Reason("the cache is of another dtype", names)
    if stored[0].shape[2] != stored[1].shape[2]:
        return Reason("caches hold different numbers of positions", names)
    if argument(values, "source").meta["val"].shape[:2] != stored[1].shape[:2]:
        return Reason("the cache is of other samples or heads", names)
    if at.meta["val"].dim() != 1 or at.meta["val"].shape[0] != data.shape[1]:
        return Reason("there is not a place in the cache for each position", names)
    roots = line.aliases.roots
    reads = [node for name in _READS if isinstance(node := argument(call, name), fx.Node)]
    read = frozenset[fx.Node]().union(*(roots[node] for node in (*reads, at)))
    if roots[caches[0]] & roots[caches[1]]:
        return Reason("the caches may share memory", names)
    if read & (roots[caches[0]] | roots[caches[1]]):
        return Reason("what is read may lie in a cache", names)
    return _guard_between(call, (keys, values), read, line)


def _guard_between(
    call: fx.Node, writes: tuple[fx.Node, fx.Node], read: frozenset[fx.Node], line: Line
) -> Reason | None:
    """Whether turning and both writes may happen where the last write does."""
    roots = line.aliases.roots
    held = roots[argument(writes[0], "self")] | roots[argument(writes[1], "self")]
    positions = [line.position[node] for node in (call, *writes)]
    for node in line.nodes[min(positions) : max(positions) + 1]:
        if node in (call, *writes):
            continue
        touched = {root for ref in node.all_input_nodes for root in roots.get(ref, ())}
        changed = {root for ref in written_inputs(node) for root in roots[ref]}
        if is_state_call(node) or changed & read:
            return Reason("a call between them has an effect", (call.name, node.name))
        if touched & held and source_of(node) is None:
            return Reason("the cache is read before it is written", (call.name, node.name))
        is_view = source_of(node) is not None or node.target is operator.getitem
        if not is_view and any(_is_part(source, call) for source in node.all_input_nodes):
            return Reason("queries are read before the cache is written", (call.name, node.name))
    return None


def _is_part(value: fx.Node, call: fx.Node) -> bool:
    """Whether ``value`` is a view of a result of ``call``."""
    return any(at.target is operator.getitem and at.args[0] is call for at in upwards(value))


def _writing(found: _Written, last_name: str) -> Callable[[Edit], None]:
    """What rewrites; ``last_name`` is the write that runs last."""

    def apply(edit: Edit) -> None:
        call, last = edit.node(found.call.name), edit.node(last_name)
        keys, values, turned = (edit.node(n.name) for n in (found.keys, found.values, found.query))
        writes = (keys, values)
        caches = [argument(write, "self") for write in writes]
        given: dict[str, Any] = {
            name: argument(call, name)
            for name in (*_READS, "heads", "width", "interleaved", "eps", "weight_offset")
        }
        data = given.pop("input")
        query = edit.call_before(
            last,
            torch.ops.graphopt.rotary_to_cache.default,
            (data, *caches, argument(keys, "index"), *given.values()),
            replaces=(call, *writes),
        )
        edit.replace(turned, query)
        for write, cache in zip(writes, caches, strict=True):
            edit.replace(write, cache)
            edit.erase(write)

    return apply
