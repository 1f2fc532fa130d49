"""How far patterns may go at each node of a graph, for all of a pass's patterns in one walk.

Searching with every pattern at every node takes time in nodes times patterns. Here a node is given a
*state*, made of its operator, its literals and the states of what it reads: for each call in any pattern,
how many calls a search from this node can bind. Nodes that look the same as deep as patterns go have one
state, worked out once; parts that patterns have in common are compared once. Another node of the same look
costs a look-up, however many patterns there are.

A state knows nothing of which values are the same, so it may promise too much and never too little: where
it says that a pattern cannot match or bind more than so many calls, ``match_pattern`` would not either.
The idea is that of bottom-up tree automata (Hoffmann and O'Donnell, Pattern Matching in Trees, JACM 1982).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from graphopt.rules.matching import argument, same_literal
from graphopt.rules.pattern import Call, Capture, Either, Given, Operator, Pattern, given_to, parameters_of

__all__ = ["Reach", "Reaches", "State"]


class Reach(NamedTuple):
    """``most``: calls that a search binds at most before it ends, either way. ``whole``: at most as many in a
    form that may match, -1 where none may."""

    most: int
    whole: int

    @property
    def may_match(self) -> bool:
        return self.whole >= 0


_NOTHING, _ANYTHING, _ITSELF = Reach(0, -1), Reach(0, 0), Reach(1, -1)


@dataclass(frozen=True, eq=False)
class _Shape:
    """Calls of any pattern that compare the same, which values are captured aside. Arguments are shapes,
    ``either``s or lists of arguments, literals, or ``...`` for anything.

    ``inner``: shapes that arguments may have. Where it cannot do without one (``deep``) and no argument has
    the operator of any, nothing but the call itself is bound.
    """

    operator: Operator
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inner: frozenset[_Shape]
    deep: bool


@dataclass(frozen=True, eq=False)
class State:
    """What is known of a node: ``reach`` of the shapes with its ``target``; those left out bind no more than
    the call itself."""

    target: Any
    reach: Mapping[_Shape, Reach] = field(default_factory=dict)

    def of(self, shape: _Shape) -> Reach:
        if self.target not in shape.operator.targets:
            return _NOTHING
        return self.reach.get(shape, _ITSELF)


_LEAF = State(None)
"""Of a node that no pattern calls."""


class Reaches:
    """``patterns`` together: how far each may go from its first root."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._shapes: dict[Hashable, _Shape] = {}
        # Patterns hold calls in common, unfolded they are far larger. By identity, as equality unfolds them.
        self._known: dict[int, _Shape] = {}
        self.roots = tuple(self._shape(pattern.roots[0]) for pattern in patterns)
        self._known.clear()
        self._rooted: dict[Any, list[int]] = {}
        for k, root in enumerate(self.roots):
            for target in root.operator.targets:
                self._rooted.setdefault(target, []).append(k)
        self._numbers: dict[Any, int] = {}
        # By target and by the operator of an argument; shapes that can do without such ones under None.
        self._above: dict[tuple[Any, Any], list[_Shape]] = {}
        for shape in self._shapes.values():
            for target in shape.operator.targets:
                self._numbers.setdefault(target, len(self._numbers))
                for inner in shape.inner if shape.deep else (None,):
                    for below in inner.operator.targets if inner is not None else (None,):
                        self._above.setdefault((target, below), []).append(shape)
        # States of nodes by how they look, and by what they come to.
        self._seen: dict[Hashable, State] = {}
        self._states: dict[Hashable, State] = {}
        self._given: dict[tuple[_Shape, Any], Given | str] = {}
        self.worked_out = 0
        """Shapes that were compared with a node's arguments so far."""

    def walk(self, graph: fx.Graph) -> Iterator[tuple[fx.Node, State]]:
        """Nodes whose operator some pattern calls, in order, with their states."""
        states: dict[fx.Node, State] = {}
        for node in graph.nodes:
            number = self._numbers.get(node.target) if node.op == "call_function" else None
            if number is not None:
                look = _look_of(number, node, states)
                state = self._seen.get(look)
                if state is None:
                    state = self._seen[look] = self._work_out(node, states)
                states[node] = state
                yield node, state

    def ends_at(self, state: State) -> Iterator[tuple[int, Reach]]:
        """Numbers of the patterns whose first root has the operator of such a node, and how far each goes."""
        return ((k, state.of(self.roots[k])) for k in self._rooted.get(state.target, ()))

    def _work_out(self, node: fx.Node, states: Mapping[fx.Node, State]) -> State:
        target = node.target
        below = {states[read].target for read in node.all_input_nodes if read in states}
        shapes = dict.fromkeys(
            shape for under in (None, *below) for shape in self._above.get((target, under), ())
        )
        values = [argument(node, name) for name in parameters_of(target)]
        reach = {shape: self._call(shape, target, values, states) for shape in shapes}
        reach = {shape: found for shape, found in reach.items() if found != _ITSELF}
        key = (target, frozenset(reach.items()))
        return self._states.setdefault(key, State(target, reach))

    def _call(
        self, shape: _Shape, target: Any, values: Sequence[Any], states: Mapping[fx.Node, State]
    ) -> Reach:
        self.worked_out += 1
        if (shape, target) not in self._given:
            self._given[shape, target] = given_to(target, shape.args, shape.kwargs)
        given = self._given[shape, target]
        if isinstance(given, str):
            return _ITSELF
        if not all(same_literal(values[index], default) for _, index, default in given.unstated):
            return _ITSELF
        parts = [(part, values[index]) for part, _, index, _ in given.stated]
        found = _all_of(parts, states)
        if shape.operator.commutes and len(parts) > 1:
            (first, left), (second, right) = parts[:2]
            swapped = _all_of([(first, right), (second, left), *parts[2:]], states)
            found = Reach(max(found.most, swapped.most), max(found.whole, swapped.whole))
        return Reach(1 + found.most, 1 + found.whole if found.may_match else -1)

    def _shape(self, call: Call) -> _Shape:
        if id(call) not in self._known:
            self._known[id(call)] = self._new_shape(call)
        return self._known[id(call)]

    def _new_shape(self, call: Call) -> _Shape:
        args = tuple(map(self._part, call.args))
        kwargs = {name: self._part(part) for name, part in call.kwargs.items()}
        below = (*args, *kwargs.values())
        named = tuple((name, _part_key(part)) for name, part in kwargs.items())
        key = (call.operator, _part_key(args), named)
        if key not in self._shapes:
            inner = frozenset(shape for part in below for shape in _within(part))
            self._shapes[key] = _Shape(call.operator, args, kwargs, inner, any(map(_needs_a_call, below)))
        return self._shapes[key]

    def _part(self, part: Any) -> Any:
        """A part of a pattern in which each call is its shape and each capture is anything."""
        if isinstance(part, Call):
            return self._shape(part)
        if isinstance(part, Capture):
            return ...
        if isinstance(part, Either):
            return Either(tuple(map(self._part, part.options)))
        return [self._part(item) for item in part] if isinstance(part, (list, tuple)) else part


