"""JSON Schema of the pipeline YAML, for editors: made from the passes that are installed."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, Literal, Union, get_type_hints

from graphopt.passes import Pass, pass_options
from graphopt.pipeline_file import SCHEMA

if TYPE_CHECKING:
    from graphopt.plugins import PluginHost

__all__ = ["option_schema", "pipeline_schema"]


def pipeline_schema(host: PluginHost) -> dict[str, Any]:
    """The schema (draft 2020-12) of a pipeline file that uses the passes of ``host``.

    What it cannot say is left to ``graphopt lint``: orders, and whether what is dropped was inherited.
    """
    passes = host.passes()
    names = {
        spelled: cls
        for name, cls in passes.items()
        for spelled in (name, f"{host.owner('graphopt_passes', name).plugin}/{name}")
    }
    bare = [name for name, cls in names.items() if MISSING not in pass_options(cls).values()]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SCHEMA,
        "type": "object",
        "required": ["schema"],
        "additionalProperties": False,
        "properties": {
            "schema": {"const": SCHEMA},
            "extends": {
                "description": "a preset, or a file beside this one",
                "anyOf": [{"enum": sorted(host.pipelines())}, {"type": "string", "pattern": r"\.ya?ml$"}],
            },
            "drop": {
                "description": "passes of what was extended that are left out",
                "type": "array",
                "items": {"enum": sorted(passes)},
            },
            "passes": {
                "type": "array",
                "items": {"anyOf": [{"enum": bare}, *(_step(name, cls) for name, cls in names.items())]},
            },
        },
    }


def _step(name: str, cls: type[Pass]) -> dict[str, Any]:
    hints, known = get_type_hints(cls), pass_options(cls)
    options: dict[str, Any] = {}
    for option, default in known.items():
        options[option] = option_schema(hints[option])
        if default is not MISSING:
            options[option]["default"] = _plain(default)
    needed = [option for option, default in known.items() if default is MISSING]
    given = {"type": "object", "additionalProperties": False, "properties": options}
    return {
        "type": "object",
        "description": cls.summary,
        "additionalProperties": False,
        "required": ["use", "with"] if needed else ["use"],
        "properties": {"use": {"const": name}, "with": {**given, "required": needed} if needed else given},
    }


def option_schema(annotation: Any) -> dict[str, Any]:
    """What a value of an option may be, as ``typed_value`` takes it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, object):
        return {}
    if origin in (Union, types.UnionType):
        return {"anyOf": [option_schema(choice) for choice in arguments]}
    if origin is Literal:
        return {"enum": [_plain(value) for value in arguments]}
    if annotation is tuple or origin is tuple:
        if not arguments:
            return {"type": "array"}
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return {"type": "array", "items": option_schema(arguments[0])}
        return {"type": "array", "prefixItems": list(map(option_schema, arguments)), "items": False}
    if annotation is float:
        # YAML 1.1 reads 1e-6 as a string.
        return {
            "anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"}]
        }
    plain = {bool: "boolean", int: "integer", str: "string", None: "null", types.NoneType: "null"}
    return {"type": plain[annotation]} if annotation in plain else {}


def _plain(value: Any) -> Any:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
