"""What must hold for a call to be dropped: facts about values, memory, outputs and gradients.

Facts are of the graph as it will be: ``drop`` tells of a call that is going, after which its readers
count as readers of its input.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.structure import line_of
from graphopt.capture.trained import trained_values
from graphopt.program import Program

__all__ = ["Identities"]

_MANY = 3
"""Gradients that a composite operator may hand to one input: it could use it any number of times."""


class Identities:
    """Facts about one program. ``trains`` says whether the program runs with gradients enabled."""

    def __init__(self, program: Program, *, trains: bool) -> None:
        line = line_of(program.graph)
        switches = line.ambient.entry_grad is not None
        self._trained = trained_values(line) if trains or switches else frozenset[fx.Node]()
        self._roots = line.aliases.roots
        self._writers: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            for ref in written_inputs(node):
                for root in self._roots[ref]:
                    self._writers.setdefault(root, node)
        output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
        leaves = torch.utils._pytree.tree_leaves(output.args[0])
        self._outputs = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
        self._uses = {node: _uses(node) for node in program.graph.nodes}
        self._source: dict[fx.Node, fx.Node] = {}

    def drop(self, node: fx.Node) -> None:
        """From now on readers of ``node`` read its first argument."""
        source = _source_of(node)
        self._source[node] = source
        self._uses[source] = Counter({u: n for u, n in self._uses[source].items() if u is not node})
        self._uses[source].update(self._uses[node])
        self._outputs = [source if leaf is node else leaf for leaf in self._outputs]

    def same_type(self, node: fx.Node) -> bool:
        """Whether a call yields one tensor of the shape, strides, dtype and device of its input."""
        value, source = node.meta.get("val"), _source_of(node).meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
            return False
        return _type(value) == _type(source)

    def same_memory(self, node: fx.Node) -> bool:
        """Whether it yields its input's memory."""
        value, source = node.meta["val"], _source_of(node).meta["val"]
        if torch.strided not in (value.layout, source.layout):
            return value is source
        return _torch.storage_key(value) == _torch.storage_key(source)

    def has_floats(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())

    def written(self, node: fx.Node) -> Reason | None:
        """A write would be seen by other readers, or differentiated in another way."""
        for root in (*self._memory(node), *self._memory(_source_of(node))):
            if root in self._writers:
                writer = self._writers[root].name
                return Reason("its memory is written in place", (node.name, writer))
        return None

    def returned(self, node: fx.Node) -> Reason | None:
        """Callers tell a tensor from a view of it, and see which tensors share memory."""
        source = _source_of(node)
        memory, under = self._memory(node), self._memory(source)
        if memory & under:
            mine = [leaf for leaf in self._outputs if leaf is node]
        else:
            # The call makes memory of its own, which would be gone under every view of it.
            mine = [leaf for leaf in self._outputs if self._memory(leaf) & memory]
        if not mine:
            return None
        held = next((root for root in under if root.op in ("placeholder", "get_attr")), None)
        if held is not None:
            return Reason("its result is an output and would be an input itself", (node.name, held.name))
        others = [leaf for leaf in self._outputs if leaf not in mine and self._memory(leaf) & under]
        if others:
            return Reason("its result and another output would be one tensor", (node.name, others[0].name))
        return None

    def reorders(self, node: fx.Node) -> Reason | None:
        """Three gradients or more are summed in the order in which they come: a call that goes must not
        move the sum of its readers' into the sum of its input's."""
        source = _source_of(node)
        if not self._may_train(source):
            return None
        rest = {user: n for user, n in self._uses[source].items() if user is not node}
        if not rest or _gradients(rest) + _gradients(self._uses[node]) <= 2:
            return None
        return Reason("gradients would be summed in another order", (node.name, source.name))

    def cuts_gradient(self, node: fx.Node, *, detaches: bool) -> bool:
        """Whether gradients flow to its input and not through it: it detaches, or is called without
        gradients."""
        source = _source_of(node)
        return self._may_train(source) if detaches else source in self._trained and node not in self._trained

    def _may_train(self, value: fx.Node) -> bool:
        # A conversion without effect hands a trained tensor through even where gradients are off.
        return value in self._trained or bool(self._roots[value] & self._trained)

    def _memory(self, node: fx.Node) -> frozenset[fx.Node]:
        """Where the memory under a value comes from, dropped calls taken out."""
        found: set[fx.Node] = set()
        for root in self._roots[node]:
            found |= self._memory(self._source[root]) if root in self._source else {root}
        return frozenset(found)


def _source_of(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _uses(node: fx.Node) -> Counter[fx.Node]:
    """How often each user reads a value."""
    uses: Counter[fx.Node] = Counter()
    for user in node.users:
        read: list[fx.Node] = []
        fx.node.map_arg((user.args, user.kwargs), read.append)
        uses[user] = read.count(node)
    return uses


def _gradients(uses: dict[fx.Node, int] | Counter[fx.Node]) -> int:
    """At most how many gradients the readers of a value hand to it."""
    return sum(_MANY if _is_composite(user) else count for user, count in uses.items())


def _is_composite(node: fx.Node) -> bool:
    return _torch.schema_of(node.target) is not None and _torch.is_composite(node.target)


def _type(tensor: torch.Tensor) -> tuple[str, ...]:
    # Text, because comparing symbolic sizes would add guards.
    sizes = [tensor.dim(), *tensor.shape]
    if tensor.layout is torch.strided:
        sizes += [*tensor.stride(), tensor.storage_offset()]
    return (str(tensor.dtype), str(tensor.device), str(tensor.layout), *map(str, sizes))
