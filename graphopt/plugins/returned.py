"""Check what registration hooks return; anything else is a ``PluginError`` naming the culprit."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from graphopt.errors import PluginError
from graphopt.plugins.records import CacheScoreSpec

if TYPE_CHECKING:
    from graphopt.decoding.stores import CacheStore
    from graphopt.packing import Scheme
    from graphopt.packing.formats import WeightFormat
    from graphopt.passes import Pass

__all__ = [
    "import_named",
    "read_cache_scores",
    "read_passes",
    "read_pipelines",
    "read_records",
    "read_rules",
    "read_schemes",
    "read_stores",
    "read_weight_formats",
]

T = TypeVar("T")


def read_records(record: type[T]) -> Callable[[object], Iterator[tuple[str, T]]]:
    """A reader of iterables of one record type that has a ``name``."""

    def read(returned: object) -> Iterator[tuple[str, T]]:
        for item in _iterate(returned, record.__name__):
            if not isinstance(item, record):
                raise PluginError(f"expected {record.__name__} records, got {item!r}")
            name = getattr(item, "name", None)
            if not isinstance(name, str) or not name:
                raise PluginError(f"a {record.__name__} needs a name, got {name!r}")
            yield name, item

    return read


def read_cache_scores(returned: object) -> Iterator[tuple[str, CacheScoreSpec]]:
    """Records of scores, made known to operators."""
    from graphopt.decoding.cache_scores import make_known

    for name, spec in read_records(CacheScoreSpec)(returned):
        make_known([spec])
        yield name, spec


def read_passes(returned: object) -> Iterator[tuple[str, type[Pass]]]:
    """Pass classes, those given as ``"package.module:Class"`` imported."""
    from graphopt.passes import Pass
    from graphopt.program import Level

    for item in _iterate(returned, "Pass class"):
        cls = import_named(item) if isinstance(item, str) else item
        if not isinstance(cls, type) or not issubclass(cls, Pass):
            raise PluginError(f"expected subclasses of graphopt.Pass, got {item!r}")
        if "__dataclass_fields__" not in vars(cls):
            raise PluginError(f"pass {cls.__name__} must be a frozen dataclass: its fields are its options")
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not name:
            raise PluginError(f"pass {cls.__name__} needs a class variable `name`, got {name!r}")
        level = getattr(cls, "level", None)
        if not isinstance(level, Level):
            raise PluginError(f"pass {name!r} needs a class variable `level` (a Level), got {level!r}")
        yield name, cls


def read_rules(returned: object, plugin: str) -> Iterator[tuple[str, type[Pass]]]:
    """The pass ``PLUGIN-rules`` of the rules, none without rules."""
    from graphopt.program import Level
    from graphopt.rules import RewritePass, Rule

    rules = tuple(_iterate(returned, "Rule"))
    names: set[str] = set()
    for rule in rules:
        if not isinstance(rule, Rule):
            raise PluginError(f"expected graphopt.rules.Rule records, got {rule!r}")
        if rule.name in names:
            raise PluginError(f"two rules have the name {rule.name!r}")
        names.add(rule.name)
    if rules:
        name = f"{plugin}-rules"
        members = {
            "__doc__": f"Rewrites by the rules of plugin {plugin}: {', '.join(sorted(names))}.",
            "__module__": __name__,
            "name": name,
            "level": Level.SEMANTIC,
            "summary": f"rewrite by the rules of plugin {plugin}",
            "rules": rules,
        }
        yield name, dataclass(frozen=True)(type("PluginRules", (RewritePass,), members))


def read_schemes(returned: object) -> Iterator[tuple[str, type[Scheme]]]:
    """Scheme classes, those given as ``"package.module:Class"`` imported."""
    from graphopt.packing import Scheme

    for item in _iterate(returned, "Scheme class"):
        cls = import_named(item) if isinstance(item, str) else item
        if not isinstance(cls, type) or not issubclass(cls, Scheme):
            raise PluginError(f"expected subclasses of graphopt.Scheme, got {item!r}")
        if "__dataclass_fields__" not in vars(cls):
            raise PluginError(f"scheme {cls.__name__} must be a frozen dataclass: its fields are its options")
        for attribute in ("name", "unpack_op", "linear_op"):
            value = getattr(cls, attribute, None)
            if not isinstance(value, str) or not value:
                what = f"scheme {cls.__name__} needs a class variable `{attribute}`"
                raise PluginError(f"{what}, got {value!r}")
        yield cls.name, cls


def read_weight_formats(returned: object) -> Iterator[tuple[str, type[WeightFormat]]]:
    """Classes of formats of packed weights, those given as ``"package.module:Class"`` imported."""
    from graphopt.packing.formats import WeightFormat

    for item in _iterate(returned, "WeightFormat class"):
        cls = import_named(item) if isinstance(item, str) else item
        if not isinstance(cls, type) or not issubclass(cls, WeightFormat):
            raise PluginError(f"expected subclasses of graphopt.WeightFormat, got {item!r}")
        if "__dataclass_fields__" not in vars(cls):
            raise PluginError(f"format {cls.__name__} must be a frozen dataclass: its fields are its options")
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not name:
            raise PluginError(f"format {cls.__name__} needs a class variable `name`, got {name!r}")
        yield name, cls

def read_stores(returned: object) -> Iterator[tuple[str, type[CacheStore]]]:
    """Store classes, those given as ``"package.module:Class"`` imported."""
    from graphopt.decoding.stores import CacheStore

    for item in _iterate(returned, "CacheStore class"):
        cls = import_named(item) if isinstance(item, str) else item
        if not isinstance(cls, type) or not issubclass(cls, CacheStore):
            raise PluginError(f"expected subclasses of graphopt.CacheStore, got {item!r}")
        if "__dataclass_fields__" not in vars(cls):
            raise PluginError(f"store {cls.__name__} must be a frozen dataclass: its fields are its options")
        for attribute in ("name", "attend_op"):
            value = getattr(cls, attribute, None)
            if not isinstance(value, str) or not value:
                raise PluginError(f"store {cls.__name__} needs a class variable `{attribute}`, got {value!r}")
        yield cls.name, cls


def read_pipelines(returned: object) -> Iterator[tuple[str, Traversable]]:
    """Names and the files that hold the pipelines."""
    if not isinstance(returned, Mapping):
        raise PluginError(f"expected a mapping of names to files, got {returned!r}")
    for name, source in returned.items():
        if not isinstance(name, str) or not isinstance(source, (Path, Traversable)):
            raise PluginError(f"expected a mapping of names to files, got {name!r}: {source!r}")
        yield name, source


def import_named(text: str) -> object:
    """``"package.module:attribute"`` imported; raises ``PluginError`` or what the import raises."""
    module, colon, attribute = text.partition(":")
    if not (module and colon and attribute):
        raise PluginError(f"expected 'package.module:Class', got {text!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise PluginError(f"cannot import {text!r}: {error}") from error


def _iterate(returned: object, what: str) -> Iterable[object]:
    if isinstance(returned, (str, bytes, Mapping)) or not isinstance(returned, Iterable):
        raise PluginError(f"expected an iterable of {what}s, got {returned!r}")
    return returned