def _all_of(parts: Iterable[tuple[Any, Any]], states: Mapping[fx.Node, State]) -> Reach:
    """Parts of a pattern beside values, in the order in which a search compares them: up to the first that
    cannot match."""
    most = whole = 0
    for part, value in parts:
        found = _reach(part, value, states)
        most = max(most, whole + found.most)
        if not found.may_match:
            return Reach(most, -1)
        whole += found.whole
    return Reach(max(most, whole), whole)


def _reach(part: Any, value: Any, states: Mapping[fx.Node, State]) -> Reach:
    if part is ...:
        return _ANYTHING
    if isinstance(part, _Shape):
        return states.get(value, _LEAF).of(part) if isinstance(value, fx.Node) else _NOTHING
    if isinstance(part, Either):
        found = [_reach(option, value, states) for option in part.options]
        return Reach(max(reach.most for reach in found), max(reach.whole for reach in found))
    if isinstance(part, list):
        if not isinstance(value, (list, tuple)) or len(value) != len(part):
            return _NOTHING
        return _all_of(zip(part, value, strict=True), states)
    return _ANYTHING if same_literal(part, value) else _NOTHING


def _within(part: Any) -> Iterator[_Shape]:
    """Shapes that a value in this place, or in a list in this place, may have."""
    if isinstance(part, _Shape):
        yield part
    elif isinstance(part, (list, Either)):
        for item in part.options if isinstance(part, Either) else part:
            yield from _within(item)


def _needs_a_call(part: Any) -> bool:
    if isinstance(part, Either):
        return all(map(_needs_a_call, part.options))
    return isinstance(part, _Shape) or (isinstance(part, list) and any(map(_needs_a_call, part)))


def _part_key(part: Any) -> Hashable:
    if isinstance(part, (list, tuple)):
        return ("list", *map(_part_key, part))
    if isinstance(part, Either):
        return ("either", *map(_part_key, part.options))
    return part if part is ... or isinstance(part, _Shape) else _literal_key(part)


def _look_of(number: int, node: fx.Node, states: Mapping[fx.Node, State]) -> Hashable:
    """Equal for calls, of the operator of that ``number``, that no pattern can tell apart."""
    look: list[Any] = [number]
    value: Any
    for value in node.args:
        kind = type(value)
        if kind is fx.Node:
            look.append(states.get(value, _LEAF))
        elif kind in _PLAIN:
            look.append(kind)
            look.append(value)
        else:
            look.append(_look(value, states))
    if node.kwargs:
        look.append(_look(node.kwargs, states))
    return tuple(look)


def _look(value: Any, states: Mapping[fx.Node, State]) -> Hashable:
    if isinstance(value, fx.Node):
        return states.get(value, _LEAF)
    if isinstance(value, (list, tuple)):
        return ("list", *[_look(item, states) for item in value])
    if isinstance(value, dict):
        return ("dict", *[(name, _look(item, states)) for name, item in value.items()])
    return _literal_key(value)


_PLAIN = frozenset({
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
})  # fmt: skip


def _literal_key(value: Any) -> Hashable:
    """Equal for literals that are the same to a pattern; others are equal to themselves alone, which lasts as
    long as the graph that holds them."""
    kind = type(value)
    return (kind, value) if kind in _PLAIN else (kind, id(value))
