"""Rules, and the pass that offers what they find."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.structure import Line, line_of
from graphopt.edit import Edit
from graphopt.errors import PassError, RuleError, brief
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins.loading import GUARDED
from graphopt.program import Program
from graphopt.rules.matching import Found, Missed, match_pattern
from graphopt.rules.pattern import Pattern
from graphopt.rules.reach import Reach, Reaches, State

__all__ = ["Match", "RewritePass", "Rule"]

_CONTEXT = ("match", "options", "program", "ctx")
"""What a guard may ask for beside the pattern's captures."""


@dataclass(frozen=True)
class Rule:
    """``pattern``, as in ``graphopt.rules.pattern``, is replaced by what ``replacement`` computes.

    Both are plain functions; arguments are bound by name. ``replacement`` is called with an
    ``fx.Proxy`` for each capture that is a value and with literals as they are, calls operator
    overloads and returns as many values as the pattern. ``guard`` returns ``None``, or the ``Reason`` why
    not; beside captures (``fx.Node`` or literal) it may take ``match`` (``Match``), ``options`` (the pass),
    ``program`` and ``ctx`` (``PassContext``). ``near``: calls that have to match for a near miss to be worth
    telling; half of the pattern where it is 0. ``exactness`` as for ``Candidate``.

    Raises ``RuleError`` where the three do not fit together.
    """

    name: str
    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    guard: Callable[..., Reason | None] | None = None
    exactness: str = "exact"
    near: int = 0

    def __post_init__(self) -> None:
        known = self.form.captures
        _check_names(self, "replacement", self.replacement, known)
        if self.guard is not None:
            _check_names(self, "guard", self.guard, (*known, *_CONTEXT))

    @cached_property
    def form(self) -> Pattern:
        return Pattern.of(self.pattern)

    @cached_property
    def where(self) -> str:
        """``file:line`` of the pattern."""
        code = inspect.unwrap(self.pattern).__code__
        return f"{code.co_filename}:{code.co_firstlineno}"

    @property
    def worth_telling(self) -> int:
        return self.near or (self.form.size + 1) // 2


