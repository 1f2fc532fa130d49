"""From a set of saved storages to a schedule over the nodes of the joint graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from graphopt.replay import is_random_state
from graphopt.schedule import Schedule
from graphopt.values import value_table
from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["Realiser", "saved_storages", "to_schedule"]


def to_schedule(model: StepModel, saved: Iterable[int], released: Iterable[tuple[int, int]] = ()) -> Schedule:
    """The schedule of one choice; see ``Realiser``, which is faster for many."""
    return Realiser(model)(saved, released)


class Realiser:
    """Turns choices on one model into schedules.

    Recomputed nodes run right before the first backward node that needs them; views come with
    their reader. Graph outputs that the backward reads are handed over as they are. A storage released
    after a slot is made again the next time that it is needed.
    """

    def __init__(self, model: StepModel) -> None:
        self._model = model
        nodes = model.program.graph.nodes
        self._inputs = {spec.node for spec in model.program.signature.inputs}
        self._gradients = [s.node for s in model.program.signature.outputs if s.role == "gradient"]
        self._held = {b for b, free in enumerate(model.free) if free}
        forward = set(model.baseline.forward)
        self._states = {node.name for node in nodes if node.name in forward and is_random_state(node)}
        # The elements of a tuple come at once: until all of them are taken the tuple holds every one.
        self._elements: dict[str, list[str]] = {}
        for node in nodes:
            taken = node.name in model.views or (node.name in forward and node.users)
            if node.target is operator.getitem and taken:
                self._elements.setdefault(node.args[0].name, []).append(node.name)
        self._makes = dict(zip(model.operators, model.outputs, strict=True))
        self._storages = _storages(model)
        # What runs again does so in the order of the forward: read in the order of the arguments, what
        # the last of them needs would be made while all before it wait.
        first = {name: min(found, default=-1) for name, found in self._storages.items()}
        self._sources = {
            node.name: tuple(sorted((n.name for n in node.all_input_nodes), key=lambda n: first.get(n, -1)))
            for node in nodes
        }
        self._holders: dict[int, list[str]] = {}
        for name, found in self._storages.items():
            for b in found:
                self._holders.setdefault(b, []).append(name)

    def __call__(self, saved: Iterable[int], released: Iterable[tuple[int, int]] = ()) -> Schedule:
        model, sources, elements = self._model, self._sources, self._elements
        wanted = set(saved) | self._held
        handed = {model.representative[b] for b in wanted if model.representative[b]}
        leaving: dict[str, set[int]] = {}
        for b, slot in released:
            if b not in wanted:
                leaving.setdefault(model.slots[slot].node, set()).add(b)
        ready = set(self._inputs)
        used: set[str] = set()
        backward: list[str] = []

        def run(name: str) -> None:
            backward.append(name)
            ready.add(name)
            for element in elements.get(name, ()):
                if element not in ready and element not in handed:
                    backward.append(element)
                    ready.add(element)

        def ensure(root: str) -> None:
            stack = [root]
            while stack:
                name = stack[-1]
                if name in ready:
                    stack.pop()
                elif name in handed:
                    used.add(name)
                    ready.add(name)
                    stack.pop()
                elif missing := [source for source in sources[name] if source not in ready]:
                    stack.extend(reversed(missing))
                else:
                    stack.pop()
                    run(name)

        for name in model.baseline.backward:
            if name in model.views:
                # A view comes with its first reader: made earlier it would hold its storage longer.
                continue
            begin = len(backward)
            for source in sources[name]:
                if source not in ready:
                    ensure(source)
            if name not in ready:
                run(name)
            if name in leaving:
                steps = backward[begin:]
                met = {b for step in steps for b in self._makes.get(step, ())}
                met.update(
                    b for step in steps for source in sources[step] for b in self._storages.get(source, ())
                )
                for b in leaving[name] & met:
                    ready.difference_update(self._holders[b])
        for name in self._gradients:
            ensure(name)
        order = tuple(name for name in model.baseline.forward if name in used)
        unused = self._states - used
        made_once = tuple(name for name in model.baseline.forward if name not in unused)
        return Schedule(made_once, order, tuple(backward))


def _storages(model: StepModel) -> dict[str, set[int]]:
    """The model's storages behind each node: those that it makes, views or picks out of a tuple."""
    found: dict[str, list[int | None]] = {}
    numbers = dict(zip(model.operators, model.outputs, strict=True))
    for name, leaves in value_table(model.program.graph).items():
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
