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
from contextlib import ExitStack
from copy import copy, deepcopy
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.ambient import Ambient, ambient_map
from graphopt.errors import GraphoptError, PassError, UnknownNameError, VerificationError
from graphopt.order import has_effect, restore_order
from graphopt.program import Program, layer_of, tensor_leaves
from graphopt.provenance import NodeNote, origin_of, stamp
from graphopt.verify import interface_of, verify_structure

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

    ``rule`` is stamped on the nodes that are made from then on; a pass with several rules sets it.
    Nodes are given as ``fx.Node`` or by name. Changes made past the helpers, with fx's own methods,
    are part of the transaction too.
    """

    def __init__(self, program: Program, origin: str) -> None:
        self.program = program
        self.origin = origin
        self.rule = ""
        self._replaced: dict[fx.Node, list[fx.Node]] = {}
        self._rules: dict[fx.Node, str] = {}

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph

    def __enter__(self) -> Edit:
        self._snapshot = _Snapshot(self.program)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._commit()
                return
            except BaseException as raised:
                error = raised
        self._snapshot.restore(self.program)
        if isinstance(error, GraphoptError) or not isinstance(error, Exception):
            raise error
        raise PassError(f"{self.origin}: the edit of {self.program.name} raised {_brief(error)}") from error

    # --- what a pass does ------------------------------------------------------------------

    def node(self, node: fx.Node | str) -> fx.Node:
        """The node of that name. Raises ``UnknownNameError`` for a name, and ``PassError`` for a node,
        that the graph does not have (any more)."""
        if isinstance(node, str):
            names = {known.name: known for known in self.graph.nodes}
            if node not in names:
                raise UnknownNameError(f"node of program {self.program.name}", node, names)
            return names[node]
        if node.graph is not self.graph or node not in self.graph.find_nodes(op=node.op, target=node.target):
            raise PassError(
                f"{self.origin}: node {node.name!r} is not in the graph of {self.program.name}: it was erased, "
                "or belongs to another graph"
            )
        return node

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
        if new in self._replaced:
            self._replaced[new].append(old)

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
        self._replaced[new] = [self.node(old) for old in replaces]
        self._rules[new] = self.rule
        for key in _INHERITED:
            if key in self.node(anchor).meta:
                new.meta[key] = self.node(anchor).meta[key]
        stamp(new, NodeNote(origin_of([self.node(anchor)]), self.origin))
        return new

    # --- leaving the block -----------------------------------------------------------------

    def _commit(self) -> None:
        if not self._snapshot.differs(self.graph):
            return
        restore_order(self.graph)
        for node in reversed(self.graph.nodes):
            if not node.users and not has_effect(node):
                self.graph.erase_node(node)
        known = self._snapshot.known
        new = [node for node in self.graph.nodes if node not in known]
        changed = {node for node in self.graph.nodes if node in known and _parts(node) != known[node]}
        _compute_values(self.graph, {*new, *changed}, self.origin)
        self._note(new)
        _rename_outputs(self.program)
        verify_structure(self.program, self._snapshot.interface)
        _torch.recompile_on_call(self.program.gm)

    def _note(self, new: Sequence[fx.Node]) -> None:
        for node in reversed(new):
            # A step on the way to a replacement stands for what the replacement stands for.
            replaced = self._replaced.get(node) or next(
                (self._replaced[user] for user in node.users if self._replaced.get(user)), []
            )
            self._replaced[node] = replaced
            sources = replaced or [user for user in node.users if user not in self._replaced]
            if sources and (replaced or "graphopt" not in node.meta):
                for key in _INHERITED:
                    found = next((source.meta[key] for source in sources if key in source.meta), None)
                    if found is not None:
                        node.meta[key] = found
                stamp(node, NodeNote(origin_of(sources), self.origin))
        for node in new:
            note = node.meta.get("graphopt") or NodeNote((), self.origin)
            stamp(node, replace(note, rule=self._rules.get(node, self.rule), layer=layer_of(node)))


class _Snapshot:
    """What a rolled-back edit puts back, and what a commit compares with."""

    def __init__(self, program: Program) -> None:
        gm = program.gm
        self.interface = interface_of(program)
        self.signature = program.signature
        self.known = {node: _parts(node) for node in gm.graph.nodes}
        self.graph = deepcopy(gm.graph)
        self.names = [node.name for node in gm.graph.nodes]
        self.extras = [
            {key: value for key, value in vars(node).items() if key.startswith("_dynamo")}
            for node in gm.graph.nodes
        ]
        self.attributes = dict(vars(gm))
        self.registries = {
            key: dict(value) for key in ("_parameters", "_buffers", "_modules") if (value := vars(gm)[key]) is not None
        }

    def differs(self, graph: fx.Graph) -> bool:
        nodes = list(graph.nodes)
        return nodes != list(self.known) or any(_parts(node) != self.known[node] for node in nodes)

    def restore(self, program: Program) -> None:
        gm = program.gm
        for key in set(vars(gm)) - set(self.attributes):
            del vars(gm)[key]
        for key, items in self.registries.items():
            registry = vars(gm)[key]
            registry.clear()
            registry.update(items)
        for node, name, extras in zip(self.graph.nodes, self.names, self.extras, strict=True):
            vars(node).update(extras)
            if node.name != name:
                node.name = name
        gm.graph = self.graph
        program.signature = self.signature


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


def _compute_values(graph: fx.Graph, stale: set[fx.Node], origin: str) -> None:
    """Values of ``stale`` nodes, and of users as far as a change of type or of memory reaches."""
    vals = [leaf for node in graph.nodes for leaf in tensor_leaves(node.meta.get("val"))]
    mode = _torch.fake_mode_among(vals) or _torch.fake_mode()
    nodes = list(graph.nodes)
    states = ambient_map(nodes).states
    for node, state in zip(nodes, states, strict=False):
        if node not in stale or node.op not in ("call_function", "call_method"):
            continue
        value = _value(node, state, mode, origin)
        if "val" in node.meta and _types(value) == _types(node.meta["val"]) and not _shares(node, value):
            continue
        node.meta["val"] = value
        node.meta.pop("tensor_meta", None)
        stale.update(node.users)


def _value(node: fx.Node, state: Ambient, mode: Any, origin: str) -> Any:
    def load(source: fx.Node) -> Any:
        if "val" in source.meta:
            return source.meta["val"]
        if source.op == "get_attr":
            return _torch.fake_attribute(source, mode)
        raise VerificationError(f"{origin}: node {source.name!r} has no value: rule 'values'")

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        for enter in state.autocast:
            device, dtype, enabled, cache = enter.args
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))  # type: ignore[arg-type]
        try:
            if isinstance(node.target, str):
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return node.target(*args, **kwargs)
        except Exception as error:
            raise PassError(
                f"{origin}: the value of node {node.name!r} ({node.target}) cannot be computed: {_brief(error)}"
            ) from error


def _types(value: Any) -> list[str]:
    """Text, because comparing symbolic sizes would add guards."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [
        f"{t.dtype} {t.device} {t.layout} {tuple(map(str, t.shape))} {_strides(t)}" if isinstance(t, torch.Tensor) else str(t)
        for t in leaves
    ]