@dataclass(frozen=True)
class Match:
    """A place where a rule applies. ``captures`` by name: nodes, literals, or ``None`` where the form that
    matched has none. ``nodes`` are in the order of the program, whose ``line`` tells what shares memory."""

    rule: Rule
    captures: Mapping[str, Any]
    roots: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    line: Line

    @property
    def inner(self) -> tuple[fx.Node, ...]:
        """Nodes whose values go."""
        return tuple(node for node in self.nodes if node not in self.roots)


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass made of rules. Larger patterns go first where several match at a node.

    Beside the rules' own guards it refuses a match of which another call reads a value in between, that
    reaches over a write to what it reads, or over a change of autocast or of the gradient mode, and in
    training one whose result is written in place.
    """

    rules: ClassVar[Sequence[Rule]] = ()

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        line: Line | None = None
        for node, rules in _anchored(program, self.rules):
            nearest: NearMiss | None = None
            for rule, reach in rules:
                if not reach.may_match and nearest is not None and reach.most <= nearest.matched:
                    continue
                found = match_pattern(rule.form, node)
                if isinstance(found, Missed):
                    if found.matched >= rule.worth_telling and (
                        nearest is None or found.matched > nearest.matched
                    ):
                        nearest = NearMiss(
                            rule.name, node.name, found.matched, rule.form.size, found.reason
                        )
                    continue
                line = line or line_of(program.graph)
                match = _match(rule, found, line)
                reason = _refusal(match, line, ctx.mode) or _guarded(match, self, program, ctx)
                if reason is None:
                    yield self._candidate(match, node, ctx)
                    nearest = None
                    break
                count = len(match.nodes)
                if nearest is None or count > nearest.matched:
                    nearest = NearMiss(rule.name, node.name, count, count, reason)
            if nearest is not None:
                yield nearest

    def gain(self, match: Match, ctx: PassContext) -> CostDelta:
        """Predicted change: values in between are neither written nor read again. Override for more."""
        size = sum(_value_bytes(node) for node in match.inner)
        return CostDelta(seconds=-2 * size / ctx.cost.device.copy_bytes_per_second)

    def _candidate(self, match: Match, node: fx.Node, ctx: PassContext) -> Candidate:
        rule = match.rule
        return Candidate(
            f"{rule.name}@{node.name}", self.name, tuple(n.name for n in match.nodes), self.gain(match, ctx),
            _rewriting(self, rule, node.name), exactness=rule.exactness,
        )  # fmt: skip


def _anchored(
    program: Program, rules: Sequence[Rule]
) -> Iterator[tuple[fx.Node, list[tuple[Rule, Reach]]]]:
    """Nodes at which rules may match, or nearly so, with these rules, larger ones first, and how far each may
    go."""
    ordered = sorted(rules, key=lambda rule: -rule.form.size)
    reaches = Reaches([rule.form for rule in ordered])
    worth: dict[State, list[tuple[Rule, Reach]]] = {}
    for node, state in reaches.walk(program.graph):
        if state not in worth:
            worth[state] = [
                (ordered[k], reach)
                for k, reach in reaches.ends_at(state)
                if reach.may_match or reach.most >= ordered[k].worth_telling
            ]
        if worth[state]:
            yield node, worth[state]


def _match(rule: Rule, found: Found, line: Line) -> Match:
    ordered = sorted(found.nodes, key=lambda node: line.position.get(node, -1))
    return Match(rule, found.captures, found.roots, tuple(ordered), line)


def _refusal(match: Match, line: Line, mode: str) -> Reason | None:
    """What stands in the way of any rewrite of these nodes into one place, in ``mode``."""
    inside = set(match.nodes)
    for node in match.inner:
        for user in node.users:
            if user not in inside:
                what = "is an output of the program" if user.op == "output" else "is read by another call"
                return Reason(f"the value of {node.target} {what} as well", (node.name, user.name))
    positions = [line.position[node] for node in match.nodes if node in line.position]
    if len(positions) < len(match.nodes):
        return Reason("part of it is never run", (match.roots[0].name,))
    first, last = min(positions), max(positions)
    states = {line.ambient.states[k].key for k in positions}
    unknown = line.ambient.unknown
    if len(states) > 1 or (unknown is not None and unknown[0] <= last):
        return Reason("autocast or the gradient mode changes within it", (match.roots[0].name,))
    reads = {ref for node in match.nodes for ref in node.all_input_nodes}
    roots = {root for ref in reads for root in line.aliases.roots.get(ref, ())}
    for node in line.writing(first, last + 1):
        written = {root for ref in written_inputs(node) for root in line.aliases.roots[ref]}
        if written & roots:
            return Reason("what it reads is written within it", (node.name,))
    if mode == "train":
        # What a call saves for autograd may be its result, where what it replaces saved other values.
        made = {root for node in match.roots for root in line.aliases.roots.get(node, ())}
        for node in line.writing(last + 1, len(line.nodes)):
            written = {root for ref in written_inputs(node) for root in line.aliases.roots[ref]}
            if written & made:
                return Reason("its result is written in place, which autograd may forbid", (node.name,))
    return None


def _guarded(match: Match, step: Pass, program: Program, ctx: PassContext) -> Reason | None:
    rule = match.rule
    if rule.guard is None:
        return None
    context = {"match": match, "options": step, "program": program, "ctx": ctx}
    try:
        reason = _bound(rule.guard, {**match.captures, **context})
    except GUARDED as error:
        raise RuleError(f"{step.name}: the guard of rule {rule.name!r} raised {brief(error)}") from error
    if reason is not None and not isinstance(reason, Reason):
        raise RuleError(f"rule {rule.name}: the guard returned {reason!r}: expected a Reason or None")
    return reason


def _rewriting(step: RewritePass, rule: Rule, name: str) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        # Matched again: the program may be another copy of the one that this was proposed for.
        node = edit.node(name)
        found = match_pattern(rule.form, node)
        if isinstance(found, Missed):
            raise PassError(f"{step.name}: {name!r} no longer matches {rule.name}: {found.reason}")
        edit.rule = rule.name
        order = {known: k for k, known in enumerate(edit.graph.nodes)}
        last = max(found.roots, key=order.__getitem__)
        made = _replaced(rule, found, edit, last)
        for old, new in zip(found.roots, made, strict=True):
            edit.replace(old, new)
            if "val" in old.meta:
                # Another replacement may be built on it before the edit computes what it is.
                new.meta.setdefault("val", old.meta["val"])
        # Also what would stay for an effect that the replacement has in its stead.
        for old in sorted(found.nodes, key=order.__getitem__, reverse=True):
            if not old.users:
                edit.erase(old)

    return apply


def _replaced(rule: Rule, found: Found, edit: Edit, anchor: fx.Node) -> list[fx.Node]:
    """Build the replacement before ``anchor``."""
    tracer = fx.proxy.GraphAppendingTracer(edit.graph)

    def proxied(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [proxied(item) for item in value]
        return fx.Proxy(value, tracer) if isinstance(value, fx.Node) else value

    arguments = {name: proxied(value) for name, value in found.captures.items()}
    with edit.graph.inserting_before(anchor):
        made = _bound(rule.replacement, arguments)
    values = list(made) if isinstance(made, tuple) else [made]
    if len(values) != len(found.roots) or not all(isinstance(value, fx.Proxy) for value in values):
        raise RuleError(
            f"rule {rule.name}: the replacement returned {made!r}: expected {len(found.roots)} values that "
            "it computed or was given"
        )
    return [value.node for value in values]


def _bound(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function with those of ``arguments`` that it takes."""
    return function(**{name: arguments[name] for name in inspect.signature(function).parameters})


def _check_names(rule: Rule, what: str, function: Callable[..., Any], known: Sequence[str]) -> None:
    for parameter in inspect.signature(function).parameters:
        if parameter not in known:
            raise RuleError(
                f"rule {rule.name}: the {what} takes {parameter!r}, which is no argument of the pattern: "
                f"expected some of {', '.join(known)}"
            )


def _value_bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return _torch.hint(value.numel()) * value.element_size()
