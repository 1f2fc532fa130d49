"""The one door for mutation: a transaction over the graph of a program.

::

    with program.edit("fuse-tanh") as edit:
        new = edit.call_before(node, torch.ops.acme.tanh.default, (x,))
        edit.replace(node, new)

On leaving the block every new or changed node has its value computed under the program's fake mode
(only those), new nodes have the module stack, the stack trace and the origin of what they replace,
the order is topological again, dead code is gone, and the structure is verified. After an exception
in the block or a failed check the program is as it was: the same module, names and fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import is_
from types import TracebackType
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.errors import GraphoptError, PassError, brief, nearest
from graphopt.order import has_effect, restore_order
from graphopt.program import Program, layer_of
from graphopt.provenance import NodeNote, origin_of, stamp
from graphopt.revalue import compute_values, memory_owners
from graphopt.verify import Interface, graph_interface, verify_structure

__all__ = ["Edit"]

# What a new node takes over from the first of the nodes that it replaces.
_INHERITED = (
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "source_fn_stack",
    "partitioner_tag",
)


class Edit:
    """An open transaction, made by ``Program.edit``. ``origin`` is the id of the pass at work.

    ``committed`` says, after the block, whether it changed the program.
    ``rule`` is stamped on the nodes that are made from then on; a pass with several rules sets it.
    Nodes are given as ``fx.Node`` or by name. Changes made past the helpers, with fx's own methods,
    are part of the transaction too.
    """

    def __init__(self, program: Program, origin: str) -> None:
        self.program = program
        self.origin = origin
        self.rule = ""
        self.committed = False
        self._made: dict[fx.Node, _Made] = {}

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph

    @property
    def differs(self) -> bool:
        """Whether the graph was changed since the block was entered."""
        return self._snapshot.differs(self.graph)

    def __enter__(self) -> Edit:
        self._snapshot = _Snapshot(self.program)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._commit()
            except BaseException as raised:
                self._snapshot.restore(self.program)
                if isinstance(raised, GraphoptError) or not isinstance(raised, Exception):
                    raise
                raise self._wrapped(raised) from raised
            return
        self._snapshot.restore(self.program)
        if isinstance(error, Exception) and not isinstance(error, GraphoptError):
            raise self._wrapped(error) from error

    def _wrapped(self, error: Exception) -> PassError:
        return PassError(f"{self.origin}: the edit of {self.program.name} raised {brief(error)}")

    # --- what a pass does ------------------------------------------------------------------

    def node(self, node: fx.Node | str) -> fx.Node:
        """The node of that name. Raises ``PassError`` for a name or a node that the graph does not have
        (any more)."""
        if isinstance(node, fx.Node):
            if node.graph is self.graph and node in self.graph.find_nodes(op=node.op, target=node.target):
                return node
            raise PassError(
                f"{self.origin}: node {node.name!r} is not in program {self.program.name}: it was erased, or "
                "belongs to another graph"
            )
        names: dict[str, fx.Node] = {known.name: known for known in self.graph.nodes}
        if node not in names:
            close = nearest(node, names)
            raise PassError(
                f"{self.origin}: program {self.program.name} has no node {node!r}"
                + (f"; did you mean {close!r}?" if close else "")
            )
        return names[node]

    def call_before(
        self,
        anchor: fx.Node | str,
        target: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        replaces: Iterable[fx.Node | str] = (),
    ) -> fx.Node:
        """A new call right before ``anchor``. Its layer and origin are those of ``replaces``, of what
        ``replace`` gives to it, or else the anchor's."""
        with self.graph.inserting_before(self.node(anchor)):
            return self._call(anchor, target, args, kwargs, replaces)

    def call_after(
        self,
        anchor: fx.Node | str,
        target: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        replaces: Iterable[fx.Node | str] = (),
    ) -> fx.Node:
        """As ``call_before``, right after ``anchor``."""
        with self.graph.inserting_after(self.node(anchor)):
            return self._call(anchor, target, args, kwargs, replaces)

    def replace(self, node: fx.Node | str, new: fx.Node | str) -> None:
        """Let every user of ``node`` but ``new`` itself read ``new`` instead. ``node`` goes as dead
        code on leaving, unless it has an effect: that takes ``erase``."""
        old, new = self.node(node), self.node(new)
        if old is new:
            raise PassError(f"{self.origin}: node {old.name!r} cannot replace itself")
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if new in self._made:
            self._made[new].replaced.append(old)

    def erase(self, node: fx.Node | str) -> None:
        """Remove a node, effects and all. Raises ``PassError`` while it has users."""
        gone = self.node(node)
        if gone.users:
            users = ", ".join(repr(user.name) for user in gone.users)
            raise PassError(f"{self.origin}: cannot erase node {gone.name!r}: it is still read by {users}")
        self.graph.erase_node(gone)

    def _call(
        self,
        anchor: fx.Node | str,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        replaces: Iterable[fx.Node | str],
    ) -> fx.Node:
        new = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        self._made[new] = _Made(self.rule, self.node(anchor), [self.node(old) for old in replaces])
        return new

    # --- leaving the block -----------------------------------------------------------------

    def _commit(self) -> None:
        if not self.differs:
            return
        restore_order(self.graph)
        for node in reversed(self.graph.nodes):
            if not node.users and not has_effect(node):
                self.graph.erase_node(node)
        known = self._snapshot.known
        new = [node for node in self.graph.nodes if node not in known]
        changed = [node for node in self.graph.nodes if node in known and _parts(node) != known[node]]
        compute_values(self.graph, {*new, *changed}, self._snapshot.owners(), self.origin)
        self._note(new)
        _rename_outputs(self.program)
        verify_structure(self.program, self._snapshot.interface())
        _torch.recompile_on_call(self.program.gm)
        self.committed = True

    def _note(self, new: Sequence[fx.Node]) -> None:
        """Provenance: of what a node replaces, else of the replacement that it is a step to, else of
        where it was put."""
        sources: dict[fx.Node, list[fx.Node]] = {}
        for node in reversed(new):
            made = self._made.get(node, _Made(self.rule))
            found = made.replaced or [s for user in node.users for s in sources.get(user, ())]
            sources[node] = found or ([made.anchor] if made.anchor is not None else list(node.users))
            for key in _INHERITED:
                value = next((source.meta[key] for source in sources[node] if key in source.meta), None)
                if value is not None:
                    node.meta.setdefault(key, value)
            stamp(node, NodeNote(origin_of(sources[node]), self.origin, made.rule, layer_of(node)))