def _strides(tensor: torch.Tensor) -> tuple[str, ...]:
    if tensor.layout is not torch.strided:
        return ()
    return tuple(map(str, (*tensor.stride(), tensor.storage_offset())))


def _shares(node: fx.Node, value: Any) -> bool:
    """Whether the value, or the one known so far, is a view of one of the node's inputs' memory or
    could be read as one: users would be told of the wrong storage."""
    inputs = {_storage(t) for source in node.all_input_nodes for t in tensor_leaves(source.meta.get("val"))}
    fresh = {_storage(t) for t in tensor_leaves(value)}
    known = {_storage(t) for t in tensor_leaves(node.meta["val"])}
    if not fresh & inputs and not known & inputs:
        # A view of what the node read before would keep the memory of a node that is gone.
        return any(
            _storage(t) in known
            for other in node.graph.nodes
            if other is not node and other not in node.users
            for t in tensor_leaves(other.meta.get("val"))
        )
    return fresh & inputs != known & inputs or bool(fresh & inputs)


def _storage(tensor: torch.Tensor) -> int:
    return _torch.storage_key(tensor) if tensor.layout is torch.strided else id(tensor)


def _rename_outputs(program: Program) -> None:
    """Signature entries follow the nodes that are returned in their places."""
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    flat = [leaf for leaf in torch.utils._pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]
    specs = program.signature.outputs
    if len(flat) == len(specs):
        renamed = tuple(replace(spec, node=node.name) for spec, node in zip(specs, flat, strict=True))
        program.signature = replace(program.signature, outputs=renamed)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
