"""Option values in the one spelling that text, YAML, reports and errors share.

``null``, ``true``, ``false``, integers, floats, words, quoted strings and ``[lists]``; a list is a
tuple in Python, so that passes stay hashable.
"""

from __future__ import annotations

import json
import re
import types
import typing
from typing import Any, Literal, Union

__all__ = ["OptionError", "format_value", "parse_word", "typed_value"]

_INT = re.compile(r"[+-]?[0-9]+")
_BARE = re.compile(r"[^\s{}\[\],=\"]+")
_CONSTANTS: dict[str, bool | None] = {"null": None, "true": True, "false": False}


class OptionError(ValueError):
    """A value that an option cannot hold; the message says what it can. The caller names the option."""


def format_value(value: object) -> str:
    """``(1, "a b", None)`` -> ``[1,"a b",null]``; raises ``OptionError`` for other types."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = str.__str__(value)
        return text if _BARE.fullmatch(text) and parse_word(text) == text else json.dumps(text)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{','.join(format_value(item) for item in value)}]"
    raise OptionError(f"options are None, bool, int, float, str or tuples of these, got {value!r}")


def parse_word(word: str) -> object:
    """What an unquoted word means: a constant, a number or the word itself."""
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if _INT.fullmatch(word):
        return int(word)
    try:
        return float(word)
    except ValueError:
        return word


def typed_value(value: object, annotation: Any) -> object:
    """``value`` as the annotation wants it: lists become tuples, integers floats where asked.

    Raises ``OptionError``. A string that reads as a float is taken for one where a float is
    expected, because YAML 1.1 reads ``1e-6`` as a string.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, object):
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, annotation)
    if origin is Literal:
        if value in arguments:
            return value
    elif annotation is tuple or origin is tuple:
        if isinstance(value, (list, tuple)):
            return _typed_tuple(value, arguments)
    elif annotation in (None, types.NoneType):
        if value is None:
            return value
    elif annotation is float:
        if isinstance(value, str) and isinstance(parse_word(value), float):
            return parse_word(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(annotation, type):
        exact_int = annotation is int and isinstance(value, bool)
        if isinstance(value, annotation) and not exact_int:
            return value
    raise OptionError(f"must be {_spelled(annotation)}, got {value!r}")


def _one_of(value: object, choices: tuple[Any, ...], annotation: Any) -> object:
    # int | float given 1: the arm that needs no conversion wins.
    for choice in sorted(choices, key=lambda choice: choice is float):
        try:
            return typed_value(value, choice)
        except OptionError:
            continue
    raise OptionError(f"must be {_spelled(annotation)}, got {value!r}")


def _typed_tuple(value: list[Any] | tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if not arguments:
        return tuple(value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(typed_value(item, arguments[0]) for item in value)
    if len(value) != len(arguments):
        raise OptionError(f"must have {len(arguments)} elements, got {len(value)}: {value!r}")
    return tuple(typed_value(item, kind) for item, kind in zip(value, arguments, strict=True))


def _spelled(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(annotation)))
    return annotation.__name__ if type(annotation) is type else str(annotation)
