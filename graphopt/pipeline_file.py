"""The YAML form of a pipeline: a versioned list with a closed schema.

::

    schema: graphopt/pipeline@1
    extends: default                 # a preset, or a file beside this one
    drop: [insert-checkpoints]       # from what was extended
    passes:
      - fuse-norm
      - {use: insert-checkpoints, with: {effort: 2}}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from graphopt.errors import GraphoptError, PipelineError, UnknownNameError, nearest
from graphopt.passes import Pass
from graphopt.pipeline import Pipeline

if TYPE_CHECKING:
    from graphopt.plugins import PluginHost

__all__ = ["KEYS", "SCHEMA", "STEP_KEYS", "base_of", "load_pipeline"]

SCHEMA = "graphopt/pipeline@1"
KEYS = ("schema", "extends", "drop", "passes")
STEP_KEYS = ("use", "with")


def load_pipeline(source: Path | Traversable, host: PluginHost) -> Pipeline:
    """Read a pipeline file; raises ``PipelineError`` or ``UnknownNameError`` naming the file."""
    return Pipeline(_passes(source, host, ()), name=source.name.rsplit(".", 1)[0])


def _passes(source: Path | Traversable, host: PluginHost, within: tuple[str, ...]) -> tuple[Pass, ...]:
    where = str(source)
    if where in within:
        raise PipelineError(f"pipelines extend each other in a circle: {' -> '.join([*within, where])}")
    document = _document(source)
    inherited: tuple[Pass, ...] = ()
    if "extends" in document:
        inherited = _passes(base_of(document["extends"], source, host), host, (*within, where))
    kept = _without(inherited, document.get("drop", []), where)
    listed = _sequence(document.get("passes", []), "passes", where)
    return kept + tuple(_step(item, f"{where}: passes[{index}]", host) for index, item in enumerate(listed))


def _document(source: Path | Traversable) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"cannot read pipeline {source}: {error}") from error
    except yaml.YAMLError as error:
        raise PipelineError(f"{source} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, Mapping):
        raise PipelineError(f"{source}: expected a mapping with the keys {', '.join(KEYS)}")
    _closed(document, KEYS, str(source))
    if document.get("schema") != SCHEMA:
        raise PipelineError(f"{source}: expected `schema: {SCHEMA}`, got {document.get('schema')!r}")
    return document


def base_of(name: object, source: Path | Traversable, host: PluginHost) -> Path | Traversable:
    """What ``extends`` names: a preset, or a file relative to the one that extends it. Raises
    ``PipelineError`` and ``UnknownNameError``."""
    if not isinstance(name, str):
        raise PipelineError(f"{source}: extends is a preset's name or a file, got {name!r}")
    presets = host.pipelines()
    if name in presets:
        return presets[name]
    if not name.endswith((".yaml", ".yml")):
        raise UnknownNameError("pipeline", name, presets)
    return source.parent / name if isinstance(source, Path) else Path(name)


def _without(inherited: tuple[Pass, ...], drop: object, where: str) -> tuple[Pass, ...]:
    dropped = _sequence(drop, "drop", where)
    names = [instance.name for instance in inherited]
    for name in dropped:
        if name not in names:
            close = nearest(str(name), names)
            raise PipelineError(
                f"{where}: cannot drop {name!r}, which is not inherited"
                + (f"; did you mean {close!r}?" if close else "")
            )
    for instance in inherited:
        if instance.mandatory and instance.name in dropped:
            raise PipelineError(f"{where}: cannot drop {instance.name!r}, which is mandatory")
    return tuple(instance for instance in inherited if instance.name not in dropped)


def _step(item: object, where: str, host: PluginHost) -> Pass:
    name, options = item, {}
    if isinstance(item, Mapping):
        _closed(item, STEP_KEYS, where)
        name, options = item.get("use"), item.get("with", {})
    if not isinstance(name, str):
        raise PipelineError(f"{where}: expected a pass's name or {{use: name, with: {{...}}}}, got {item!r}")
    if not isinstance(options, Mapping) or not all(isinstance(option, str) for option in options):
        raise PipelineError(f"{where}: `with` maps options to values, got {options!r}")
    try:
        return host.pass_class(name).configured(**options)
    except GraphoptError as error:
        raise PipelineError(f"{where}: {error.message}", hint=error.hint) from error


def _sequence(value: object, key: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise PipelineError(f"{where}: {key} is a list, got {value!r}")
    return value


def _closed(mapping: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    for key in mapping:
        if key in known:
            continue
        close = nearest(str(key), known)
        raise PipelineError(
            f"{where}: unknown key {key!r}" + (f"; did you mean {close!r}?" if close else ""),
            hint=f"known keys: {', '.join(known)}",
        )
