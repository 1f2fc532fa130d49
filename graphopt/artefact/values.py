"""Arguments and types of nodes as JSON, and back.

    %x, torch.bfloat16, [1, 2]     <->     {"ref": "x"}, {"dtype": "bfloat16"}, [1, 2]

What JSON cannot spell is an object with one key that says what it is. Lists are lists, tuples
``{"tuple": [...]}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.artefact.operators import Operators, target_text
from graphopt.errors import ArtefactError
from graphopt.program import tensor_leaves

__all__ = [
    "MakeSize",
    "argument_json",
    "argument_of",
    "check_type",
    "dtype_named",
    "has_symbols",
    "like",
    "no_symbols",
    "type_json",
    "type_of",
]

_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def argument_json(value: Any) -> Any:
    """An argument of a node. Raises ``ArtefactError`` for what has no such form."""
    if isinstance(value, fx.Node):
        return {"ref": value.name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [argument_json(value.real), argument_json(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, known in (("layout", _LAYOUTS), ("memory_format", _FORMATS)):
        for name, member in known.items():
            if value is member:
                return {key: name}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, slice):
        return {"slice": [argument_json(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [argument_json(item) for item in value]}
    if isinstance(value, list):
        return [argument_json(item) for item in value]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {"dict": {key: argument_json(item) for key, item in value.items()}}
    if isinstance(value, torch._ops.OpOverload):
        return {"operator": target_text(value)}
    raise ArtefactError(f"the program is given a {type(value).__name__}, which an artefact cannot hold")


def argument_of(data: Any, values: Mapping[str, fx.Node], operators: Operators) -> Any:
    """What ``argument_json`` wrote, ``values`` being the nodes before. Raises ``ArtefactError``."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if isinstance(data, list):
        return [argument_of(item, values, operators) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ArtefactError(f"a node is given {str(data)[:60]!r}, which is no argument")
    ((kind, inner),) = data.items()
    if kind == "ref":
        if not isinstance(inner, str) or inner not in values:
            raise ArtefactError(f"a node reads {str(inner)[:60]!r}, which no node before it makes")
        return values[inner]
    if kind == "tuple" and isinstance(inner, list):
        return tuple(argument_of(item, values, operators) for item in inner)
    if kind == "dict" and isinstance(inner, dict):
        return {key: argument_of(item, values, operators) for key, item in inner.items()}
    if kind == "slice" and isinstance(inner, list) and len(inner) == 3:
        return slice(*(argument_of(item, values, operators) for item in inner))
    if kind == "complex" and isinstance(inner, list) and len(inner) == 2:
        parts = [argument_of(item, values, operators) for item in inner]
        if all(isinstance(part, (int, float)) for part in parts):
            return complex(*parts)
    if kind == "ellipsis" and inner is True:
        return Ellipsis
    if isinstance(inner, str) and kind in _NAMED:
        return _NAMED[kind](inner)
    if kind == "operator" and isinstance(inner, str):
        return operators.target(inner)
    raise ArtefactError(f"a node is given {str(data)[:60]!r}, which is no argument")


def _member(kind: str, known: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text not in known:
            raise ArtefactError(f"{text[:60]!r} is no {kind}", hint=f"known: {', '.join(known)}")
        return known[text]

    return read


def dtype_named(text: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``. Raises ``ArtefactError``."""
    found = getattr(torch, text, None) if text.isidentifier() else None
    if not isinstance(found, torch.dtype):
        raise ArtefactError(f"{text[:60]!r} is no dtype")
    return found


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise ArtefactError(f"{text[:60]!r} is no device") from None


_NAMED: Mapping[str, Callable[[str], Any]] = {
    "float": _member("float", {text: float(text) for text in ("inf", "-inf", "nan")}),
    "dtype": dtype_named,
    "device": _device,
    "layout": _member("layout", _LAYOUTS),
    "memory_format": _member("memory format", _FORMATS),
}


def type_json(value: Any) -> Any:
    """What a node's ``meta["val"]`` looks like: a tensor as an object, several as a list, a size that is
    known at run time alone as ``{"size": expression}``, else ``None``."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise ArtefactError(f"the program has a tensor of layout {value.layout}")
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [_size_json(size) for size in value.shape],
            "stride": [_size_json(step) for step in value.stride()],
            "device": str(value.device),
        }
    if isinstance(value, (tuple, list)) and tensor_leaves(value):
        return [type_json(item) for item in value]
    return _size_json(value) if isinstance(value, torch.SymInt) else None


def _size_json(size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    try:
        form = _torch.expression_form(size)
    except ValueError as error:
        raise ArtefactError(f"a size cannot be written: {error}") from None
    return form if type(form) is int else {"size": form}


MakeSize = Callable[[Any], Any]
"""Makes a size of an expression of symbols (``Sizes.maker``)."""


def no_symbols(form: Any) -> Any:
    """The ``MakeSize`` of a program whose sizes are numbers."""
    raise ArtefactError(f"the size {str(form)[:60]!r} is made of symbols, of which the step has none")


def type_of(data: Any, make_size: MakeSize = no_symbols) -> Any:
    """A tensor, a size, or a list of them, that looks as ``data`` says. Raises ``ArtefactError``."""
    if data is None:
        return None
    if isinstance(data, list):
        return [type_of(item, make_size) for item in data]
    if isinstance(data, dict) and list(data) == ["size"]:
        return make_size(data["size"])
    return like(data, make_size)


def like(data: Any, make_size: MakeSize = no_symbols) -> torch.Tensor:
    """An empty tensor that looks as ``type_json`` says of one. Raises ``ArtefactError``."""
    check_type(data)
    shape, stride = ([_size(size, make_size) for size in data[key]] for key in ("shape", "stride"))
    device = _device(data["device"])
    try:
        return torch.empty_strided(shape, stride, dtype=dtype_named(data["dtype"]), device=device)
    except RuntimeError as error:
        raise ArtefactError(f"a tensor of shape {list(shape)} cannot be made: {error}") from error


def check_type(data: Any) -> None:
    """Raise ``ArtefactError`` unless ``data`` has the parts of a tensor's type; sizes that are made of
    symbols are not looked into."""
    if not isinstance(data, dict) or sorted(data) != ["device", "dtype", "shape", "stride"]:
        raise ArtefactError(f"{str(data)[:60]!r} is no type of a tensor")
    _check_sizes(data["shape"])
    _check_sizes(data["stride"])
    same = len(data["shape"]) == len(data["stride"])
    if not same or not isinstance(data["dtype"], str) or not isinstance(data["device"], str):
        raise ArtefactError(f"{str(data)[:60]!r} is no type of a tensor")


def has_symbols(data: Any) -> bool:
    """Whether a checked type has sizes that are made of symbols."""
    return any(isinstance(size, dict) for size in (*data["shape"], *data["stride"]))


def _check_sizes(data: Any) -> None:
    plain = isinstance(data, list) and all(
        (type(size) is int and 0 <= size < 1 << 62) or (isinstance(size, dict) and list(size) == ["size"])
        for size in data
    )
    if not plain:
        raise ArtefactError(f"{str(data)[:60]!r} are no sizes")


def _size(size: Any, make_size: MakeSize) -> Any:
    return make_size(size["size"]) if isinstance(size, dict) else size
