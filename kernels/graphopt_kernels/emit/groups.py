"""Which operators of a program go into one kernel.

Every operator that a kernel can compute starts alone. Producers are then merged with their consumers, largest
value in between first, wherever no other operator has to run between them and one kernel is found for both;
readers of the same large value follow. A group stays if its kernel moves fewer bytes than its operators one
by one. Views are taken along into kernels and stay outside as well: they cost nothing there.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt_kernels.emit import views
from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.kernel_file import Kernel, kernel_of

__all__ = ["Grouping", "grouped"]

aten = torch.ops.aten

MOST_INPUTS = 24
"""Pointers of a kernel; more of them spill registers in the kernels of long groups."""

MOST_NODES = 96

_COPIES = (aten.clone.default, aten.contiguous.default, aten.flip.default, aten.lift_fresh_copy.default)


@dataclass(frozen=True)
class Grouping:
    """``kernels`` by the position of their last node. ``left``: operators that stay calls, and why."""

    kernels: tuple[Kernel, ...]
    left: tuple[tuple[str, Reason], ...]


def is_free(node: fx.Node) -> bool:
    """Whether a node is a view that is made without moving data."""
    return views.is_view(node.target) and node.target not in _COPIES


def grouped(graph: fx.Graph) -> Grouping:
    """Kernels for the graph of a lowered program."""
    return _Search(graph).found()


class _Group:
    def __init__(self, nodes: Iterable[fx.Node], number: int) -> None:
        self.nodes = set(nodes)
        self.number = number


class _Search:
    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = [node for node in graph.nodes if node.op == "call_function"]
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._of: dict[fx.Node, _Group] = {}
        self._left: list[tuple[str, Reason]] = []
        self._tried: dict[Any, NotFusible | bool] = {}

    def found(self) -> Grouping:
        for node in self._nodes:
            if is_free(node) or node.target is operator.getitem:
                continue
            unit = [node, *(user for user in node.users if user.target is operator.getitem)]
            why = self._refused(unit)
            if why is None:
                group = _Group(unit, self._place[node])
                self._of.update(dict.fromkeys(unit, group))
            else:
                self._left.append((node.name, why))
        self._merge_along(self._edges())
        self._merge_along(self._siblings())
        kernels = []
        for group in self._groups():
            kernel = self._kernel(group.nodes)
            if kernel is not None and self._pays(kernel):
                kernels.append(kernel)
        kernels.sort(key=lambda k: self._place[k.nodes[-1]])
        return Grouping(tuple(kernels), tuple(self._left))

    def _groups(self) -> list[_Group]:
        return list(dict.fromkeys(self._of.values()))

    # --- what may merge ----------------------------------------------------------------------

    def _merge_along(self, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        for left, right in pairs:
            a, b = self._of.get(left), self._of.get(right)
            if a is None or b is None or a is b:
                continue
            if self._between(a, b) or self._between(b, a):
                continue
            nodes = a.nodes | b.nodes
            if len(nodes) <= MOST_NODES and self._refused(nodes) is None:
                merged = _Group(nodes, min(a.number, b.number))
                self._of.update(dict.fromkeys(nodes, merged))

    def _edges(self) -> list[tuple[fx.Node, fx.Node]]:
        """(producer, consumer), most bytes in between first."""
        pairs = [
            (_size(source), -self._place[node], source, node)
            for node in self._of
            for source in self._sources(node)
            if source in self._of
        ]
        pairs.sort(key=lambda p: (-p[0], p[1], self._place[p[2]]))
        return [(source, node) for *_, source, node in pairs]

    def _siblings(self) -> list[tuple[fx.Node, fx.Node]]:
        """Readers of one value from outside of both groups, largest value first."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in self._of:
            for source in self._sources(node):
                readers.setdefault(source, []).append(node)
        pairs = []
        for source, nodes in readers.items():
            nodes.sort(key=self._place.__getitem__)
            pairs += [(_size(source), self._place[b], a, b) for a, b in pairwise(nodes)]
        pairs.sort(key=lambda p: (-p[0], p[1]))
        return [(a, b) for *_, a, b in pairs]

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads, views looked through."""
        found = []
        stack = list(node.all_input_nodes)
        while stack:
            source = stack.pop()
            if source.op == "call_function" and is_free(source):
                stack += source.all_input_nodes
            else:
                found.append(source)
        return found

    def _between(self, first: _Group, second: _Group) -> bool:
        """Whether something outside of both has to run after the first group and before the second."""
        inside = first.nodes | second.nodes
        last = max(self._place[node] for node in second.nodes)
        stack = [user for node in first.nodes for user in node.users if user not in inside]
        seen: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            # A group runs as a whole: what one of its nodes waits for all of them do.
            group = self._of.get(node)
            around = group.nodes if group is not None and group not in (first, second) else {node}
            for member in around:
                for user in member.users:
                    if user in second.nodes:
                        if not (is_free(node) and self._only_from(node, first)):
                            return True
                    elif user not in inside and (user in self._of or self._place.get(user, last) < last):
                        stack.append(user)
        return False

    def _only_from(self, view: fx.Node, group: _Group) -> bool:
        """Whether a view shows what the group made and can go into its kernel."""
        (source,) = view.all_input_nodes[:1]
        while source.op == "call_function" and is_free(source):
            (source,) = source.all_input_nodes[:1]
        return source in group.nodes

    # --- kernels -----------------------------------------------------------------------------

    def _members(self, nodes: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes of a group with the views between them, in order, and those that others read."""
        core = set(nodes)
        members = set(core)
        for node in core:
            stack = [source for source in node.all_input_nodes if source not in core]
            while stack:
                source = stack.pop()
                if source.op == "call_function" and is_free(source) and source not in members:
                    members.add(source)
                    stack += source.all_input_nodes
        ordered = sorted(members, key=self._place.__getitem__)
        outputs = [
            node
            for node in ordered
            if node in core
            and isinstance(node.meta.get("val"), torch.Tensor)
            and any(not self._taken_along(user, core) for user in node.users)
        ]
        return ordered, outputs

    def _taken_along(self, user: fx.Node, core: set[fx.Node]) -> bool:
        """Whether a reader needs the value in the kernel alone: it is of the group, or a view for it."""
        if user in core:
            return True
        if user.op != "call_function" or not is_free(user):
            return False
        return bool(user.users) and all(self._taken_along(next_, core) for next_ in user.users)

    def _kernel(self, nodes: Iterable[fx.Node]) -> Kernel | None:
        members, outputs = self._members(nodes)
        try:
            return kernel_of(members, outputs) if outputs else None
        except NotFusible:
            return None

    def _refused(self, nodes: Iterable[fx.Node]) -> Reason | None:
        """Why nodes do not make one kernel; groups alike are tried once."""
        members, outputs = self._members(nodes)
        if not outputs:
            return Reason("nothing reads it")
        key = _signature(members, outputs)
        if key not in self._tried:
            try:
                kernel = kernel_of(members, outputs)
                if len(kernel.inputs) > MOST_INPUTS:
                    raise NotFusible.because(f"{len(kernel.inputs)} inputs")
                self._tried[key] = True
            except NotFusible as error:
                self._tried[key] = error
        found = self._tried[key]
        return found.reason if isinstance(found, NotFusible) else None

    def _pays(self, kernel: Kernel) -> bool:
        """Whether a kernel moves fewer bytes than its operators do one by one."""
        separate = 0
        for node in kernel.nodes:
            if is_free(node) or node.target is operator.getitem:
                continue
            separate += sum(_size(source) for source in node.all_input_nodes) + _size(node)
        return kernel.file.bytes < separate


def _size(node: fx.Node) -> int:
    """Bytes of what a node gives; of an expanded tensor those that there are."""
    value = node.meta.get("val")
    leaves = value if isinstance(value, (tuple, list)) else [value]
    total = 0
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            distinct = prod(int(n) for n, s in zip(leaf.shape, leaf.stride(), strict=True) if s)
            total += distinct * leaf.dtype.itemsize
    return total


def _signature(members: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Any:
    """Equal for groups that give the same kernel."""
    number: dict[fx.Node, int] = {}
    rows: list[Any] = []

    def numbered(node: fx.Node) -> str:
        if node not in number:
            number[node] = len(number)
            rows.append(("in", _layout(node)))
        return f"%{number[node]}"

    for node in members:
        args = fx.node.map_arg((node.args, dict(node.kwargs)), numbered)
        rows.append((str(node.target), str(args), _layout(node)))
        number[node] = len(number)
    return tuple(rows), tuple(number[node] for node in outputs)


def _layout(node: fx.Node) -> Any:
    value = node.meta.get("val")
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return tuple(
        (leaf.dtype, tuple(leaf.shape), tuple(leaf.stride())) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    )
