"""Finding a pattern in a graph: from its first root down, then up to its other roots.

The work for a node is bounded by the pattern and, where it has several roots, by how many calls read what
they have in common. Which nodes are worth a search is known before (``graphopt.rules.reach``).
Where a pattern does not match, what went furthest is told.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.rules.pattern import Call, Capture, Either, Expression, Operator, Pattern, parameters_of

__all__ = ["Found", "Missed", "argument", "match_pattern", "same_literal"]


@dataclass(frozen=True)
class Found:
    """``captures`` by name, ``None`` where no part of the form that matched uses one; the node of each
    of the pattern's ``roots``; all ``nodes``, in no particular order."""

    captures: Mapping[str, Any]
    roots: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]

    @property
    def inner(self) -> frozenset[fx.Node]:
        """Nodes whose values nobody else may read."""
        return self.nodes - frozenset(self.roots)


@dataclass(frozen=True)
class Missed:
    """How many calls ``matched`` on the way that went furthest, and why it ended."""

    matched: int
    reason: Reason


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an operator call by its name in the schema, its default where it is not given.

    Raises ``KeyError`` where the operator has no such argument.
    """
    return _at(node, *parameters_of(node.target)[name])


def _at(node: fx.Node, name: str, index: int, default: Any) -> Any:
    args = node.args
    return args[index] if index < len(args) else node.kwargs.get(name, default)


def match_pattern(pattern: Pattern, node: fx.Node) -> Found | Missed:
    """Match ``pattern`` with its first root at ``node``."""
    search = _Search(pattern)
    for state in search.call(pattern.roots[0], node, _State()):
        for done in search.others(pattern.roots[1:], state):
            roots = tuple(done.calls[root] for root in pattern.roots)
            captures = {name: done.bound.get(name) for name in pattern.captures}
            return Found(captures, roots, frozenset(done.calls.values()))
    return Missed(search.matched, search.reason)


@dataclass(frozen=True)
class _State:
    """What is bound so far."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    calls: Mapping[Call, fx.Node] = field(default_factory=dict)

    def with_call(self, call: Call, node: fx.Node) -> _State:
        return _State(self.bound, {**self.calls, call: node})

    def bound_node(self, part: Expression) -> fx.Node | None:
        value = self.calls.get(part) if isinstance(part, Call) else self._captured(part)
        return value if isinstance(value, fx.Node) else None

    def _captured(self, part: Expression) -> Any:
        return self.bound.get(part.name) if isinstance(part, Capture) else None

    def with_capture(self, name: str, value: Any) -> _State:
        return _State({**self.bound, name: value}, self.calls)


@dataclass
class _Search:
    pattern: Pattern
    matched: int = 0
    reason: Reason = field(default_factory=lambda: Reason("nothing was compared"))

    def miss(self, state: _State, text: str, *nodes: Any) -> None:
        if len(state.calls) >= self.matched:
            self.matched = len(state.calls)
            self.reason = Reason(text, tuple(node.name for node in nodes if isinstance(node, fx.Node)))

    def call(self, call: Call, value: Any, state: _State) -> Iterator[_State]:
        known = state.calls.get(call)
        if known is not None:
            if known is value:
                yield state
            else:
                self.miss(state, f"expected {known.name} again, found {_shown(value)}", value)
            return
        if not isinstance(value, fx.Node) or value.op != "call_function":
            self.miss(state, f"expected {call.operator}, found {_shown(value)}", value)
            return
        if value.target not in call.operator.targets:
            self.miss(state, f"expected {call.operator}, found {value.target}", value)
            return
        begun = state.with_call(call, value)
        plan = self.pattern.given(call, value.target)
        if isinstance(plan, str):
            self.miss(begun, f"{value.target} does not take {plan}", value)
            return
        for name, index, default in plan.unstated:
            if not same_literal(found := _at(value, name, index, default), default):
                self.miss(begun, f"its {name} is {_shown(found)}", value)
                return
        pairs = [(part, _at(value, name, index, default)) for part, name, index, default in plan.stated]
        yield from self.all_of(pairs, 0, begun)
        if call.operator.commutes and len(pairs) > 1:
            (first, left), (second, right) = pairs[:2]
            yield from self.all_of([(first, right), (second, left), *pairs[2:]], 0, begun)

    def all_of(self, pairs: Sequence[tuple[Any, Any]], done: int, state: _State) -> Iterator[_State]:
        """States in which ``pairs`` from the one after ``done`` on match as well."""
        if done == len(pairs):
            yield state
            return
        for reached in self.part(*pairs[done], state):
            yield from self.all_of(pairs, done + 1, reached)

    def part(self, part: Any, value: Any, state: _State) -> Iterator[_State]:
        if part is ...:
            yield state
        elif isinstance(part, Call):
            yield from self.call(part, value, state)
        elif isinstance(part, Either):
            for option in part.options:
                yield from self.part(option, value, state)
        elif isinstance(part, Capture):
            if part.name not in state.bound:
                yield state.with_capture(part.name, value)
            elif same_literal(state.bound[part.name], value):
                yield state
            else:
                before = _shown(state.bound[part.name])
                self.miss(state, f"{part.name} is {before} and {_shown(value)}", value)
        elif isinstance(part, (list, tuple)):
            if isinstance(value, (list, tuple)) and len(value) == len(part):
                yield from self.all_of(list(zip(part, value, strict=True)), 0, state)
            else:
                self.miss(state, f"expected {len(part)} items, found {_shown(value)}", value)
        elif same_literal(part, value):
            yield state
        else:
            self.miss(state, f"expected {part!r}, found {_shown(value)}", value)

    def others(self, roots: Sequence[Call], state: _State) -> Iterator[_State]:
        """States in which every further root is found as well, above what is matched already."""
        if not roots:
            yield state
            return
        root, rest = roots[0], roots[1:]
        if root in state.calls:
            # Another root reads it.
            yield from self.others(rest, state)
            return
        near = _above(state, root)
        if not near:
            self.miss(state, f"nothing reads it by {root.operator}", state.calls[next(iter(state.calls))])
        for node in near:
            for reached in self.call(root, node, state):
                yield from self.others(rest, reached)


