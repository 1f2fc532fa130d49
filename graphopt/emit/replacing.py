"""Groups of operators of a lowered graph that run as one call, in place of a code generator's kernels.

A plugin proposes groups, each with the call and why it is kept or not (``ReplacementSpec``); what is kept is
put into a copy of the graph here::

    a = exp(x); b = sum(a, -1); c = a / b      ->     (c,) = graphopt.emitted_kernel("exp_sum_div_1f00", [x])

Values keep their names, and nothing passes an operator whose effect it feels. A proposal that cannot be
followed is left out with the reason.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from graphopt.cost import CostModel
from graphopt.errors import brief
from graphopt.group_record import GroupRecord
from graphopt.order import felt, has_effect
from graphopt.plugins.loading import GUARDED
from graphopt.rewrites import kernels_id

if TYPE_CHECKING:
    from graphopt.plugins.host import PluginHost

__all__ = ["Group", "Replacing", "proposed", "replaced"]


@dataclass(frozen=True)
class Group:
    """What a plugin proposes. ``outputs`` are those of ``nodes`` that others read, in the order in which the
    call of ``target`` with ``args`` gives them."""

    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    target: Any
    args: tuple[Any, ...]
    record: GroupRecord


Replacing = Callable[[fx.GraphModule], tuple[fx.GraphModule, list[GroupRecord]]]
"""What a code generator asks before it compiles a graph."""


def proposed(
    gm: fx.GraphModule, host: PluginHost, cost: CostModel, only: Set[str] | None = None
) -> tuple[fx.GraphModule, list[GroupRecord]]:
    """``gm`` with the kernels of all plugins for groups of its operators, and what is to be said of them.

    A plugin that fails is left out, with the reason as a record; so is one that ``only`` (names of rewrites)
    leaves out. Raises ``PluginError`` for one that fails where the host is strict.
    """
    records: list[GroupRecord] = []
    for spec in host.replacements().values():
        if only is not None and kernels_id(spec.name) not in only:
            continue
        try:
            with host.using("graphopt_replacements", spec.name):
                gm, found = replaced(gm, spec.propose(gm, cost))
        except GUARDED as error:  # whatever a plugin raises: the graph is compiled as it is
            host.blame("graphopt_replacements", spec.name, error)
            why = f"{spec.name} failed: {brief(error)}"
            found = [GroupRecord(spec.name, (), (), False, why, 0.0, 0.0)]
        records += found
    return gm, records


def replaced(gm: fx.GraphModule, groups: Sequence[Group]) -> tuple[fx.GraphModule, list[GroupRecord]]:
    """``gm``, or a copy in which the groups that are kept are calls, and the records of all."""
    kept: list[Group] = []
    records = []
    for group in groups:
        record = group.record
        if record.kept:
            if _order(gm.graph, [*kept, group]) is None:
                record = replace(record, kept=False, reason="other operators have to run in between")
            else:
                kept.append(group)
        records.append(record)
    if not kept:
        return gm, records
    order = _order(gm.graph, kept)
    assert order is not None
    made = fx.GraphModule(gm, _rebuilt(order))
    made.meta.update(gm.meta)
    return made, records


def _order(graph: fx.Graph, groups: Sequence[Group]) -> list[fx.Node | Group] | None:
    """Nodes and groups in an order in which everything is there when it is read, else as they were; ``None``
    where there is none, or a node would pass an operator whose effect it feels."""
    before = list(graph.nodes)
    place = {node: number for number, node in enumerate(before)}
    of = {node: group for group in groups for node in group.nodes}
    units: dict[int, fx.Node | Group] = {}
    for node in before:
        group = of.get(node)
        units[place[node] if group is None else max(place[n] for n in group.nodes)] = group or node
    number = {id(unit): at for at, unit in units.items()}
    waiting: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    for at, unit in units.items():
        nodes = unit.nodes if isinstance(unit, Group) else (unit,)
        sources = {number[id(of.get(s, s))] for n in nodes for s in n.all_input_nodes} - {at}
        waiting[at] = len(sources)
        for source in sources:
            readers.setdefault(source, []).append(at)
    ready = [at for at, count in waiting.items() if not count]
    heapq.heapify(ready)
    order: list[fx.Node | Group] = []
    while ready:
        at = heapq.heappop(ready)
        order.append(units[at])
        for reader in readers.get(at, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(units):
        return None
    flat = [n for unit in order for n in (unit.nodes if isinstance(unit, Group) else (unit,))]
    position = {node: at for at, node in enumerate(flat)}
    if any(has_effect(node) for node in of) or felt(graph, place, position) is not None:
        return None
    return order


def _rebuilt(order: Sequence[fx.Node | Group]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for unit in order:
        if not isinstance(unit, Group):
            copies[unit] = graph.node_copy(unit, copies.__getitem__)
            continue
        args = fx.node.map_arg(unit.args, copies.__getitem__)
        call = graph.create_node("call_function", unit.target, args, name=unit.record.kernel)
        call.meta = {"val": [node.meta["val"] for node in unit.outputs]}
        for number, node in enumerate(unit.outputs):
            # The name of a value is what the rest of graphopt knows it by.
            made = graph.create_node("call_function", operator.getitem, (call, number), name=node.name)
            made.meta = dict(node.meta)
            copies[node] = made
    return graph
