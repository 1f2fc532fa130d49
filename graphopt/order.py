"""Order and effects: what may be moved, what may be removed, and the least change that sorts a graph."""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import alias_map, written_inputs
from graphopt.capture.ambient import is_state_call
from graphopt.collectives import is_collective
from graphopt.errors import VerificationError
from graphopt.replay import is_random

__all__ = ["felt", "has_effect", "must_happen", "restore_order"]

_PURE_MODULES = ("_operator", operator.__name__, math.__name__)


def must_happen(node: fx.Node) -> bool:
    """Whether torch knows of an effect of a node, a collective's and random draws among them."""
    return node.is_impure(impure_random=False) or is_random(node) or is_collective(node.target)


def has_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads it: it writes, draws random numbers, switches a
    mode, takes part in a collective, or calls what nothing is known of."""
    if node.op == "get_attr":
        return False
    if node.op != "call_function" or must_happen(node) or is_state_call(node) or written_inputs(node):
        return True
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    pure = target.__module__ in _PURE_MODULES if hasattr(target, "__module__") else False
    return not (pure or _torch.is_operator(target) or _torch.is_symbolic_function(target))


def restore_order(graph: fx.Graph) -> None:
    """Move nodes that are used too early as little as it takes: each goes right behind the last of its
    inputs, all others keep their order. Where such a node has an effect (a switch of mode, a write to
    memory, a random draw), what feels it goes behind it as well.

    Raises ``VerificationError`` for a cycle, and where a node would have to pass one whose effect it
    feels.
    """
    before = list(graph.nodes)
    place = {node: i for i, node in enumerate(before)}
    for node in before:
        gone = next((source for source in node.all_input_nodes if source not in place), None)
        if gone is not None:
            raise VerificationError(
                f"node {node.name!r} reads {gone.name!r}, which was erased: rule 'erased'"
            )
    if all(place[source] < place[node] for node in before for source in node.all_input_nodes):
        return
    behind: dict[fx.Node, set[fx.Node]] = {node: set(node.users) for node in before}
    after = _sorted(before, behind)
    if len(after) < len(before):
        sorted_ones = set(after)
        stuck = ", ".join(repr(node.name) for node in before if node not in sorted_ones)
        raise VerificationError(f"nodes read each other in a circle: {stuck}: rule 'order'")
    _arrange(graph, after)
    pair = felt(graph, place, {node: i for i, node in enumerate(after)})
    if pair is None:
        return
    roots = alias_map(graph).roots
    for effect in _effects(before):
        for node in before:
            if node is not effect and _feels(node, effect, roots):
                first, second = (node, effect) if place[node] < place[effect] else (effect, node)
                behind[first].add(second)
    after = _sorted(before, behind)
    if len(after) < len(before):
        raise VerificationError(
            f"node {pair[0].name!r} would have to move past {pair[1].name!r}, whose effect it feels: "
            "rule 'order'"
        )
    _arrange(graph, after)


def _sorted(before: Sequence[fx.Node], behind: Mapping[fx.Node, Set[fx.Node]]) -> list[fx.Node]:
    """The nodes in their order, but for those that have to come ``behind`` others; without those that wait
    for each other."""
    place = {node: i for i, node in enumerate(before)}
    missing = dict.fromkeys(before, 0)
    for node in itertools.chain.from_iterable(behind.values()):
        missing[node] += 1
    ready = [place[node] for node in before if not missing[node]]
    heapq.heapify(ready)
    after: list[fx.Node] = []
    while ready:
        node = before[heapq.heappop(ready)]
        after.append(node)
        for later in behind[node]:
            missing[later] -= 1
            if not missing[later]:
                heapq.heappush(ready, place[later])
    return after


def _arrange(graph: fx.Graph, order: Sequence[fx.Node]) -> None:
    first = next(iter(graph.nodes))
    if order[0] is not first:
        first.prepend(order[0])
    for left, right in itertools.pairwise(order):
        left.append(right)


def _effects(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    calls = ("call_function", "call_method", "call_module")
    return (node for node in nodes if node.op in calls and has_effect(node))


def felt(
    graph: fx.Graph, before: Mapping[fx.Node, int], after: Mapping[fx.Node, int]
) -> tuple[fx.Node, fx.Node] | None:
    """A node, and one whose effect it feels, that change places from ``before`` to ``after``, if any do."""
    roots = alias_map(graph).roots
    for effect in _effects(after):
        for node in after:
            swapped = (before[node] < before[effect]) != (after[node] < after[effect])
            if swapped and node is not effect and _feels(node, effect, roots):
                return node, effect
    return None


def _feels(node: fx.Node, effect: fx.Node, roots: dict[fx.Node, frozenset[fx.Node]]) -> bool:
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if is_state_call(effect):
        return True
    written = {root for ref in written_inputs(effect) for root in roots[ref]}
    if written & {root for ref in (node, *node.all_input_nodes) for root in roots[ref]}:
        return True
    if not has_effect(node):
        return False
    # Two writes to different memory may swap; draws of random numbers may not.
    return not (written and written_inputs(node)) or (is_random(node) and is_random(effect))
