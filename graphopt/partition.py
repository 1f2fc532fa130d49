"""Realise a schedule: split a joint program into forward and backward graphs in stated order.

What is handed over comes from AOTAutograd's own extraction, so its runtime finds symbols, opaque
values and random offsets where it expects them; the order within each half, and what runs again,
comes from the schedule alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.errors import PassError
from graphopt.order import must_happen
from graphopt.program import Program
from graphopt.replay import run_plainly, statistics_of
from graphopt.schedule import Schedule

__all__ = ["ordered", "partition", "schedule_of"]


def partition(program: Program, schedule: Schedule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward modules of a joint program under ``schedule``.

    Raises ``PassError`` if the schedule names a value that the program does not have.
    """
    by_name = {node.name: node for node in program.graph.nodes}
    missing = [
        name for name in (*schedule.forward, *schedule.saved, *schedule.backward) if name not in by_name
    ]
    if missing:
        raise PassError(f"the schedule of {program.name} names values that the program lacks: {missing[:3]}")
    saved = [by_name[name] for name in schedule.saved]
    primals = [
        by_name[spec.node] for spec in program.signature.inputs if spec.role not in ("tangent", "symbol")
    ]
    symbols = [node for node in saved if not _is_tensor(node)]
    symbols += [by_name[spec.node] for spec in program.signature.by_role("symbol")]
    first_run = set(schedule.forward)
    for node in (by_name[name] for name in schedule.backward if name in first_run):
        for statistics in statistics_of(node):
            _torch.ignore_version(statistics)
    num_outputs = sum(spec.role in ("output", "mutation") for spec in program.signature.outputs)
    handed = [*primals, *(node for node in saved if _is_tensor(node))]
    elsewhere = first_run.difference(schedule.backward)
    while True:
        forward, backward = _torch.extract_halves(program.gm, [*handed], [*symbols], num_outputs)
        backward.graph = ordered(backward.graph, schedule.backward, elsewhere)
        given = backward.graph.find_nodes(op="placeholder")
        unread = {node.name for node in given if not node.users}.intersection(node.name for node in handed)
        if not unread:
            break
        # Effects of the forward alone were taken to be the backward's too, and with them what they read:
        # held for nothing, and refused by autograd where the forward writes it, as running statistics.
        handed = [node for node in handed if node.name not in unread]
    for node in forward.graph.nodes:
        run_plainly(node)
    forward.graph = ordered(forward.graph, schedule.forward)
    for half in (forward, backward):
        half.graph.lint()
        half.recompile()
    return forward, backward


def ordered(graph: fx.Graph, order: Iterable[str], elsewhere: Set[str] = frozenset()) -> fx.Graph:
    """A copy of ``graph`` that executes the nodes named by ``order`` in that order.

    Names that the graph lacks (dead here) are passed over; a name that occurs again is computed
    again. Nodes that the order forgets, such as size arithmetic, go right before their first
    reader. Effects of those named by ``elsewhere`` happen in another graph, and not here too: what
    AOTAutograd extracts for the backward still has each attention of the forward, as attentions may
    draw random numbers, whether or not something reads it.
    """
    source = {node.name: node for node in graph.nodes}
    copy = fx.Graph()
    latest: dict[fx.Node, fx.Node] = {}

    def emit(node: fx.Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            wanting = [arg for arg in top.all_input_nodes if arg not in latest]
            if wanting:
                stack.extend(reversed(wanting))
                continue
            stack.pop()
            if top is node or top not in latest:
                latest[top] = copy.node_copy(top, lambda n: latest[n])

    for node in graph.nodes:
        if node.op == "placeholder":
            emit(node)
    for name in order:
        if (found := source.get(name)) is not None and found.op != "placeholder":
            emit(found)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    for node in graph.nodes:
        # Effects (assertions, in-place copies) that no schedule lists still have to happen.
        unlisted = node.op == "call_function" and node not in latest and node.name not in elsewhere
        if unlisted and must_happen(node):
            emit(node)
    emit(output)
    return copy


def schedule_of(program: Program, forward: fx.GraphModule, backward: fx.GraphModule) -> Schedule:
    """The schedule that a partition made by someone else amounts to."""
    names = {node.name for node in program.graph.nodes}
    primals = {spec.node for spec in program.signature.inputs}

    def calls(half: fx.GraphModule) -> tuple[str, ...]:
        return tuple(
            n.name for n in half.graph.nodes if n.op not in ("placeholder", "output") and n.name in names
        )

    saved = tuple(
        node.name
        for node in backward.graph.nodes
        if node.op == "placeholder" and node.name in names and node.name not in primals
    )
    return Schedule(calls(forward), saved, calls(backward))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
