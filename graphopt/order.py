"""Order and effects: what may be moved, what may be removed, and the least change that sorts a graph."""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Mapping

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
    inputs, all others keep their order.

    Raises ``VerificationError`` for a cycle, and where a node would have to pass one whose effect it
    feels: a switch of mode, a write to memory that it reads, another random draw.
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
    missing = {node: len(node.all_input_nodes) for node in before}
    ready = [place[node] for node in before if not missing[node]]
    heapq.heapify(ready)
    after: list[fx.Node] = []
    while ready:
        node = before[heapq.heappop(ready)]
        after.append(node)
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, place[user])
    if len(after) < len(before):
        stuck = ", ".join(repr(node.name) for node in before if missing[node])
        raise VerificationError(f"nodes read each other in a circle: {stuck}: rule 'order'")
    if after[0] is not before[0]:
        before[0].prepend(after[0])
    for left, right in itertools.pairwise(after):
        left.append(right)
    pair = felt(graph, place, {node: i for i, node in enumerate(graph.nodes)})
    if pair is not None:
        raise VerificationError(
            f"node {pair[0].name!r} would have to move past {pair[1].name!r}, whose effect it feels: "
            "rule 'order'"
        )


def felt(
    graph: fx.Graph, before: Mapping[fx.Node, int], after: Mapping[fx.Node, int]
) -> tuple[fx.Node, fx.Node] | None:
    """A node, and one whose effect it feels, that change places from ``before`` to ``after``, if any do."""
    roots = alias_map(graph).roots
    for effect in after:
        if effect.op not in ("call_function", "call_method", "call_module") or not has_effect(effect):
            continue
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
