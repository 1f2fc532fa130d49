"""Everything that is wrong with a pipeline file, each with its place; loading one stops at the first."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from graphopt.errors import GraphoptError, PipelineError, UnknownNameError, nearest
from graphopt.options import OptionError, typed_value
from graphopt.passes import Pass, pass_options
from graphopt.pipeline import Pipeline, order_facts
from graphopt.pipeline_file import KEYS, SCHEMA, STEP_KEYS, base_of, load_pipeline

if TYPE_CHECKING:
    from graphopt.plugins import PluginHost

__all__ = ["Problem", "lint_pipeline"]


@dataclass(frozen=True)
class Problem:
    """``line`` and ``column`` count from 1. ``code``: ``yaml``, ``schema``, ``key``, ``pass``, ``option``,
    ``extends``, ``drop`` or ``order``."""

    line: int
    column: int
    code: str
    message: str


def lint_pipeline(path: Path, host: PluginHost) -> list[Problem]:
    """What is wrong with the file, in its order. Raises ``OSError`` if it cannot be read."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        return [Problem(1, 1, "yaml", f"no UTF-8: {error.reason}")]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
        what = getattr(error, "problem", None) or str(error)
        return [Problem(line, column, "yaml", " ".join(str(what).split()))]
    linting = _Linting(path, host)
    linting.document(root)
    return sorted(dict.fromkeys(linting.found), key=lambda problem: (problem.line, problem.column))


class _Linting:
    """Collects what is wrong with one document."""

    def __init__(self, path: Path, host: PluginHost) -> None:
        self.path, self.host = path, host
        self.found: list[Problem] = []

    def say(self, node: yaml.Node | None, code: str, message: str) -> None:
        mark = node.start_mark if node is not None else None
        line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
        self.found.append(Problem(line, column, code, message))

    def document(self, root: yaml.Node | None) -> None:
        if not isinstance(root, yaml.MappingNode):
            self.say(root, "schema", f"expected a mapping with the keys {', '.join(KEYS)}")
            return
        parts = self._parts(root, KEYS)
        version = _value(parts["schema"]) if "schema" in parts else None
        if version != SCHEMA:
            where = parts.get("schema", root)
            self.say(where, "schema", f"expected `schema: {SCHEMA}`, got {version!r}")
        inherited: tuple[Pass, ...] = ()
        if "extends" in parts:
            try:
                base = base_of(_value(parts["extends"]), self.path, self.host)
                inherited = load_pipeline(base, self.host).passes
            except GraphoptError as error:
                self.say(parts["extends"], "extends", error.message)
        dropped = set()
        for node in self._items(parts.get("drop"), "drop"):
            dropped.add(_value(node))
            self._dropping(node, inherited)
        listed: list[tuple[Pass, yaml.Node | None]] = [(p, None) for p in inherited if p.name not in dropped]
        for node in self._items(parts.get("passes"), "passes"):
            instance = self._step(node)
            if instance is not None:
                listed.append((instance, node))
        self._orders(listed, root)

    def _parts(self, node: yaml.MappingNode, known: Collection[str]) -> dict[str, yaml.Node]:
        """The values of a mapping by key; a key that is unknown or given twice is a problem."""
        parts: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in parts:
                self.say(key, "key", f"key {name!r} is given twice")
            elif name not in known:
                close = nearest(name, known)
                hint = f"; did you mean {close!r}?" if close else f": known are {', '.join(known)}"
                self.say(key, "key", f"unknown key {name!r}{hint}")
            parts[name] = value
        return parts

    def _items(self, node: yaml.Node | None, key: str) -> list[yaml.Node]:
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.say(node, "key", f"{key} is a list, got {_value(node)!r}")
            return []
        return list(node.value)

    def _dropping(self, node: yaml.Node, inherited: Iterable[Pass]) -> None:
        name, names = _value(node), {step.name: step for step in inherited}
        if name not in names:
            close = nearest(str(name), names)
            hint = f"; did you mean {close!r}?" if close else ""
            self.say(node, "drop", f"cannot drop {name!r}, which is not inherited{hint}")
        elif names[name].mandatory:
            self.say(node, "drop", f"cannot drop {name!r}, which is mandatory")

    def _step(self, node: yaml.Node) -> Pass | None:
        """The pass of one step, ``None`` where something is wrong with it."""
        named, options = node, None
        expected = "expected a pass's name or {use: name, with: {...}}"
        if isinstance(node, yaml.MappingNode):
            parts = self._parts(node, STEP_KEYS)
            if "use" not in parts:
                self.say(node, "key", expected)
                return None
            named, options = parts["use"], parts.get("with")
        name = _value(named)
        if not isinstance(name, str):
            self.say(named, "pass", f"{expected}, got {name!r}")
            return None
        try:
            cls = self.host.pass_class(name)
        except UnknownNameError as error:
            self.say(named, "pass", error.message)
            return None
        if options is not None and not isinstance(options, yaml.MappingNode):
            self.say(options, "option", f"`with` maps options to values, got {_value(options)!r}")
            return None
        before = len(self.found)
        given = self._options(cls, named, options)
        return cls.configured(**given) if len(self.found) == before else None

    def _options(self, cls: type[Pass], named: yaml.Node, options: yaml.MappingNode | None) -> dict[str, Any]:
        known, hints = pass_options(cls), get_type_hints(cls)
        given: dict[str, Any] = {}
        names = set()
        for key, value in options.value if options is not None else ():
            option = str(_value(key))
            names.add(option)
            if option not in known:
                unknown = UnknownNameError(f"option of pass {cls.name}", option, known)
                choice = "" if "did you mean" in unknown.message else f": {unknown.hint}"
                self.say(key, "option", f"{unknown.message}{choice}")
                continue
            try:
                given[option] = typed_value(_value(value), hints[option])
            except OptionError as error:
                self.say(value, "option", f"option {option!r} of pass {cls.name!r} {error}")
        for option, default in known.items():
            if default is MISSING and option not in names:
                self.say(named, "option", f"pass {cls.name!r} needs option {option!r}")
        return given

    def _orders(self, listed: list[tuple[Pass, yaml.Node | None]], root: yaml.Node) -> None:
        """Passes that run in another order than they are listed in, and orders that nothing satisfies."""
        passes = [instance for instance, _ in listed]
        try:
            Pipeline(tuple(passes))
        except PipelineError as error:
            places = [node for _, node in listed if node is not None]
            why = f" ({error.hint})" if error.hint else ""
            self.say(places[0] if places else root, "order", f"{error.message}{why}")
            return
        for first, second, why in order_facts(passes):
            node = listed[first][1]
            # What is listed here after an inherited pass cannot stand before it.
            if first > second and node is not None and listed[second][1] is not None:
                late, early = passes[first].name, passes[second].name
                self.say(node, "order", f"{late} is listed after {early}, but runs before it: {why}")


def _value(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_document(node)
