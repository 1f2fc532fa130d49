"""How a step is called and what it returns, as JSON: where tensors go in arguments and results.

    forward(ids, mask=None) -> {"logits": ..., "loss": ...}

    arguments   {"dict": {"ids": {"argument": 0}, "mask": {"constant": null}}}
    results     {"dict": {"logits": {"value": 1}, "loss": {"value": 0}}}

Numbers, texts and the like among the arguments are part of what was compiled: a call with others is refused.
Classes that torch knows as containers (``torch.utils._pytree``), such as the outputs of a model of
transformers, are written by name and looked up among those that are registered where an artefact is loaded.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from graphopt import _torch
from graphopt.errors import ArtefactError, InputsError, nearest

__all__ = [
    "check_structure",
    "constants_of",
    "filled",
    "numbers_in",
    "signature_json",
    "signature_of",
    "structure_json",
    "taken",
]

_PLAIN = (bool, int, float, str)
_KINDS = ("argument", "value", "state", "number")
"""What a leaf of a structure may be: a tensor of the call, a result of the program, a parameter or buffer, a
whole number of the call that may be another."""


def structure_json(value: Any, leaf: Callable[[torch.Tensor, str], Any], path: str) -> Any:
    """``value`` with ``leaf(tensor, path)`` in place of tensors. ``path`` names it in errors.

    Raises ``ArtefactError`` for objects that cannot be made again without running code.
    """
    if isinstance(value, torch.Tensor):
        return leaf(value, path)
    if value is None or type(value) in _PLAIN:
        if isinstance(value, float) and not math.isfinite(value):
            raise ArtefactError(f"{path} is {value}, which JSON cannot spell")
        return {"constant": value}
    if type(value) in (tuple, list):
        items = [structure_json(item, leaf, f"{path}[{k}]") for k, item in enumerate(value)]
        return {type(value).__name__: items}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: structure_json(item, leaf, f"{path}[{key!r}]") for key, item in value.items()}}
    parts = _torch.container_parts(value)
    name = _class_name(type(value))
    if parts is None:
        raise ArtefactError(
            f"{path} is a {name}, which an artefact cannot hold",
            hint="expected tensors, numbers, texts, None; tuples, lists, dicts, registered classes of them",
        )
    children, context = parts
    if not _is_texts(context):
        raise ArtefactError(f"{path} is a {name}, whose fields are not told by names")
    return {
        "class": name,
        "context": _texts(context),
        "items": [structure_json(item, leaf, f"{path}.{k}") for k, item in enumerate(children)],
    }


def _is_texts(context: Any) -> bool:
    """Whether what tells how the items of a container go together are names, and lists of names."""
    if isinstance(context, (list, tuple)):
        return all(map(_is_texts, context))
    return context is None or type(context) is str


def _texts(context: Any) -> Any:
    return list(map(_texts, context)) if isinstance(context, (list, tuple)) else context


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def check_structure(data: Any, counts: Mapping[str, int], names: frozenset[str] = frozenset()) -> None:
    """Raise ``ArtefactError`` unless ``filled`` can follow ``data``: ``counts`` says how many tensors of each
    kind there are, ``names`` those of the state."""
    for kind, inner in _entries(data):
        if kind == "state":
            if inner not in names:
                raise ArtefactError(f"a structure names {str(inner)[:60]!r}, which the state has not")
        elif kind in _KINDS:
            if type(inner) is not int or not 0 <= inner < counts.get(kind, 0):
                raise ArtefactError(f"a structure names {kind} {str(inner)[:20]}, which is not there")
        elif kind == "constant" and inner is not None and type(inner) not in _PLAIN:
            raise ArtefactError(f"a structure has the constant {str(inner)[:60]!r}")


def _entries(data: Any) -> Iterator[tuple[str, Any]]:
    """Every node of a structure as (kind, what it holds), classes looked up."""
    if not isinstance(data, dict):
        raise ArtefactError(f"{str(data)[:60]!r} is no structure")
    if "class" in data:
        if sorted(data) != ["class", "context", "items"] or not _is_texts(data["context"]):
            raise ArtefactError(f"{str(data)[:60]!r} is no structure")
        _class_of(data["class"])
        children = data["items"]
    elif len(data) == 1:
        ((kind, inner),) = data.items()
        if kind in (*_KINDS, "constant"):
            yield kind, inner
            return
        wanted = {"tuple": list, "list": list, "dict": dict}.get(kind)
        if wanted is None or not isinstance(inner, wanted):
            raise ArtefactError(f"{str(data)[:60]!r} is no structure")
        children = list(inner.values()) if isinstance(inner, dict) else inner
    else:
        raise ArtefactError(f"{str(data)[:60]!r} is no structure")
    if not isinstance(children, list):
        raise ArtefactError(f"{str(data)[:60]!r} is no structure")
    for child in children:
        yield from _entries(child)


def _class_of(name: Any) -> type:
    """A class of containers that is registered here."""
    known = {_class_name(kind): kind for kind in _torch.container_classes()}
    if name not in known:
        close = nearest(str(name), known)
        module = str(name).rpartition(".")[0]
        raise ArtefactError(
            f"the step returns or takes {str(name)[:120]!r}, which is no container that is registered here"
            + (f"; nearest: {close!r}" if close else ""),
            hint=f"import {module} before loading, where you trust it" if module else "",
        )
    return known[name]


def filled(data: Any, values: Mapping[str, Any]) -> Any:
    """The structure with ``values[kind][index]`` where tensors go."""
    if "class" in data:
        items = [filled(item, values) for item in data["items"]]
        context = data["context"]
        return _torch.container_of(_class_of(data["class"]), items, context)
    ((kind, inner),) = data.items()
    if kind == "constant":
        return inner
    if kind == "dict":
        return {key: filled(item, values) for key, item in inner.items()}
    if kind in ("tuple", "list"):
        made = [filled(item, values) for item in inner]
        return tuple(made) if kind == "tuple" else made
    return values[kind][inner]


def constants_of(data: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The constants of a structure with their paths, as ``structure_json`` names them."""
    if "class" in data:
        items = [(f"{path}.{k}", item) for k, item in enumerate(data["items"])]
    elif "dict" in data:
        items = [(f"{path}[{key!r}]", item) for key, item in data["dict"].items()]
    elif "constant" in data:
        yield path, data
        return
    else:
        ((kind, inner),) = data.items()
        items = [(f"{path}[{k}]", item) for k, item in enumerate(inner)] if kind in ("tuple", "list") else []
    for where, item in items:
        yield from constants_of(item, where)


