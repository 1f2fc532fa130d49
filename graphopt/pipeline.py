"""Pipelines: which passes run, with which options, in which order.

The same pipeline in its three spellings::

    Pipeline((FuseNorm(), InsertCheckpoints(effort=2)))          # Python
    fuse-norm,insert-checkpoints{effort=2}                       # text
    passes: [fuse-norm, {use: insert-checkpoints, with: {effort: 2}}]   # YAML, graphopt.pipeline_file
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from graphopt.errors import PipelineError, UnknownNameError, nearest
from graphopt.options import OptionError, parse_word
from graphopt.passes import Pass, pass_text
from graphopt.program import Level

if TYPE_CHECKING:
    from graphopt.plugins import PluginHost

__all__ = ["Pipeline", "order_facts", "parse_items"]

_LEVELS = list(Level)
_TOKEN = re.compile(r'(?P<punct>[{}\[\],=])|(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[^\s{}\[\],="]+)')
_FILE = (".yaml", ".yml")


@dataclass(frozen=True)
class Pipeline:
    """Passes as they were listed; ``steps`` is the order in which they run.

    Raises ``PipelineError`` when made, before anything runs, where the passes' ``after`` and
    ``before`` cannot all be met. ``str()`` is the text form, and ``parse(str(p)) == p``.
    """

    passes: tuple[Pass, ...] = ()
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for instance in self.passes:
            try:
                pass_text(instance)
            except OptionError as error:
                raise PipelineError(f"pass {instance.name!r}: {error}") from error
        _run_order(self.passes)

    @property
    def steps(self) -> tuple[Pass, ...]:
        """The passes in the order in which they run.

        Levels run from semantic to lowered; within a level ``after`` and ``before`` decide, and
        where they say nothing, the listing.
        """
        return tuple(self.passes[index] for index in _run_order(self.passes))

    def __str__(self) -> str:
        return ",".join(map(pass_text, self.passes))

    @classmethod
    def of(cls, value: object, host: PluginHost) -> Pipeline:
        """Whatever ``optimize(pipeline=...)`` accepts, as a ``Pipeline``.

        ``None`` is the preset ``default``; a text is a preset's name, a ``.yaml`` file or the text
        form, in which a preset's name stands for its passes (``"default,my-pass"``); a sequence holds
        passes, pass classes or texts.
        """
        from graphopt.pipeline_file import load_pipeline

        if value is None:
            value = "default"
        if isinstance(value, Pipeline):
            return value
        if isinstance(value, Path) or (isinstance(value, str) and value.endswith(_FILE)):
            return load_pipeline(Path(value), host)
        if isinstance(value, str):
            presets = host.pipelines()
            return load_pipeline(presets[value], host) if value in presets else cls.parse(value, host)
        if isinstance(value, Pass) or not isinstance(value, Iterable):
            value = (value,)
        return cls(tuple(instance for item in value for instance in _instances(item, host)))

    @classmethod
    def parse(cls, text: str, host: PluginHost) -> Pipeline:
        """Read the text form; raises ``PipelineError`` or ``UnknownNameError``."""
        found = [_named(name, options, host) for name, options in _Reader(text).items()]
        return cls(tuple(instance for passes in found for instance in passes))


def _instances(item: object, host: PluginHost) -> Sequence[Pass]:
    if isinstance(item, Pass):
        return (item,)
    if isinstance(item, str):
        return Pipeline.parse(item, host).passes
    if isinstance(item, type) and issubclass(item, Pass):
        return (item.configured(),)
    raise PipelineError(f"expected a pass, a pass class or the name of one, got {item!r}")


def _named(name: str, options: dict[str, Any], host: PluginHost) -> Sequence[Pass]:
    """The pass of that name, or the passes of the preset of that name."""
    from graphopt.pipeline_file import load_pipeline

    presets = host.pipelines()
    if name in presets and name not in host.passes():
        if options:
            raise PipelineError(
                f"{name!r} is a pipeline and has no options: they are of its passes",
                hint=f"its passes: {load_pipeline(presets[name], host)}",
            )
        return load_pipeline(presets[name], host).passes
    try:
        return (host.pass_class(name).configured(**options),)
    except UnknownNameError as error:
        close = nearest(name, presets)
        if error.kind == "pass" and close and nearest(name, host.passes()) is None:
            raise UnknownNameError("pass or pipeline", name, [*host.passes(), *presets]) from None
        raise


def order_facts(passes: Sequence[Pass]) -> Iterator[tuple[int, int, str]]:
    """Indices of two passes of which the first runs before the second, and why: levels first."""
    for here, instance in enumerate(passes):
        for there, other in enumerate(passes):
            if _LEVELS.index(instance.level) < _LEVELS.index(other.level):
                yield (
                    here,
                    there,
                    f"{instance.name} is at level {instance.level}, {other.name} at level {other.level}",
                )
    for here, instance in enumerate(passes):
        for there, other in enumerate(passes):
            if other.name in instance.after:
                fact = f"{instance.name} runs after {other.name}"
                yield there, here, _because(fact, instance.after[other.name])
            if other.name in instance.before:
                fact = f"{instance.name} runs before {other.name}"
                yield here, there, _because(fact, instance.before[other.name])


def _run_order(passes: Sequence[Pass]) -> list[int]:
    """Indices of ``passes`` in the order in which they run; raises ``PipelineError`` for a cycle."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for first, second, why in order_facts(passes):
        if not graph.has_edge(first, second):
            graph.add_edge(first, second, why=why)
    try:
        cycle = nx.find_cycle(graph)
    except nx.NetworkXNoCycle:
        return list(nx.lexicographical_topological_sort(graph))
    names = " -> ".join(passes[start].name for start, _ in [*cycle, cycle[0]])
    reasons = "; ".join(graph.edges[start, end]["why"] for start, end in cycle)
    raise PipelineError(f"no order satisfies these passes: {names}", hint=reasons)