@dataclass
class _Made:
    """A call made in the transaction: under which rule, where it was put, what it replaces."""

    rule: str
    anchor: fx.Node | None = None
    replaced: list[fx.Node] = field(default_factory=list)


class _Snapshot:
    """What a rolled-back edit puts back, and what a commit compares with.

    Most edits change nothing, and large graphs take long to copy. So nodes are noted as they are, and the
    graph is made from the notes where an edit that changed something asks for it.
    """

    def __init__(self, program: Program) -> None:
        gm = program.gm
        self.signature = program.signature
        self.known = {node: _parts(node) for node in gm.graph.nodes}
        self._notes = {
            # What dynamo hangs on nodes beside their metadata is not part of fx's copy.
            node: (node.name, node.type, copy(node.meta), _beside(node))
            for node in gm.graph.nodes
        }
        self._empty = _torch.empty_graph_like(gm.graph)
        self.attributes = set(vars(gm))
        self.registries = {key: dict(vars(gm)[key]) for key in ("_parameters", "_buffers", "_modules")}

    def differs(self, graph: fx.Graph) -> bool:
        known = [part for node, same in self.known.items() for part in (node, *same.items)]
        now: list[Any] = []
        for node in graph.nodes:
            now += (node, node.op, node.target, node.args, node.kwargs)
        return len(now) != len(known) or not all(map(is_, now, known))

    def owners(self) -> dict[int, fx.Node]:
        """For every storage the first node that had it."""
        return memory_owners((node, meta.get("val")) for node, (_, _, meta, _) in self._notes.items())

    @cached_property
    def graph(self) -> fx.Graph:
        """The graph as it was, in new nodes."""
        copies: dict[fx.Node, fx.Node] = {}
        for node, (name, kind, meta, beside) in self._notes.items():
            op, target, args, kwargs = self.known[node].items
            args, kwargs = (fx.map_arg(given, copies.__getitem__) for given in (args, kwargs))
            made = copies[node] = self._empty.create_node(op, target, args, kwargs, name, kind)
            made.meta = copy(meta)
            vars(made).update(beside)
            made.name = name
        return self._empty

    def interface(self) -> Interface:
        return graph_interface(self.graph)

    def restore(self, program: Program) -> None:
        gm = program.gm
        for key in set(vars(gm)) - self.attributes:
            del vars(gm)[key]
        for key, items in self.registries.items():
            vars(gm)[key].clear()
            vars(gm)[key].update(items)
        program.signature = self.signature
        if self.differs(gm.graph):
            gm.graph = self.graph
            return
        for node, (_, _, meta, _) in self._notes.items():
            node.meta = meta


def _beside(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in vars(node).items() if key.startswith("_dynamo")}


class _Same:
    """Compares by identity: arguments hold tensors and symbolic sizes, which do not compare plainly."""

    __slots__ = ("items",)

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and all(a is b for a, b in zip(self.items, other.items, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _parts(node: fx.Node) -> _Same:
    # fx makes new containers whenever an argument is replaced.
    return _Same(node.op, node.target, node.args, node.kwargs)


def _rename_outputs(program: Program) -> None:
    """Signature entries follow the nodes that are returned in their places."""
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    flat = [leaf for leaf in torch.utils._pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]
    specs = program.signature.outputs
    if len(flat) == len(specs):
        renamed = tuple(replace(spec, node=node.name) for spec, node in zip(specs, flat, strict=True))
        program.signature = replace(program.signature, outputs=renamed)