def numbers_in(data: Any) -> set[int]:
    """Which numbers of the call a checked structure has."""
    return {inner for kind, inner in _entries(data) if kind == "number"}


def taken(
    data: Any,
    given: Any,
    tensors: list[torch.Tensor | None],
    path: str,
    numbers: dict[int, int] | None = None,
) -> None:
    """Put the tensors of ``given`` where ``data`` says into ``tensors``, and whole numbers that may be others
    into ``numbers``.

    Raises ``InputsError`` where ``given`` has another structure, or other numbers and texts.
    """
    if "class" in data:
        parts = _torch.container_parts(given)
        same = parts is not None and _class_name(type(given)) == data["class"]
        if not same or parts is None or _texts(parts[1]) != data["context"]:
            raise _other(path, data["class"], given)
        _each(data["items"], list(parts[0]), tensors, [f"{path}.{k}" for k in range(len(parts[0]))], numbers)
        return
    ((kind, inner),) = data.items()
    if kind == "argument":
        if not isinstance(given, torch.Tensor):
            raise _other(path, "a tensor", given)
        if tensors[inner] is not None and tensors[inner] is not given:
            raise InputsError(f"{path} was one tensor with another argument when the step was saved")
        tensors[inner] = given
    elif kind == "number":
        if type(given) is not int:
            raise _other(path, "a whole number", given)
        assert numbers is not None
        numbers[inner] = given
    elif kind == "constant":
        if type(given) is not type(inner) or given != inner:
            raise _other(path, repr(inner), given)
    elif kind == "dict":
        if type(given) is not dict or list(given) != list(inner):
            raise _other(path, f"a dict of {', '.join(inner) or 'nothing'}", given)
        paths = [f"{path}[{key!r}]" for key in inner]
        _each(list(inner.values()), list(given.values()), tensors, paths, numbers)
    else:
        if type(given).__name__ != kind or len(given) != len(inner):
            raise _other(path, f"a {kind} of {len(inner)}", given)
        _each(inner, list(given), tensors, [f"{path}[{k}]" for k in range(len(inner))], numbers)


def _each(
    items: Sequence[Any],
    given: Sequence[Any],
    tensors: list[torch.Tensor | None],
    paths: Sequence[str],
    numbers: dict[int, int] | None,
) -> None:
    for data, value, path in zip(items, given, paths, strict=True):
        taken(data, value, tensors, path, numbers)


def _other(path: str, expected: str, given: Any) -> InputsError:
    said = repr(given) if given is None or type(given) in _PLAIN else f"a {type(given).__name__}"
    return InputsError(
        f"{path} is {said[:80]}: the step was saved for {expected}", hint="save it for these inputs as well"
    )


def _no_tensor(tensor: torch.Tensor, path: str) -> Any:
    raise ArtefactError(f"{path} is a tensor")


def signature_json(signature: inspect.Signature) -> list[dict[str, Any]]:
    """The arguments of a forward. One whose default cannot be written has none."""
    found = []
    for parameter in signature.parameters.values():
        entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not inspect.Parameter.empty:
            with contextlib.suppress(ArtefactError):
                entry["default"] = structure_json(parameter.default, _no_tensor, parameter.name)
        found.append(entry)
    return found


_PARAMETERS = {
    kind.name: kind
    for kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    )
}


def signature_of(data: Any) -> inspect.Signature:
    """What ``signature_json`` wrote. Raises ``ArtefactError``."""
    try:
        parameters = []
        for entry in data:
            default: Any = inspect.Parameter.empty
            if "default" in entry:
                check_structure(entry["default"], {})
                default = filled(entry["default"], {})
            kind = _PARAMETERS[entry["kind"]]
            parameters.append(inspect.Parameter(entry["name"], kind, default=default))
        return inspect.Signature(parameters)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"the arguments of the step are malformed: {error}") from error