def _above(state: _State, root: Call) -> list[fx.Node]:
    """Nodes of ``root``'s operators that what is bound so far leads to.

    Where a form of ``root`` has to read something that is bound, up from what fewest calls read; else up from
    everything near, within the depth of ``root``.
    """
    matched = set(state.calls.values())
    starts = [(state.bound_node(part), path) for part, path in _ways_up(root, ())]
    known = [(node, path) for node, path in starts if node is not None]
    if not known:
        return _near(list(state.calls.values()), root)
    node, path = min(known, key=lambda start: len(start[0].users))
    layer = {node: None}
    for operator in path:
        layer = {user: None for node in layer for user in node.users if user.target in operator.targets}
    return [node for node in layer if node not in matched]


def _ways_up(part: Any, above: tuple[Operator, ...]) -> Iterator[tuple[Expression, tuple[Operator, ...]]]:
    """What a call cannot do without, with the operators that lead up to it, ``above`` it on the right."""
    if isinstance(part, (Call, Capture)):
        yield part, above
    if isinstance(part, Call):
        for child in (*part.args, *part.kwargs.values()):
            yield from _ways_up(child, (part.operator, *above))
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from _ways_up(item, above)


def _near(nodes: Sequence[fx.Node], root: Call) -> list[fx.Node]:
    """Nodes of ``root``'s operators that ``nodes``, or what these read, lead to within its depth."""
    reached: dict[fx.Node, None] = dict.fromkeys(
        itertools.chain(nodes, (source for node in nodes for source in node.all_input_nodes))
    )
    layer = list(reached)
    found: dict[fx.Node, None] = {}
    for _ in range(_depth(root)):
        layer = [user for node in layer for user in node.users if user not in reached or user in found]
        reached.update(dict.fromkeys(layer))
        found.update((node, None) for node in layer if node.target in root.operator.targets)
    return [node for node in found if node not in nodes]


def _depth(part: Any) -> int:
    if isinstance(part, Call):
        return 1 + max(map(_depth, (*part.args, *part.kwargs.values())), default=0)
    return max(map(_depth, part.options)) if isinstance(part, Either) else 0


def same_literal(one: Any, other: Any) -> bool:
    """Whether two arguments are the same node, or literals that are equal, their types too: 1 is not
    ``True``."""
    if isinstance(one, fx.Node) or isinstance(other, fx.Node):
        return one is other
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same_literal, one, other))
    numbers = (int, float)
    if isinstance(one, numbers) and isinstance(other, numbers):
        return isinstance(one, bool) == isinstance(other, bool) and one == other
    return type(one) is type(other) and bool(one == other)


def _shown(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "call_function" else f"{value.op} {value.name}"
    return repr(value)