def _because(fact: str, reason: str) -> str:
    return f"{fact} ({reason})" if reason else fact


def parse_items(text: str, whole: str, item: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of ``a,b{x=1,y=[2,3]}``. ``whole`` and ``item`` name in errors what the text and each
    of its items are (``"pipeline"``, ``"pass"``); raises ``PipelineError``."""
    return _Reader(text, whole, item).items()


class _Reader:
    """Reads ``a,b{x=1,y=[2,3]}``; errors point at the place in the text."""

    def __init__(self, text: str, whole: str = "pipeline", item: str = "pass") -> None:
        self.text, self.whole, self.item, self.at = text, whole, item, 0

    def items(self) -> list[tuple[str, dict[str, Any]]]:
        found: list[tuple[str, dict[str, Any]]] = []
        if not self.text.strip():
            return found
        while True:
            name = self.word(f"the name of a {self.item}")
            found.append((name, self.options(name) if self.taken("{") else {}))
            if self.peek() is None:
                return found
            self.expect(",", "',' or the end")

    def options(self, owner: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        while not self.taken("}"):
            if options:
                self.expect(",", "',' or '}'")
            name = self.word(f"the name of an option of {owner}")
            if name in options:
                raise self.error(f"option {name!r} of {self.item} {owner!r} is given twice")
            self.expect("=", f"'=' after option {name!r}")
            options[name] = self.value(name)
        return options

    def value(self, option: str) -> object:
        if self.taken("["):
            items: list[object] = []
            while not self.taken("]"):
                if items:
                    self.expect(",", "',' or ']'")
                items.append(self.value(option))
            return tuple(items)
        token = self.peek()
        if token is not None and token.lastgroup == "string":
            try:
                text = json.loads(token[0])
            except json.JSONDecodeError as error:
                raise self.error(f"{token[0]} is no string: {error.msg}") from error
            self.at = token.end()
            return text
        return parse_word(self.word(f"a value for option {option!r}"))

    def peek(self) -> re.Match[str] | None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        if self.at == len(self.text):
            return None
        token = _TOKEN.match(self.text, self.at)
        if token is None:
            raise self.error("a quoted string does not end")
        return token

    def taken(self, punctuation: str) -> bool:
        token = self.peek()
        if token is None or token[0] != punctuation:
            return False
        self.at = token.end()
        return True

    def expect(self, punctuation: str, what: str) -> None:
        if not self.taken(punctuation):
            raise self.error(f"expected {what}")

    def word(self, what: str) -> str:
        token = self.peek()
        if token is None or token.lastgroup != "word":
            raise self.error(f"expected {what}")
        self.at = token.end()
        return token[0]

    def error(self, problem: str) -> PipelineError:
        return PipelineError(
            f"cannot read {self.whole} {self.text!r} at character {self.at + 1}: {problem}",
            hint=f"a {self.whole} is written as {self.item}{{option=value,option=[1,2]}},{self.item}",
        )
