"""Structure of a graph without its names: labels of nodes, signatures of ranges, fingerprints.

A label says what a node computes and on what kinds of values: target, constant arguments, shape,
dtype, stride and device of every tensor read and written, ambient state. It says nothing of who
made the values. A signature adds the wiring inside a range of nodes and numbers the values that
enter it in the order in which they are first read, so that two ranges with equal signatures are
one program called with other arguments:

    layer 1:  linear(%x, %w1) -> relu -> add(., %x)     signature ((-1,-2), (0,), (1,-1))
    layer 2:  linear(%y, %w2) -> relu -> add(., %y)     the same
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import Aliases, alias_map, written_inputs
from graphopt.capture.ambient import AmbientMap, ambient_map
from graphopt.order import must_happen

__all__ = [
    "Line",
    "Signature",
    "attribute",
    "fingerprint_graph",
    "is_inline",
    "is_trained_input",
    "line_of",
    "signature_of",
    "value_type",
]

INLINE_ELEMENTS = 64
"""Constants up to this size belong to the structure: they are compared by content and copied."""


@dataclass(frozen=True)
class Line:
    """The call nodes of a graph that matter, in execution order.

    Left out: placeholders, attributes, the output, and calls without effect that nobody reads.
    What compares nodes with each other (``labels``, ``refs``, ``inline``) is worked out when it is
    first asked for, which has to be before the graph changes.
    """

    graph: fx.Graph
    nodes: tuple[fx.Node, ...]
    position: dict[fx.Node, int]
    ambient: AmbientMap
    aliases: Aliases

    @property
    def labels(self) -> tuple[int, ...]:
        """Small integers, equal for nodes that compute the same."""
        return self._labelled[0]

    @property
    def refs(self) -> tuple[tuple[fx.Node, ...], ...]:
        """The values that each node reads, in the order of its arguments, repeats included; constants that
        belong to the structure and handles of autocast regions are not among them."""
        return self._labelled[1]

    @cached_property
    def inline(self) -> frozenset[fx.Node]:
        return frozenset(_inline_constants(self.graph, self.aliases))

    @cached_property
    def _labelled(self) -> tuple[tuple[int, ...], tuple[tuple[fx.Node, ...], ...]]:
        return _labelled(self)

    @cached_property
    def _writes(self) -> list[int]:
        return [k for k, node in enumerate(self.nodes) if written_inputs(node)]

    def writing(self, start: int, stop: int) -> list[fx.Node]:
        """Nodes of ``start:stop`` that write to a value in place, in order."""
        found = self._writes[bisect_left(self._writes, start) : bisect_left(self._writes, stop)]
        return [self.nodes[k] for k in found]

    def last_reads(self) -> dict[fx.Node, int]:
        """Position of the last node that reads a value; ``len(nodes)`` for outputs of the graph."""
        last = {ref: i for i, refs in enumerate(self.refs) for ref in refs}
        for node in self.graph.nodes:
            if node.op == "output":
                last.update(dict.fromkeys(node.all_input_nodes, len(self.nodes)))
        return last


@dataclass(frozen=True)
class Signature:
    """``key`` is equal for ranges that are one program. ``inputs`` are the values from outside in
    canonical order, ``outputs`` the values that are read outside, in order of their nodes."""

    key: Hashable
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def line_of(graph: fx.Graph) -> Line:
    """The line of a graph whose nodes carry ``meta["val"]``. Linear in its size."""
    live = _live_calls(graph)
    nodes = tuple(node for node in graph.nodes if node in live)
    position = {node: i for i, node in enumerate(nodes)}
    return Line(graph, nodes, position, ambient_map(nodes), alias_map(graph))


def _labelled(line: Line) -> tuple[tuple[int, ...], tuple[tuple[fx.Node, ...], ...]]:
    """Labels and references of the nodes."""
    contents = {node: content_key(attribute(line.graph, node)) for node in line.inline}
    types: dict[fx.Node, Hashable] = {}
    numbers: dict[Hashable, int] = {}

    def type_of(node: fx.Node) -> Hashable:
        if node not in types:
            kind = value_type(node.meta.get("val"))
            # A frozen and a trained parameter make different programs.
            types[node] = (kind, "trained") if is_trained_input(node) else kind
        return types[node]

    labels, all_refs = [], []
    for i, node in enumerate(line.nodes):
        refs: list[fx.Node] = []

        def leaf(ref: fx.Node, refs: list[fx.Node] = refs) -> Hashable:
            if ref in contents:
                return ("constant", contents[ref])
            if ref.target is _torch.enter_autocast():
                return "region"
            refs.append(ref)
            return ("%", type_of(ref))

        arguments = _freeze((node.args, node.kwargs), leaf)
        state = line.ambient.states[i].key
        key = (node.op, node.target, arguments, type_of(node), _freeze(state, leaf))
        labels.append(numbers.setdefault(key, len(numbers)))
        all_refs.append(tuple(refs))
    return tuple(labels), tuple(all_refs)


def signature_of(line: Line, start: int, stop: int, last: dict[fx.Node, int]) -> Signature:
    """Signature of nodes ``start:stop``; ``last`` is ``line.last_reads()``."""
    slots: dict[fx.Node, int] = {}
    wiring = []
    for i in range(start, stop):
        row = []
        for ref in line.refs[i]:
            at = line.position.get(ref, -1)
            row.append(at - start if start <= at < stop else -1 - slots.setdefault(ref, len(slots)))
        wiring.append(tuple(row))
    outputs = [i for i in range(start, stop) if last.get(line.nodes[i], -1) >= stop]
    key = (line.labels[start:stop], tuple(wiring), tuple(i - start for i in outputs))
    return Signature(key, tuple(slots), tuple(line.nodes[i] for i in outputs))


def is_trained_input(node: fx.Node) -> bool:
    """Whether a placeholder stands for a tensor that requires a gradient.

    Tracing above autograd detaches ``meta["val"]``; ``meta["example_value"]``, where dynamo left it,
    still tells.
    """
    if node.op != "placeholder":
        return False
    values = (node.meta.get("val"), node.meta.get("example_value"))
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def value_type(value: Any) -> Hashable:
    """Kind of a value in ``meta["val"]``: dtype, shape, stride, device of tensors, structure of tuples."""
    if isinstance(value, torch.Tensor):
        shape = tuple(_size(s) for s in value.shape)
        if value.layout is not torch.strided:
            return (value.dtype, shape, value.layout, value.device)
        return (value.dtype, shape, tuple(_size(s) for s in value.stride()), value.device)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, tuple(value_type(v) for v in value))
    if isinstance(value, torch.SymFloat):
        return "SymFloat"  # sizes are never made of it, so its name, another in every block, says nothing
    return (type(value).__name__, str(value))


def fingerprint_graph(graph: fx.Graph) -> str:
    """Hash of ops, wiring, constants, shapes, strides, dtypes and devices; independent of names."""
    digest = hashlib.sha256()
    number: dict[fx.Node, int] = {}
    for index, node in enumerate(graph.nodes):
        number[node] = index
        arguments = _freeze((node.args, node.kwargs), lambda ref: f"%{number[ref]}")
        target: Any = ""
        if node.op == "get_attr":
            target = content_key(attribute(graph, node))
        elif node.op not in ("placeholder", "output"):
            target = node.target if isinstance(node.target, str) else _callable_name(node.target)
        kind = "" if node.op == "output" else value_type(node.meta.get("val"))
        digest.update(f"{node.op} {target} {arguments} {kind}\n".encode())
    return digest.hexdigest()[:16]


def attribute(graph: fx.Graph, node: fx.Node) -> Any:
    """What a ``get_attr`` node reads, or ``None`` for a graph without a module."""
    value: Any = graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def content_key(value: Any) -> Hashable:
    """Equal for attributes that are interchangeable: submodules by structure, tensors by content."""
    if isinstance(value, fx.GraphModule):
        return ("graph", fingerprint_graph(value.graph))
    if isinstance(value, torch.Tensor):
        return (value_type(value), value.requires_grad, str(value.detach().cpu().tolist()))
    return (type(value).__name__, id(value))


def _inline_constants(graph: fx.Graph, aliases: Aliases) -> Iterable[fx.Node]:
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        value = attribute(graph, node)
        if not isinstance(value, torch.Tensor):
            if value is not None:
                yield node
        elif is_inline(value) and node not in aliases.written:
            yield node


def is_inline(value: Any) -> bool:
    """Whether an attribute of a graph is a small tensor whose content is known and not trained."""
    return (
        isinstance(value, torch.Tensor)
        and value.numel() <= INLINE_ELEMENTS
        and not _torch.is_fake(value)
        and not isinstance(value, torch.nn.Parameter)
        and not value.requires_grad
    )


def _live_calls(graph: fx.Graph) -> set[fx.Node]:
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if any(user.op == "output" or user in live for user in node.users) or _has_effect(node):
            live.add(node)
    return live


def _has_effect(node: fx.Node) -> bool:
    effect = must_happen(node) or bool(written_inputs(node))
    return effect or not _torch.is_operator(node.target)


def _freeze(value: Any, leaf: Callable[[fx.Node], Hashable]) -> Hashable:
    """A hashable copy of arguments with nodes replaced; ``1``, ``1.0`` and ``True`` stay apart."""
    if isinstance(value, fx.Node):
        return leaf(value)
    if isinstance(value, (tuple, list)):
        return tuple([_freeze(v, leaf) for v in value])
    if isinstance(value, dict):
        return tuple([(str(k), _freeze(v, leaf)) for k, v in value.items()])
    if isinstance(value, slice):
        return ("slice", _freeze((value.start, value.stop, value.step), leaf))
    if value is None or type(value) in (str, int):
        plain: Hashable = value
        return plain
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return value
    return (type(value).__name__, repr(value))


def _size(value: Any) -> Hashable:
    return value if type(value) is int else str(value)


def _callable_name(target: Any) -> str:
    if _torch.is_operator(target):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"
