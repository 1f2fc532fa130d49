"""From a set of saved storages to a schedule over the nodes of the joint graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch.fx as fx

from graphopt.replay import is_random_state
from graphopt.schedule import Schedule
from graphopt.values import value_table
from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["saved_storages", "to_schedule"]


def to_schedule(model: StepModel, saved: Iterable[int], fleeting: Iterable[int] = ()) -> Schedule:
    """Each recomputed node right before the first backward node that needs it; views with their
    reader. Graph outputs that the backward reads are handed over as they are. A fleeting storage
    that the node does not read itself is made again the next time that it is needed."""
    nodes = {node.name: node for node in model.program.graph.nodes}
    wanted = set(saved) | {b for b, free in enumerate(model.free) if free}
    handed = {model.representative[b] for b in wanted if model.representative[b]}
    forward = set(model.baseline.forward)
    ready = {spec.node for spec in model.program.signature.inputs}
    used: set[str] = set()
    backward: list[str] = []
    passing = set(fleeting) - wanted
    storages = _storages(model) if passing else {}
    makes = dict(zip(model.operators, model.outputs, strict=True))
    holders: dict[int, list[str]] = {}
    for name, found in storages.items():
        for b in found & passing:
            holders.setdefault(b, []).append(name)

    def ensure(root: fx.Node) -> None:
        stack = [root]
        while stack:
            node = stack[-1]
            if node.name in ready:
                stack.pop()
                continue
            if node.name in handed:
                used.add(node.name)
                ready.add(node.name)
                stack.pop()
                continue
            missing = [source for source in node.all_input_nodes if source.name not in ready]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            backward.append(node.name)
            ready.add(node.name)
            for user in node.users:
                # A tuple is held as long as any element is still to be taken: take them all now.
                if (
                    user.target is operator.getitem
                    and user.name in forward
                    and user.name not in handed
                    and user.users
                ) and user.name not in ready and _is_read(user, node):
                    backward.append(user.name)
                    ready.add(user.name)

    for name in model.baseline.backward:
        if name in model.views:
            # A view comes with its first reader: made earlier it would hold its storage longer.
            continue
        begin = len(backward)
        for source in nodes[name].all_input_nodes:
            ensure(source)
        if passing:
            read = {b for source in nodes[name].all_input_nodes for b in storages.get(source.name, ())}
            made = {b for step in backward[begin:] for b in makes.get(step, ())}
            for b in (made & passing) - read:
                ready.difference_update(holders[b])
        if name not in ready:
            backward.append(name)
            ready.add(name)
            for user in nodes[name].users:
                # The elements of a tuple, on the other hand, come at once: until all of them are
                # taken the tuple holds every one.
                if user.target is operator.getitem and user.name in model.views:
                    backward.append(user.name)
                    ready.add(user.name)
    for spec in model.program.signature.outputs:
        if spec.role == "gradient":
            ensure(nodes[spec.node])
    order = tuple(name for name in model.baseline.forward if name in used)
    made_once = tuple(
        name for name in model.baseline.forward if name in used or not is_random_state(nodes[name])
    )
    return Schedule(made_once, order, tuple(backward))


def _storages(model: StepModel) -> dict[str, set[int]]:
    """The model's storages behind each node: those that it makes, views or picks out of a tuple."""
    table = value_table(model.program.graph)
    found: dict[str, list[int | None]] = {}
    numbers = dict(zip(model.operators, model.outputs, strict=True))
    for name, leaves in table.items():
        own = iter(numbers.get(name, ()))
        behind: list[int | None] = []
        for leaf in leaves:
            if leaf.alias is None:
                behind.append(next(own, None))
            else:
                source, index = leaf.alias
                behind.append((behind if source == name else found[source])[index])
        found[name] = behind
    return {name: {b for b in behind if b is not None} for name, behind in found.items()}


def _is_read(element: fx.Node, value: fx.Node) -> bool:
    return element.args[0] is value


def saved_storages(model: StepModel, names: Iterable[str]) -> frozenset[int]:
    """Storages behind the named nodes (a partition made by someone else, a stored schedule)."""
    owner = {name: b for b, name in enumerate(model.representative) if name}
    nodes = {node.name: node for node in model.program.graph.nodes}
    found: set[int] = set()
    for name in names:
        node = nodes[name]
        while node.name not in owner and node.op == "call_function" and node.all_input_nodes:
            node = node.all_input_nodes[0]
        if node.name in owner:
            found.add(owner[node.name])
    return frozenset(found)
