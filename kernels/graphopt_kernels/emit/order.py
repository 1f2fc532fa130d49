"""In which order kernels and calls of a half run, and what is alive while they do."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.fx as fx

from graphopt_kernels.emit import views

__all__ = ["Step", "is_free", "live_bytes", "ordered", "peak_bytes", "root", "size"]

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten.contiguous.default, aten.flip.default, aten.lift_fresh_copy.default)


@dataclass(frozen=True)
class Step:
    """What runs at once: a call with the nodes that take its results apart, or a group in one kernel.

    ``reads`` are values from before, views looked through; ``makes`` are values that are there afterwards.
    """

    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    makes: tuple[fx.Node, ...]


def is_free(node: fx.Node) -> bool:
    """Whether a node is a view that is made without moving data."""
    return views.is_view(node.target) and node.target not in _COPIES


def root(node: fx.Node) -> fx.Node:
    """What a view shows; other nodes themselves."""
    while node.op == "call_function" and is_free(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def size(node: fx.Node) -> int:
    """Bytes of what a node gives, all tensors of it; of an expanded tensor those that there are."""
    value = node.meta.get("val")
    leaves = value if isinstance(value, (tuple, list)) else [value]
    total = 0
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            distinct = prod(int(n) for n, s in zip(leaf.shape, leaf.stride(), strict=True) if s)
            total += distinct * leaf.dtype.itemsize
    return total


def call_step(node: fx.Node) -> Step:
    """The step of a call by itself."""
    parts = tuple(user for user in node.users if user.target is operator.getitem)
    reads = tuple(dict.fromkeys(root(source) for source in node.all_input_nodes))
    return Step((node, *parts), reads, parts or (node,))


def ordered(calls: Sequence[fx.Node], groups: Iterable[Step], results: Sequence[fx.Node]) -> list[Step]:
    """Steps in an order in which everything is there when it is read.

    A group runs where the last of its operators did, or earlier where its results are read; other calls
    stay in order. Views are no steps.
    """
    place = {node: number for number, node in enumerate(calls)}
    step_of: dict[fx.Node, Step] = {}
    for group in groups:
        step_of.update(dict.fromkeys((n for n in group.nodes if not is_free(n)), group))
    last = {max((n for n in g.nodes if not is_free(n)), key=place.__getitem__) for g in set(step_of.values())}
    steps: list[Step] = []
    done: set[fx.Node] = set()

    def need(node: fx.Node) -> None:
        # Deep graphs would exhaust the stack of a recursion.
        stack = [root(node)]
        while stack:
            top = stack[-1]
            if top.target is operator.getitem and top not in step_of:
                top = stack[-1] = root(top.all_input_nodes[0])
            if top in done or top.op == "placeholder":
                stack.pop()
                continue
            step = step_of.get(top) or call_step(top)
            waiting = [
                r for r in step.reads if r not in done and r.op != "placeholder" and r not in step.nodes
            ]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            done.update(step.nodes)
            steps.append(step)

    for node in calls:
        if is_free(node) or (node.target is operator.getitem and node not in step_of):
            continue
        if node not in step_of or node in last:
            need(node)
    for node in results:
        need(node)
    return steps


def live_bytes(
    steps: Sequence[Step], owned: Collection[fx.Node], results: Sequence[fx.Node]
) -> list[tuple[int, int]]:
    """(alive before, alive during) of each step: ``owned`` inputs until their last use, what steps make until
    theirs, and ``results`` to the end. What operators take within a call is not counted."""
    kept = {root(node) for node in results}
    last: dict[fx.Node, int] = {}
    for number, step in enumerate(steps):
        for node in (*step.reads, *step.makes):
            last[node] = number
    dying: dict[int, list[fx.Node]] = {}
    for node, number in last.items():
        if node not in kept and (node.op != "placeholder" or node in owned):
            dying.setdefault(number, []).append(node)
    live = sum(size(node) for node in owned)
    found = []
    for number, step in enumerate(steps):
        before = live
        live += sum(size(node) for node in step.makes)
        found.append((before, live))
        live -= sum(size(node) for node in dying.get(number, ()))
    return found


def peak_bytes(steps: Sequence[Step], owned: Collection[fx.Node], results: Sequence[fx.Node]) -> int:
    """The most that is alive at once (``live_bytes``)."""
    return max((during for _, during in live_bytes(steps, owned, results)), default=0)
