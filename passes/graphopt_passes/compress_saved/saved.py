"""What the backward of a joint program reads of the forward, storage by storage.

A saved value is a storage that a forward operator makes and that a backward operator reads, directly or
through views. Views are looked through on both sides: a reader is an operator that computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.joint import save_everything
from graphopt.program import Program
from graphopt.replay import is_random_state
from graphopt.values import value_table

__all__ = ["Read", "SavedValue", "SavedValues"]

Root = tuple[str, int]
"""A storage: the node that makes it and the number of the tensor among those that it yields."""


@dataclass(frozen=True)
class Read:
    """``reader`` computes from ``view``, which is memory of the value (the value itself, or a view)."""

    reader: fx.Node
    view: fx.Node


@dataclass(frozen=True)
class SavedValue:
    """``node`` stands for the storage: the first node that yields it as one tensor. ``reads`` are the
    backward's, in its order; ``bytes`` those of the whole storage."""

    node: fx.Node
    reads: tuple[Read, ...]
    bytes: int


class SavedValues:
    """Who computes what in a joint program, and what the backward reads of the forward."""

    def __init__(self, program: Program) -> None:
        self.program = program
        schedule = save_everything(program, random_states=True)
        self.order = {node: index for index, node in enumerate(program.graph.nodes)}
        self.forward = frozenset(schedule.forward)
        self.backward = frozenset(schedule.backward)
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._roots = _roots(program.graph)
        self._holders: dict[Root, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if (root := self.root(node)) is not None:
                self._holders.setdefault(root, []).append(node)
        outputs = {spec.node: spec.role for spec in program.signature.outputs}
        self._kept = {self.root(self._nodes[name]) for name, role in outputs.items() if role != "gradient"}
        self._returned = {self.root(self._nodes[name]) for name in outputs}
        tangents = {spec.node for spec in program.signature.by_role("tangent")}
        self.driven: set[fx.Node] = set()
        for node in program.graph.nodes:
            if node.name in tangents or any(source in self.driven for source in node.all_input_nodes):
                self.driven.add(node)
        self._inputs = {spec.node for spec in program.signature.inputs}

    def root(self, node: fx.Node) -> Root | None:
        """The storage under a node that yields one tensor."""
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        return self._roots[node.name][0]

    def __iter__(self) -> Iterator[SavedValue]:
        """Saved values in the order of the forward."""
        for root, holders in self._holders.items():
            maker = self._nodes[root[0]]
            if maker.name not in self.forward or maker.op != "call_function" or is_random_state(maker):
                continue
            reads = self.reads(holders[0])
            if reads:
                yield SavedValue(holders[0], reads, self.bytes(holders[0]))

    def reads(self, node: fx.Node) -> tuple[Read, ...]:
        """Where the backward reads the storage under ``node``."""
        root = self.root(node)
        assert root is not None
        found: dict[Read, None] = {}
        for view in self._holders[root]:
            for user in view.users:
                if user.name in self.backward and self.root(user) != root and user.op == "call_function":
                    found[Read(user, view)] = None
        return tuple(sorted(found, key=lambda read: self.order[read.reader]))

    def bytes(self, node: fx.Node) -> int:
        """Bytes of the storage under a node."""
        value: torch.Tensor = node.meta["val"]
        return int(value.untyped_storage().nbytes())

    def path(self, view: fx.Node, start: fx.Node) -> list[fx.Node]:
        """The views that lead from ``start`` to ``view``, first to last; of a split its list as well."""
        steps: list[fx.Node] = []
        root = self.root(start)
        while view is not start:
            steps.append(view)
            view = next(source for source in view.all_input_nodes if root in self._roots[source.name])
        return steps[::-1]

    def obstacle(self, value: SavedValue) -> Reason | None:
        """Why a value must stay as it is whatever it would be packed into."""
        node, tensor = value.node, value.node.meta["val"]
        if self.root(node) in self._kept:
            return Reason("an output of the program holds it", (node.name,))
        if self.root(node) in self._returned:
            return Reason("it is a gradient itself", (node.name,))
        if any(isinstance(size, torch.SymInt) for size in (*tensor.shape, *tensor.stride())):
            return Reason("its size is not fixed", (node.name,))
        if getattr(node.meta.get("recompute"), "name", "") in ("MUST_RECOMPUTE", "PREFER_RECOMPUTE"):
            return Reason("it lies in a region that the model checkpoints itself", (node.name,))
        written = next((r.reader for r in value.reads if r.reader.is_impure(impure_random=False)), None)
        if written is not None:
            return Reason("it is written in place", (written.name,))
        return None


def _roots(graph: fx.Graph) -> dict[str, list[Root]]:
    """The storage behind each tensor of each node."""
    found: dict[str, list[Root]] = {}
    for name, leaves in value_table(graph).items():
        behind: list[Root] = []
        for index, leaf in enumerate(leaves):
            if leaf.alias is None:
                behind.append((name, index))
            else:
                source, at = leaf.alias
                behind.append((behind if source == name else found[source])[at])
        found[name] = behind
    return found
