"""Frozen dataclasses to JSON and back, checked field by field against their annotations."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["RecordFormatError", "decode", "encode"]

Record = TypeVar("Record")


class RecordFormatError(ValueError):
    """JSON that does not have the shape of the record; the message names the place in it."""


def encode(value: Any) -> Any:
    """A tree of dataclasses, tuples, mappings and scalars as plain JSON values.

    A float that is not finite becomes ``None``, because JSON has no spelling for it.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def decode(cls: type[Record], data: Any, *, where: str = "") -> Record:
    """The record ``cls`` that ``encode`` wrote as ``data``.

    Raises ``RecordFormatError`` for a missing or unknown field and for a value of another type.
    """
    here = where or cls.__name__
    if not isinstance(data, Mapping):
        raise RecordFormatError(f"{here}: expected an object, got {_kind(data)}")
    hints = _hints(cls)  # type: ignore[arg-type]
    names = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    missing = [name for name in names if name not in data]
    unknown = [str(name) for name in data if name not in names]
    if missing:
        raise RecordFormatError(f"{here}: field {missing[0]!r} is missing")
    if unknown:
        raise RecordFormatError(f"{here}: unknown field {unknown[0]!r}; fields are {', '.join(names)}")
    return cls(**{name: _value(hints[name], data[name], f"{here}.{name}") for name in names})


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), data, where)
    if origin is Literal:
        if data not in args:
            allowed = ", ".join(map(repr, args))
            raise RecordFormatError(f"{where}: expected one of {allowed}, got {_kind(data)}")
        return data
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise RecordFormatError(f"{where}: expected a list, got {_kind(data)}")
        return tuple(_value(args[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise RecordFormatError(f"{where}: expected an object, got {_kind(data)}")
        return {str(key): _value(args[1], item, f"{where}[{key!r}]") for key, item in data.items()}
    if is_dataclass(hint):
        return decode(hint, data, where=where)  # type: ignore[arg-type]
    if hint is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if isinstance(data, hint) and (hint is bool or not isinstance(data, bool)):
        return data
    raise RecordFormatError(f"{where}: expected {hint.__name__}, got {_kind(data)}")


def _kind(data: Any) -> str:
    return "null" if data is None else f"{type(data).__name__} {str(data)[:40]!r}"
