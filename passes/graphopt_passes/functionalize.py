"""functionalize: pointwise calls give new values instead of writing what they read.

Before::

    %12 = aten.batch_norm(...)
    %13 = aten.add_.Tensor(%12, %4)
    %14 = aten.relu_(%13)

After::

    %12 = aten.batch_norm(...)
    %13 = aten.add.Tensor(%12, %4)
    %14 = aten.relu(%13)

AOTAutograd does the same below, so nothing is computed or held that would not be. Done here, passes that
move or copy calls need not ask who sees a write. Only values are changed that the program makes itself
and takes no views of before the last write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.aliasing import Aliases, alias_map, written_inputs
from graphopt.capture.structure import Line, line_of
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program

__all__ = ["Functionalize"]


@dataclass(frozen=True)
class Functionalize(Pass):
    """Replaces pointwise calls that write a value of the program by those that give a new one. No options."""

    name: ClassVar[str] = "functionalize"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "give new values instead of writing them in place, where nobody could tell"
    after: ClassVar[dict[str, str]] = {"normalize": "views that change nothing hide who owns the memory"}

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        aliases = alias_map(program.graph)
        made = [node for node in aliases.written if node.op == "call_function"]
        if not made:
            return
        line = line_of(program.graph)
        for root in sorted(made, key=lambda node: line.position.get(node, -1)):
            if root not in line.position or aliases.roots[root] != {root}:
                continue
            writes = [node for node in line.nodes if root in _written(node, line.aliases)]
            reason = _reason(root, writes, line)
            if reason is not None:
                yield NearMiss(self.name, writes[0].name, 1, 2, reason)
                continue
            names = tuple(node.name for node in writes)
            yield Candidate(
                f"{self.name}@{root.name}", self.name, names, CostDelta(), _rewriting(root.name, names)
            )


def _written(node: fx.Node, aliases: Aliases) -> set[fx.Node]:
    return {root for source in written_inputs(node) for root in aliases.roots[source]}


def _reason(root: fx.Node, writes: list[fx.Node], line: Line) -> Reason | None:
    """Why what is written to the memory of ``root`` stays, or ``None``."""
    same = {root, *writes}
    last = line.position[writes[-1]]
    for node, roots in line.aliases.roots.items():
        # A view that is taken after the last write sees no other than that.
        if root in roots and node not in same and line.position.get(node, -1) < last:
            return Reason("views of it are taken", (node.name,))
    begun = line.ambient.states[line.position[root]].key
    for node in writes:
        if _functional(node.target) is None:
            return Reason("it is written by what is no pointwise call", (node.name,))
        if node.args[0] not in same:
            return Reason("it is written as part of something else", (node.name,))
        if line.ambient.states[line.position[node]].key != begun:
            return Reason("autocast or gradients are switched before it is written", (node.name,))
        if not _gives_the_same(node):
            return Reason("a new value would be of another type", (node.name,))
    return None


def _functional(target: Any) -> Any:
    """The pointwise operator that computes what ``target`` writes to its first argument, if there is one."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.partition("::")[2]
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    found = getattr(packet, target._overloadname, None)
    if found is None or torch.Tag.pointwise not in found.tags:
        return None
    written, new = (_torch.schema_of(op) for op in (target, found))
    alike = [a.name for a in written.arguments] == [a.name for a in new.arguments]
    return found if alike and not any(a.alias_info is not None for a in new.arguments) else None


def _gives_the_same(node: fx.Node) -> bool:
    """Whether the functional call's result has the shape, type and layout of what is written."""

    def example(ref: fx.Node) -> Any:
        value = ref.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    examples: Any = fx.node.map_arg((node.args, node.kwargs), example)
    args, kwargs = examples
    try:
        result = _functional(node.target)(*args, **kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    old = args[0]
    return (result.shape, result.dtype, result.stride()) == (old.shape, old.dtype, old.stride())


def _rewriting(name: str, writes: tuple[str, ...]) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        root = edit.node(name)
        latest, same, pending = root, {root}, {edit.node(write) for write in writes}
        for node in _behind(root):
            if node not in pending:
                # Whatever it calls it, it sees what was written last.
                for old in [source for source in node.all_input_nodes if source in same]:
                    node.replace_input_with(old, latest)
                continue
            read: Any = fx.node.map_arg((node.args, node.kwargs), partial(_latest, same, latest))
            latest = edit.call_before(node, _functional(node.target), *read, replaces=[node])
            same |= {node, latest}
        for node in reversed([edit.node(write) for write in writes]):
            edit.erase(node)

    return apply


def _latest(same: Set[fx.Node], latest: fx.Node, ref: fx.Node) -> fx.Node:
    return latest if ref in same else ref


def _behind(root: fx.Node) -> Iterator[fx.Node]:
    """The nodes after ``root``, those alone that are there now."""
    nodes = list(root.graph.nodes)
    yield from nodes[nodes.index(root) + 1 :]
